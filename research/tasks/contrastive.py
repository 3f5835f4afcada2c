"""Contrastive learning of images and texts: each image finds its own text among those of the batch, and vice versa."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.metrics import Mean, weighted
from research.task import Batch, Params, Question, Spec
from research.tasks import tokens

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """A model of images and texts -> logits [B, B], and a loss over all pairs of the global batch.

    The loss of an example depends on the others of its batch, which are its negatives: all that are real, on whichever
    device; rows that only fill the batch up are neither positives nor negatives. Equal texts count as negatives of each
    other's images. A batch must not be split into microbatches, whose examples would not see each other: see
    `task.NeedsWholeBatch`.

    Attributes:
      model: see `models.clip`.
      loss_kind: "softmax": cross-entropy of each image's text and of each text's image, averaged (Radford 2021, figure
        3); "sigmoid": each pair on its own, summed over the texts of an image (Zhai 2023, equation 1).
      max_scale: bound of the learned scale of the similarities; None for none. CLIP's is 100.
    """

    model: nn.Module
    loss_kind: str = "softmax"
    max_scale: float | None = 100.0

    whole_batch: ClassVar[bool] = True

    def __post_init__(self):
        if self.loss_kind not in LOSSES:
            raise UserError(f"config.task.loss_kind: unknown '{self.loss_kind}'{nearest(self.loss_kind, LOSSES)}")
        if self.max_scale is not None and self.max_scale <= 0:
            raise UserError(f"config.task.max_scale: {self.max_scale} must be above 0, or None for no bound")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters.

        Raises:
          UserError: the batches lack a feature, or texts are longer than the model's positions.
        """
        tokens.check(spec, self._inputs, self.model.text.max_positions)
        return tokens.init(self.model, rng, spec, self._inputs)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean loss over real examples, with dropout, and how many find their own among the batch."""
        logits_BxB = self._logits(params, batch, {"dropout": rng})
        return self._loss(logits_BxB, batch["mask"]), self._scores(logits_BxB, batch["mask"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the loss and the scores, which depend on the size of the batch, without dropout."""
        logits_BxB = self._logits(params, batch, {})
        return {"loss": self._loss(logits_BxB, batch["mask"])} | self._scores(logits_BxB, batch["mask"])

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return "image" and "text", unit vectors [B, E], of what the batch has of both."""
        del rng  # nothing is drawn
        found = {"image": self.encode_image} if "image" in batch else {}
        found |= {"text": self.encode_text} if "input_ids" in batch else {}
        return {name: encode(params, batch) for name, encode in found.items()}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return an example's vectors as lists."""
        return {name: [float(x) for x in vector] for name, vector in output.items()}

    def encode_image(self, params: Params, batch: Batch, rngs: dict[str, jax.Array] | None = None) -> jax.Array:
        """Return unit vectors float32 [B, E] of images."""
        return jnp.asarray(self.model.apply({"params": params}, batch["image"], rngs=rngs, method="encode_image"))

    def encode_text(self, params: Params, batch: Batch, rngs: dict[str, jax.Array] | None = None) -> jax.Array:
        """Return unit vectors float32 [B, E] of texts."""
        inputs = [batch.get(name) for name in self._inputs if name != "image"]
        return jnp.asarray(self.model.apply({"params": params}, *inputs, rngs=rngs, method="encode_text"))

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask for the cosine similarity of an image and its text."""
        del params, output
        if target:
            raise UserError("--target: the image is compared with the text of its own line; write the text there")
        if lost := [name for name in ("image", "input_ids") if name not in batch]:
            raise UserError(f"it has no '{lost[0]}'; the similarity of an image and a text is explained, of one line")
        return [Question("the similarity of the image and the text", batch, self._inputs, _similarity)]

    @property
    def _inputs(self) -> tuple[str, ...]:
        return self.model.inputs

    def _logits(self, params: Params, batch: Batch, rngs: dict[str, jax.Array]) -> jax.Array:
        most = math.inf if self.max_scale is None else self.max_scale
        real_Bx1 = batch["mask"][:, None] != 0  # a vector of padding may be NaN, which no weight of 0 removes
        both = (encode(params, batch, rngs) for encode in (self.encode_image, self.encode_text))
        vectors = (jnp.where(real_Bx1, vectors_BxE, 0.0) for vectors_BxE in both)
        return jnp.asarray(self.model.apply({"params": params}, *vectors, most, method="logits"))

    def _loss(self, logits_BxB: jax.Array, mask_B: jax.Array) -> Mean:
        real_B = mask_B != 0
        if self.loss_kind == "sigmoid":
            signs_BxB = 2 * jnp.eye(len(mask_B)) - 1
            losses_BxB = -jax.nn.log_sigmoid(signs_BxB * logits_BxB)
            return Mean.of(weighted(losses_BxB, mask_B[None].astype(jnp.float32)).sum(axis=1), mask_B)
        images_B, texts_B = (_cross_entropy(logits, real_B) for logits in (logits_BxB, logits_BxB.T))
        return Mean.of((images_B + texts_B) / 2, mask_B)

    def _scores(self, logits_BxB: jax.Array, mask_B: jax.Array) -> dict[str, Mean]:
        own_B = jnp.arange(len(mask_B))
        found = {"image_to_text": _among(logits_BxB, mask_B != 0), "text_to_image": _among(logits_BxB.T, mask_B != 0)}
        return {name: Mean.of(logits.argmax(axis=1) == own_B, mask_B) for name, logits in found.items()}


def _similarity(model: nn.Module, inputs: Sequence[jax.Array | None], choice: Any) -> jax.Array:
    """Return the cosine similarity of each image with its own text, float32 [B, 1]: see `Question.score`."""
    del choice
    image, *text = inputs
    return (model.encode_image(image) * model.encode_text(*text)).sum(axis=-1, keepdims=True)


def _cross_entropy(logits_BxB: jax.Array, real_B: jax.Array) -> jax.Array:
    return -jnp.diagonal(jax.nn.log_softmax(_among(logits_BxB, real_B), axis=1))


def _among(logits_BxB: jax.Array, real_B: jax.Array) -> jax.Array:
    """Return the logits with what is no real example out of reach: the lowest finite number, as it has a gradient."""
    return jnp.where(real_B[None], logits_BxB, jnp.finfo(jnp.float32).min)
