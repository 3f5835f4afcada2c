"""Feature extractors of images, for `evaluators.frechet`."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import assets, storage
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
    """An image classifier trained by a run of this code.

    Its features are the inputs of its last layer.

    Attributes:
      path: the run's folder, whose name names the distance: frechet_NAME.
      checkpoint: "latest", "best" or a step; "" is the best if the run keeps it, else the latest.
    """

    path: str
    checkpoint: str = ""

    def __post_init__(self):
        if not (self._folder / "checkpoints").is_dir():
            raise UserError(f"path: no run in '{self.path}'; train the classifier first or set another path")

    @property
    def metric(self) -> str:
        """The name of the distance."""
        return f"frechet_{self._folder.absolute().name}"

    @functools.cached_property
    def params(self) -> Params:
        """Return the run's parameters, averaged if it keeps averages."""
        shapes = self._experiment.abstract_state.params
        return transfer.load_params(self.path, self._model, shapes, self.checkpoint, new=())[0]

    def check(self, shape: tuple[int, int, int], label_names: Sequence[str]) -> None:
        """Raise UserError unless the run was trained on images of this shape and these classes in this order."""
        own = self._experiment.spec["image"].shape[1:] if "image" in self._experiment.spec else ()
        if own != shape:
            raise UserError(
                f"path: the run in '{self.path}' takes images of shape {own}, but the samples have shape {shape}"
            )
        theirs = self._experiment.label_names
        if theirs and label_names and theirs != tuple(label_names):
            raise UserError(f"path: the run in '{self.path}' classifies {theirs}, but the samples are of {label_names}")

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
        return storage.path(self.path)

    @property
    def _model(self) -> Any:
        return self._experiment.task.model

    @functools.cached_property
    def _experiment(self) -> Experiment:
        config = load_config(self._folder)
        config.mesh = None  # the run's mesh may need more devices than are available
        return Experiment(config, workdir=self._folder)

    @functools.cached_property
    def _normalizations(self) -> list[Any]:
        ops = build(self._experiment.config.data.get("ops", ()), "config.data.ops", seed=0)
        return [op for op in ops if isinstance(op, Normalize)]


@dataclasses.dataclass(frozen=True)
class Inception:
    """The Inception network of the Frechet inception distance (FID), with weights from a file.

    Attributes:
      path: a file, in any form that `assets.resolve` takes, of the names that the PyTorch port of Heusel 2017's weights
        has (pt_inception-2015-12-05): safetensors, or PyTorch's zip format, to which older files are saved again.
    """

    path: str

    metric = "fid"

    def __post_init__(self):
        for name, leaf in self._shapes.items():
            if self._stored.get(f"{name}.conv.weight") is None:
                raise UserError(
                    f"path: '{self.path}' does not contain the weights of Inception-v3: it lacks {name}.conv.weight"
                )
            *kernel, inputs, outputs = leaf["kernel"].shape
            if (found := self._stored[f"{name}.conv.weight"].shape) != (outputs, inputs, *kernel):
                raise UserError(f"path: '{self.path}' contains another network: its {name}.conv.weight is {found}")

    @functools.cached_property
    def params(self) -> Params:
        """Return the parameters of `models.inception`, with batch normalisation folded in."""
        return {name: self._folded(name) for name in self._shapes}

    def check(self, shape: tuple[int, int, int], label_names: Sequence[str]) -> None:
        """Raise UserError unless images have 1 or 3 channels."""
        if shape[2] not in (1, 3):
            raise UserError(f"network: Inception takes images of 1 or 3 channels, not {shape[2]}")

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
