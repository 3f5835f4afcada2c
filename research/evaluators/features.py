"""What trained networks see in images, for `evaluators.frechet`."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import assets
from research.build import build
from research.configuration import transfer
from research.data.image import Normalize
from research.errors import UserError
from research.experiment import Experiment
from research.models import inception
from research.pretrained import weight_files
from research.pretrained.torch_zip import Stored
from research.reporting.record import load_config
from research.task import Params


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """An image classifier that a run of this code has trained.

    Its features are what its last layer is applied to.

    Attributes:
      path: the run's folder; its name is that of the distance: frechet_NAME.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.
    """

    path: str
    checkpoint: str = ""

    def __post_init__(self):
        if not (self._folder / "checkpoints").is_dir():
            raise UserError(f"path: there is no run in '{self.path}'; train the classifier first, or name another one")

    @property
    def metric(self) -> str:
        """What the distance is called."""
        return f"frechet_{self._folder.absolute().name}"

    @functools.cached_property
    def params(self) -> Params:
        """The run's parameters, averaged where it averages."""
        shapes = self._experiment.abstract_state.params
        return transfer.load_params(self.path, self._model, shapes, self.checkpoint, new=())[0]

    def check(self, shape: tuple[int, int, int], label_names: Sequence[str]) -> None:
        """Raise UserError unless the run was trained on images of that shape, and of these classes in this order."""
        own = self._experiment.spec["image"].shape[1:] if "image" in self._experiment.spec else ()
        if own != shape:
            raise UserError(f"path: the run in '{self.path}' sees images of {own}; those drawn are of {shape}")
        theirs = self._experiment.label_names
        if theirs and label_names and theirs != tuple(label_names):
            raise UserError(f"path: the run in '{self.path}' tells {theirs} apart; what is drawn is {label_names}")

    def __call__(self, params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
        """Return "features" [B, F] and "logits" [B, C]."""
        for op in self._normalizations:
            pixels = (pixels - op.mean) / op.std
        logits, state = self._model.apply(
            {"params": params}, pixels, capture_intermediates=lambda module, _: module.name == "head_dropout"
        )
        found = state["intermediates"].get("head_dropout")
        if found is None:
            raise UserError(
                f"path: a {type(self._model).__name__}, as in '{self.path}', has no features before its head"
            )
        return {"features": found["__call__"][0], "logits": jnp.asarray(logits)}

    @property
    def _folder(self) -> pathlib.Path:
        return pathlib.Path(self.path).expanduser()

    @property
    def _model(self) -> Any:
        return self._experiment.task.model

    @functools.cached_property
    def _experiment(self) -> Experiment:
        config = load_config(self._folder)
        config.mesh = None  # that of the run may need other devices than there are
        return Experiment(config, workdir=self._folder)

    @functools.cached_property
    def _normalizations(self) -> list[Any]:
        ops = build(self._experiment.config.data.get("ops", ()), "config.data.ops", seed=0)
        return [op for op in ops if isinstance(op, Normalize)]


@dataclasses.dataclass(frozen=True)
class Inception:
    """The network of the Frechet inception distance, with weights that you have; the distance is then called FID.

    Attributes:
      path: a file, in any form that `assets.resolve` takes, of the names that the PyTorch port of Heusel 2017's weights
        has (pt_inception-2015-12-05): safetensors, or PyTorch's zip format, to which older files are saved again.
    """

    path: str

    metric = "fid"

    def __post_init__(self):
        for name, leaf in self._shapes.items():
            if self._stored.get(f"{name}.conv.weight") is None:
                raise UserError(f"path: '{self.path}' holds no weights of Inception-v3: it lacks {name}.conv.weight")
            *kernel, inputs, outputs = leaf["kernel"].shape
            if (found := self._stored[f"{name}.conv.weight"].shape) != (outputs, inputs, *kernel):
                raise UserError(f"path: '{self.path}' holds another network: its {name}.conv.weight is {found}")

    @functools.cached_property
    def params(self) -> Params:
        """The parameters of `models.inception`, with the batch normalisation folded in."""
        return {name: self._folded(name) for name in self._shapes}

    def check(self, shape: tuple[int, int, int], label_names: Sequence[str]) -> None:
        """Raise UserError unless images are grey or of three colours."""
        if shape[2] not in (1, 3):
            raise UserError(f"network: Inception sees images of 1 or 3 channels, not of {shape[2]}")

    def __call__(self, params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
        """Return "features" [B, 2048]."""
        return {"features": jnp.asarray(inception.Inception().apply({"params": params}, inception.prepare(pixels)))}

    @functools.cached_property
    def _stored(self) -> dict[str, Stored]:
        return weight_files.read_file(assets.resolve(self.path))

    @functools.cached_property
    def _shapes(self) -> dict[str, Any]:
        image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
        return jax.eval_shape(inception.Inception().init, jax.random.key(0), image)["params"]

    def _folded(self, name: str) -> dict[str, np.ndarray]:
        kernel = self._stored[f"{name}.conv.weight"].read().astype(np.float64)
        parts = ("weight", "bias", "running_mean", "running_var")
        scale, bias, mean, variance = (self._stored[f"{name}.bn.{part}"].read().astype(np.float64) for part in parts)
        factor = scale / np.sqrt(variance + 1e-3)
        folded = {"kernel": kernel.transpose(2, 3, 1, 0) * factor, "bias": bias - mean * factor}
        return {key: value.astype(np.float32) for key, value in folded.items()}
