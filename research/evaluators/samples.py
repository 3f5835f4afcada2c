"""Samples of a diffusion model, as arrays and as a grid with one row per class."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.data.source import examples
from research.errors import UserError
from research.evaluators import batches
from research.generation.diffusion import Sampling
from research.reporting import pictures
from research.task import Batch, Params
from research.tasks.diffusion import Diffusion


@dataclasses.dataclass(frozen=True)
class Samples:
    """Draws samples of each class, from the same noise each time, beside real images.

    Attributes:
      task: the diffusion task.
      mesh: the device mesh.
      data: the real images; its `Normalize` is undone.
      seed: of the noise.
      columns: the number of samples per class.
      real: the number of real images per class.
      classes: the number of classes shown, from the first.
      sampling: the sampler's settings; by default the task's.
    """

    task: Diffusion
    mesh: Mesh
    data: Dataset
    seed: int = 0
    columns: int = 8
    real: int = 2
    classes: int = 10
    sampling: Sampling | None = None

    def __post_init__(self):
        for name, least in {"columns": 1, "real": 0, "classes": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} must be at least {least}")
        check_pixels(self.task)
        self.task.check(self.sampling or self.task.sampling)

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """Return "images", a picture uint8 [height, width, 3]."""
        shown = min(self.classes, self.task.model.num_classes)
        drawing = Drawing(self.task, self.sampling or self.task.sampling, self.seed)
        labels = np.repeat(np.arange(shown), self.columns)
        drawn = pictures.pixels(draw(drawing, params, labels, self.data.batch_size, self.mesh, check), self.data.ops)
        gap = np.ones((1, *drawn.shape[1:]), np.float32)
        rows = [
            np.concatenate([row, gap, self._real[label]]) if self.real else row
            for label, row in enumerate(drawn.reshape(shown, self.columns, *drawn.shape[1:]))
        ]
        title = f"samples: {describe(drawing.sampling)}" + ("; the last columns: real" if self.real else "")
        return {"images": pictures.by_class(rows, names(self.task)[:shown], title)}

    @functools.cached_property
    def _real(self) -> list[np.ndarray]:
        """Return the first real images of each class, [`real`, H, W, C] in [0, 1]; white where there are too few."""
        shown = min(self.classes, self.task.model.num_classes)
        found: list[list[np.ndarray]] = [[] for _ in range(shown)]
        for i in range(len(self.data.source)):
            (example,) = self.data.transform(self.data.source[i])
            if example["label"] < shown and len(found[example["label"]]) < self.real:
                found[example["label"]].append(pictures.pixels(example["image"], self.data.ops))
            if all(len(row) == self.real for row in found):
                break
        white = np.ones(self.task.model.shape, np.float32)
        return [np.stack((row + [white] * self.real)[: self.real]) for row in found]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A function of parameters and requests, "label" and "number" int [B]: image n is a function of (seed, n)."""

    task: Diffusion
    sampling: Sampling
    seed: int

    def __call__(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Return "image" [B, H, W, C] and "mask" [B]."""
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), batch["number"])
        return {"image": self.task.draw(params, batch["label"], keys_B, self.sampling), "mask": batch["mask"]}


def draw(
    drawing: Drawing,
    params: Params,
    labels: Sequence[int] | np.ndarray,
    batch_size: int,
    mesh: Mesh,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return an image for each label, float32 [N, H, W, C], in the units of the data."""
    outputs = list(batches.run(drawing, params, requests(labels, batch_size, mesh), mesh, check))
    return np.concatenate([output["image"][output["mask"] > 0] for output in outputs])


def requests(labels: Sequence[int] | np.ndarray, batch_size: int, mesh: Mesh) -> Dataset:
    """Return a dataset of labels and their numbers, in batches no larger than needed."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    records = [{"label": int(label), "number": i} for i, label in enumerate(labels)]
    size = min(batch_size, math.ceil(len(records) / ways) * ways)
    return Dataset(examples(records), ("label", "number"), batch_size=size)


def names(task: Diffusion) -> list[str]:
    """Return the class names, or the class ids where there are none."""
    return list(task.label_names) or [str(i) for i in range(task.model.num_classes)]


def check_pixels(task: Diffusion) -> None:
    """Raise UserError unless the samples of the model are images."""
    if task.model.num_channels not in (1, 3):
        raise UserError(
            f"samples of {task.model.num_channels} channels are latents, not images; decode them with their autoencoder"
        )


def describe(sampling: Sampling) -> str:
    """Return a description of the sampler for titles."""
    name = "Euler" if sampling.sampler == "euler" else sampling.sampler.upper()
    guided = f", guidance {sampling.guidance:g}" if sampling.guidance != 1 else ""
    return f"{name}, {sampling.steps} step{'s' * (sampling.steps > 1)}{guided}"
