"""The Frechet distance between generated and real images in the feature space of a network (Heusel 2017).

It is called FID where the network is Inception with the published weights, and by the network's name otherwise: numbers
of different networks, or of different numbers of samples, are not comparable.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import scipy.linalg
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators import batches
from research.evaluators.samples import Drawing, check_pixels, requests
from research.generation.diffusion import Sampling
from research.reporting import pictures
from research.task import Batch, Params
from research.tasks.diffusion import Diffusion


class Network(Protocol):
    """A feature extractor of images."""

    @property
    def metric(self) -> str:
        """The name of the distance."""
        ...

    @property
    def params(self) -> Params:
        """Return the parameters, on the host."""
        ...

    def check(self, shape: tuple[int, int, int], label_names: Sequence[str]) -> None:
        """Raise UserError unless it takes images of that height, width and number of channels and, of a classifier,
        tells these classes apart; () where they have no names.
        """
        ...

    def __call__(self, params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
        """Map images [B, H, W, C] in [0, 1] to "features" [B, F] and, of a classifier, "logits" [B, C]."""
        ...


@dataclasses.dataclass(frozen=True)
class Frechet:
    """Compares generated images, of every class in turn, with real ones.

    Attributes:
      task: the diffusion task.
      mesh: the device mesh.
      data: the real images; its `Normalize` is undone.
      network: see `Network`.
      num_samples: the number of generated images; the distance decreases with it.
      seed: of the noise.
      sampling: the sampler's settings; by default the task's.
    """

    task: Diffusion
    mesh: Mesh
    data: Dataset
    network: Network
    num_samples: int = 10_000
    seed: int = 0
    sampling: Sampling | None = None

    def __post_init__(self):
        if self.num_samples < 2:
            raise UserError(f"num_samples: {self.num_samples} must be at least 2")
        check_pixels(self.task)
        self.task.check(self.sampling or self.task.sampling)
        self.network.check(self.task.model.shape, self.task.label_names)

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return the distance; "accuracy", the share of samples that a classifier assigns to their class; and

        "real_" and the name of the distance: the distance between two halves of the real images, for reference.
        """
        labels = np.arange(self.num_samples) % self.task.model.num_classes
        asked = requests(labels, self.data.batch_size, self.mesh)
        every = {"task": params, "network": self.network.params}
        drawn = _columns(batches.run(self._draw, every, asked, self.mesh, check))
        distance = frechet_distance(_moments(drawn["features"]), _moments(self._real))
        result = {self.network.metric: distance, f"real_{self.network.metric}": self._real_distance}
        if "logits" in drawn:
            result["accuracy"] = float((drawn["logits"].argmax(axis=1) == labels).mean())
        return result

    @functools.cached_property
    def _real(self) -> np.ndarray:
        """The features of the real images, [N, F]."""
        found = batches.run(self._look, self.network.params, self.data, self.mesh, lambda: None)
        return _columns(found)["features"]

    @functools.cached_property
    def _real_distance(self) -> float:
        return frechet_distance(_moments(self._real[::2]), _moments(self._real[1::2]))

    def _draw(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        drawing = Drawing(self.task, self.sampling or self.task.sampling, self.seed)
        return self._see(params["network"], **drawing(params["task"], batch))

    def _look(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        return self._see(params, batch["image"], batch["mask"])

    def _see(self, params: Params, image: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """Apply the network to images quantised to 8 bits, as in a PNG file."""
        pixels = (pictures.pixels(image, self.data.ops) * 255).round() / 255
        return self.network(params, pixels) | {"mask": mask}


def _columns(outputs: Any) -> dict[str, np.ndarray]:
    """Return the outputs of all batches without padding rows."""
    every = list(outputs)
    return {name: np.concatenate([batch[name][batch["mask"] > 0] for batch in every]) for name in every[0]}


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = features.astype(np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """Return |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two normal distributions (Dowson 1982).

    The trace of the root is that of (C^(1/2) C' C^(1/2))^(1/2), whose eigenvalues are real and not negative, also where
    there are fewer samples than features.
    """
    (mean, covariance), (other_mean, other_covariance) = one, other
    values, vectors = scipy.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    values = scipy.linalg.eigvalsh(root @ other_covariance @ root)
    trace = np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    return max(float(np.square(mean - other_mean).sum() + trace), 0.0)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Mean pixel values of square regions as features: coarse, but without weights.

    Attributes:
      size: the number of squares per row and per column.
    """

    size: int = 7

    metric = "frechet_pixels"

    @property
    def params(self) -> Params:
        """None."""
        return {}

    def check(self, shape: tuple[int, int, int], label_names: Sequence[str]) -> None:
        """Raise UserError unless the image size is divisible by `size`."""
        if shape[0] % self.size:
            raise UserError(f"network.size: images of {shape[0]} pixels cannot be divided into {self.size} squares")

    def __call__(self, params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
        """Return "features" [B, size * size * C]."""
        batch, height, width, channels = pixels.shape
        squares = pixels.reshape(batch, self.size, height // self.size, self.size, width // self.size, channels)
        return {"features": squares.mean(axis=(2, 4)).reshape(batch, -1)}
