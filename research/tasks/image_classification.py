"""Classification of images: mixed with each other on the device, and distilled from a teacher."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.metrics import Mean
from research.models.vit import DistilledClassifier
from research.task import Batch, Params, Spec
from research.tasks import encoders
from research.tasks.classification import Classification


@dataclasses.dataclass(frozen=True)
class ImageClassification(Classification):
    """A model of images -> logits [B, C] and an objective, see `Classification`.

    In training an image may be mixed with the one before it in the batch, and their labels by the same share, which is
    drawn for a batch. Its own image has at least half of the share in mixup, as in big_vision. Where both are on, a
    batch draws one of them with even odds, as in timm.

    Attributes:
      mixup: alpha of the Beta distribution of the share, by which pixels are averaged (Zhang 2018); 0 is off.
      cutmix: alpha of the Beta distribution of the share that is left when a rectangle of the same shape as the image,
        cut off at its edges, comes from the other one (Yun 2019); 0 is off.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"config.task.{name}: {getattr(self, name)} must be 0 (off) or more")
            if getattr(self, name) and self.objective == "regression":
                raise UserError(f"config.task.{name}: objective 'regression' has no labels to mix")

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean loss over real examples, with dropout, and the accuracy by the images' own labels."""
        mix_rng, dropout_rng = jax.random.split(rng)
        mixed, other, share = self._mix(batch, mix_rng)
        logits_BxC = encoders.logits(self.model, params, mixed, {"dropout": dropout_rng})
        return self._mixed_loss(logits_BxC, batch, other, share), self._scores(logits_BxC, batch)

    def _mix(self, batch: Batch, rng: jax.Array) -> tuple[Batch, Batch, jax.Array]:
        """Return the batch with mixed images, the one with the others' labels, and the share of its own."""
        if not (self.mixup or self.cutmix):
            return batch, batch, jnp.ones(())
        image_BxHxWxC = batch["image"]
        own_HxW = self._weights(rng, *image_BxHxWxC.shape[1:3])
        own_HxWx1 = own_HxW[..., None].astype(image_BxHxWxC.dtype)
        mixed = own_HxWx1 * image_BxHxWxC + (1 - own_HxWx1) * _previous(image_BxHxWxC, batch["mask"])
        other = {**batch, "label": _previous(batch["label"], batch["mask"])}
        return {**batch, "image": mixed}, other, own_HxW.mean()

    def _weights(self, rng: jax.Array, height: int, width: int) -> jax.Array:
        """Return what share of its own each pixel keeps, float32 [H, W]."""
        kind_rng, share_rng = jax.random.split(rng)
        if not self.cutmix:
            return mixup_weights(share_rng, (height, width), self.mixup)
        cut_HxW = cutmix_weights(share_rng, (height, width), self.cutmix)
        if not self.mixup:
            return cut_HxW
        mixed_HxW = mixup_weights(share_rng, (height, width), self.mixup)
        return jnp.where(jax.random.bernoulli(kind_rng), mixed_HxW, cut_HxW)

    def _mixed_loss(self, logits_BxC: jax.Array, batch: Batch, other: Batch, share: jax.Array) -> Mean:
        """Return the loss of mixed labels, which is linear in them."""
        own = self._loss(logits_BxC, batch, self.label_smoothing)
        if not (self.mixup or self.cutmix):
            return own
        others = self._loss(logits_BxC, other, self.label_smoothing)
        return Mean(share * own.total + (1 - share) * others.total, own.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(ImageClassification):
    """Classification with a second token that learns what a teacher says of an image: hard distillation.

    Touvron 2021 ("Training data-efficient image transformers"), equation 3: the mean of the cross-entropy of the class
    token's logits with the label and that of the distillation token's logits with the teacher's choice, of the same,
    mixed, images. The teacher's parameters are those of another run: they stand under "teacher", `config.init` brings
    them and `config.optimizer.freeze` keeps them as they are.

    Attributes:
      model: a `models.vit.DistilledClassifier`.
      teacher: the model of the run that teaches.
    """

    teacher: nn.Module

    borrowed: ClassVar[tuple[str, ...]] = ("^teacher/",)

    def __post_init__(self):
        super().__post_init__()
        if self.objective != "softmax":
            raise UserError(f"config.task.objective: a teacher chooses one class, which '{self.objective}' does not")
        if not isinstance(self.model, DistilledClassifier):
            found = type(self.model).__name__
            raise UserError(f"config.task.model: {found} has no distillation token; use models.vit.DistilledClassifier")
        theirs, ours = getattr(self.teacher, "num_outputs", None), self.model.num_outputs
        if theirs != ours:
            raise UserError(f"config.task.teacher.num_outputs: the teacher knows {theirs} classes, the model {ours}")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; those under "teacher" are of no use until they are replaced."""
        return {**super().init(rng, spec), "teacher": encoders.init(self.teacher, spec, rng)}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean loss over real examples, with dropout, and both accuracies by the images' own labels."""
        mix_rng, dropout_rng = jax.random.split(rng)
        mixed, other, share = self._mix(batch, mix_rng)
        rngs = {"dropout": dropout_rng}
        both: Any = self.model.apply({"params": params}, mixed["image"], rngs=rngs, method="heads")
        label_BxC, teacher_BxC = both
        said_BxC = jax.lax.stop_gradient(encoders.logits(self.teacher, params["teacher"], mixed, {}))
        taught = {**batch, "label": said_BxC.argmax(axis=-1)}
        parts = self._mixed_loss(label_BxC, batch, other, share), self._loss(teacher_BxC, taught, 0.0)
        scores = self._scores((label_BxC + teacher_BxC) / 2, batch)
        scores["teacher_accuracy"] = self._scores(said_BxC, batch)["accuracy"]
        return Mean((parts[0].total + parts[1].total) / 2, parts[0].count), scores


def mixup_weights(rng: jax.Array, shape: Sequence[int], alpha: float) -> jax.Array:
    """Return what share of its own each pixel keeps, float32 [H, W]: one drawn number, at least a half, for all."""
    share = jax.random.beta(rng, alpha, alpha)
    return jnp.full(shape, jnp.maximum(share, 1 - share))


def cutmix_weights(rng: jax.Array, shape: Sequence[int], alpha: float) -> jax.Array:
    """Return which pixels stay, float32 [H, W] of 1 and 0: all but a rectangle around a pixel drawn evenly.

    It has the sides of the image times the root of its share of the area, before it is cut off at the edges.
    """
    share_rng, *centre_rngs = jax.random.split(rng, 3)
    scale = jnp.sqrt(1 - jax.random.beta(share_rng, alpha, alpha))

    def inside(size: int, rng: jax.Array) -> jax.Array:
        half = (size * scale).astype(jnp.int32) // 2
        centre = jax.random.randint(rng, (), 0, size)
        place = jnp.arange(size)
        return (place >= centre - half) & (place < centre + half)

    rows, columns = (inside(size, key) for size, key in zip(shape, centre_rngs))
    return 1.0 - (rows[:, None] & columns[None]).astype(jnp.float32)


def _previous(x: jax.Array, mask_B: jax.Array) -> jax.Array:
    """Return for each example the one before it, or itself where that one only fills the batch up."""
    real_B = jnp.roll(mask_B, 1) != 0
    return jnp.where(real_B.reshape(-1, *[1] * (x.ndim - 1)), jnp.roll(x, 1, axis=0), x)
