"""Pictures of held-out images reconstructed by a masked autoencoder."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators import batches
from research.evaluators.numbered import Numbered
from research.reporting import pictures
from research.task import Batch, Params
from research.tasks.reconstruction import Reconstruction


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """Draws the first images of a dataset: masked, reconstructed and original, with the same masks each time.

    Attributes:
      task: its `predict` gives "reconstruction" and "masked".
      mesh: the device mesh.
      data: the images; its `Normalize` is undone.
      count: the number of images.
    """

    task: Reconstruction
    mesh: Mesh
    data: Dataset
    count: int = 8

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"count: {self.count} must be at least 1")

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """Return "images", a picture uint8 [height, width, 3]."""
        outputs = list(batches.run(self._batch, params, self.dataset, self.mesh, check))
        columns = {name: np.concatenate([batch[name] for batch in outputs]) for name in outputs[0]}
        columns = {name: values[columns["mask"] > 0] for name, values in columns.items()}
        rows, width = columns["image"].shape[1:3]
        size = self.task.model.encoder.patch_size
        hidden = columns["masked"].reshape(-1, rows // size, width // size).repeat(size, axis=1).repeat(size, axis=2)
        true, predicted = (pictures.pixels(columns[name], self.data.ops) for name in ("image", "reconstruction"))
        return {"images": pictures.reconstructions(list(true), list(predicted), list(hidden), self._title)}

    @property
    def _title(self) -> str:
        title = f"{self.task.model.mask_ratio:.0%} of the patches are masked (blue)"
        if self.task.model.normalize_targets:
            title += "; predictions are rescaled to the true mean and deviation of each patch"
        return title

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data as it is read, its first examples with their numbers."""
        return dataclasses.replace(self.data, source=Numbered(self.data.source, self.count))

    def _batch(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        outputs = self.task.predict(params, batch, jax.random.key(0))
        shown = {name: outputs[name] for name in ("reconstruction", "masked")}
        return shown | {"image": batch["image"], "mask": batch["mask"]}
