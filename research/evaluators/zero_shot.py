"""Zero-shot classification and retrieval by encoders of images and texts."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from research.data import captions
from research.data.dataset import Dataset
from research.data.source import examples
from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.evaluators import batches
from research.evaluators.numbered import numbered
from research.task import Batch, Params
from research.tasks.contrastive import Contrastive


@dataclasses.dataclass(frozen=True)
class Classification:
    """Takes each image for the class whose prompts are nearest (Radford 2021, section 3.1).

    A class is represented by the mean of its prompts' unit vectors, made one again.

    Attributes:
      task: the task to evaluate.
      mesh: the device mesh.
      data: images with `label`.
      tokenizer: of the prompts.
      templates: prompts with {} in place of the class.
      classes: their names by number; the data's own where there are none.
      max_length: tokens of a prompt, padded to this.
    """

    task: Contrastive
    mesh: Mesh
    data: Dataset
    tokenizer: Tokenizer
    templates: tuple[str, ...] = ("a photo of a {}",)
    classes: tuple[str, ...] = ()
    max_length: int = 77

    def __post_init__(self):
        captions.prompts(self._names, self.templates)

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return {"accuracy", "top_5"}; the latter where there are more than five classes."""
        texts_CxE = self._class_vectors(params, check)
        ranks = []
        for images_BxE, labels_B, mask_B in batches.run(self._images, params, self.data, self.mesh, check):
            if labels_B.max(initial=0) >= len(texts_CxE):
                raise UserError(f"classes: there are {len(texts_CxE)}, and an image is of number {labels_B.max()}")
            scores_BxC = images_BxE @ texts_CxE.T
            ranks.append(ranks_of(scores_BxC, labels_B)[mask_B != 0])
        rank = np.concatenate(ranks)
        scores = {"accuracy": float((rank < 1).mean())}
        return scores | ({"top_5": float((rank < 5).mean())} if len(texts_CxE) > 5 else {})

    @property
    def _names(self) -> Sequence[str]:
        return self.classes or getattr(self.data.source, "label_names", {}).get("label", ())

    def _class_vectors(self, params: Params, check: Callable[[], None]) -> np.ndarray:
        """Return unit vectors float32 [classes, E]."""
        arrays = captions.encode(self.tokenizer, captions.prompts(self._names, self.templates), self.max_length)
        rows = [{name: array[i] for name, array in arrays.items()} for i in range(len(arrays["input_ids"]))]
        data = Dataset(examples(rows), captions.FEATURES, batch_size=self.data.batch_size, workers=0)
        vectors = _in_order(self._texts, params, data, self.mesh, check)
        mean_CxE = vectors.reshape(len(self._names), len(self.templates), -1).mean(axis=1)
        return mean_CxE / np.linalg.norm(mean_CxE, axis=1, keepdims=True)

    def _images(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.task.encode_image(params, batch), batch["label"], batch["mask"]

    def _texts(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.task.encode_text(params, batch), batch["example"], batch["mask"]


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Ranks all texts by each image, and all images by each text; the example's own is the one that counts.

    Attributes:
      task: the task to evaluate.
      mesh: the device mesh.
      data: pairs. An image with several texts is several pairs, of which each finds its own only.
      at: the ranks up to which the own one counts as found.
    """

    task: Contrastive
    mesh: Mesh
    data: Dataset
    at: tuple[int, ...] = (1, 5)

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return {"image_to_text_recall_1", "text_to_image_recall_1", ...}, shares of the examples."""
        images = _in_order(self._images, params, self.data, self.mesh, check)
        texts = _in_order(self._texts, params, self.data, self.mesh, check)
        scores: dict[str, float] = {}
        for name, asked, found in (("image_to_text", images, texts), ("text_to_image", texts, images)):
            rank = own_ranks(asked, found)
            scores |= {f"{name}_recall_{most}": float((rank < most).mean()) for most in self.at}
        return scores

    def _images(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.task.encode_image(params, batch), batch["example"], batch["mask"]

    def _texts(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.task.encode_text(params, batch), batch["example"], batch["mask"]


def own_ranks(asked_NxE: np.ndarray, found_NxE: np.ndarray, rows: int = 1024) -> np.ndarray:
    """Return how many are nearer to each vector than its own counterpart, int [N]; `rows` at a time."""
    count = len(asked_NxE)
    parts = (np.arange(start, min(start + rows, count)) for start in range(0, count, rows))
    return np.concatenate([ranks_of(asked_NxE[part] @ found_NxE.T, part) for part in parts])


def ranks_of(scores_NxC: np.ndarray, own_N: np.ndarray) -> np.ndarray:
    """Return how many score higher than one's own, int [N].

    Of equal ones the first counts as the highest, so that a model that tells nothing apart is no better than chance;
    what is no number counts as higher.
    """
    own_Nx1 = np.take_along_axis(scores_NxC, own_N[:, None], axis=1)
    before_NxC = np.arange(scores_NxC.shape[1]) < own_N[:, None]
    return (~(scores_NxC <= own_Nx1) | ((scores_NxC == own_Nx1) & before_NxC)).sum(axis=1)


def _in_order(
    encode: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    params: Params,
    data: Dataset,
    mesh: Mesh,
    check: Callable[[], None],
) -> np.ndarray:
    """Return the vectors [N, E] of all examples, in their order."""
    vectors: dict[int, np.ndarray] = {}
    for found, numbers, mask in batches.run(encode, params, numbered(data), mesh, check):
        vectors |= {int(numbers[i]): found[i] for i in np.flatnonzero(mask)}
    return np.stack([vector for _, vector in sorted(vectors.items())])
