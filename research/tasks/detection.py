"""Detection as the prediction of a set (Carion 2020): each object is matched with one query, the rest find nothing."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from research.errors import UserError, nearest
from research.metrics import Mean, weighted
from research.task import Batch, Params, Question, Spec
from research.tasks import matching, tokens

INPUTS = ("image", "pixel_mask")


@dataclasses.dataclass(frozen=True)
class Detection:
    """A model of (image, pixel_mask) -> logits [L, B, Q, C + 1] and boxes [L, B, Q, 4], and the loss of its sets.

    Boxes are (centre x, centre y, width, height) as shares of the image. Batches hold "image", perhaps "pixel_mask",
    "boxes" float32 [B, N, 4], "classes" int32 [B, N] and "box_mask" [B, N], 1 where there is a box.

    The weights are those of the loss and of the cost that the matching makes least, where the class counts by its
    probability. The class loss is averaged over all queries, weighted; the others over the boxes of the batch. Of
    several microbatches, class losses are weighted by their numbers of boxes.

    Attributes:
      model: the Linen module, whose `num_outputs` is C and whose L results are those of the layers of its decoder.
      class_weight: of the cross-entropy.
      box_weight: of the sum of absolute differences of two boxes.
      giou_weight: of 1 - generalised intersection over union (Rezatofighi 2019).
      no_object_weight: of a query without an object in the class loss, relative to one with an object.
      auxiliary: add up the losses of all layers of the decoder; else that of the last counts alone.
      threshold: the score from which on a box is described.
      label_names: C names, for display; taken from the training data where they are left out.
      mesh: over which batches are split.
    """

    model: nn.Module
    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    no_object_weight: float = 0.1
    auxiliary: bool = True
    threshold: float = 0.5
    label_names: tuple[str, ...] = ()
    mesh: Mesh | None = None

    def __post_init__(self):
        for name in ("class_weight", "box_weight", "giou_weight", "no_object_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"config.task.{name}: {getattr(self, name)} must not be negative")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"config.task.threshold: {self.threshold} must lie in [0, 1]")
        outputs = getattr(self.model, "num_outputs", None)
        if self.label_names and outputs is not None and len(self.label_names) != outputs:
            names = f"{len(self.label_names)} labels {self.label_names}"
            raise UserError(f"config.task.model.num_outputs: {outputs} outputs for {names}")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters.

        Raises:
          UserError: a feature is missing, or there may be more boxes than the model has queries.
        """
        tokens.check(spec, ("image", "boxes", "classes", "box_mask"))
        queries, boxes = getattr(self.model, "num_queries", None), spec["boxes"].shape[1]
        if queries is not None and queries < boxes:
            raise UserError(f"config.task.model.num_queries: {queries} are too few for up to {boxes} boxes an image")
        return tokens.init(self.model, rng, spec, INPUTS)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the loss, with dropout, and the parts of that of the last layer, unweighted."""
        means = self._means(params, batch, {"dropout": rng})
        return means.pop("loss"), means

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the loss and its parts, without dropout.

        "class_loss", "box_loss" and "giou_loss" are unweighted and those of the last layer; "cardinality_error" is
        by how many objects too few or too many are found in an image.
        """
        return self._means(params, batch, {})

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return what every query finds.

        Returns:
          "scores" float32 [B, Q], the probability of the likeliest class; "classes" int32 [B, Q]; "boxes" float32
          [B, Q, 4]. And "image_size", int32 [B, 2], where the batch has it: `describe` speaks in pixels then.
        """
        del rng  # nothing is drawn
        logits, boxes = self._outputs(params, batch, {})
        probabilities_BxQxC = jax.nn.softmax(logits[-1])[..., :-1]
        sizes = {"image_size": batch["image_size"]} if "image_size" in batch else {}
        return {
            "scores": probabilities_BxQxC.max(axis=-1),
            "classes": probabilities_BxQxC.argmax(axis=-1).astype(jnp.int32),
            "boxes": boxes[-1],
        } | sizes

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """List the objects in one image, most confident first.

        Each has a "label", a "score" and a "box": left, top, right and bottom, in pixels of the original image where
        the output has its "image_size", else as shares.
        """
        height, width = (int(side) for side in output.get("image_size", (1, 1)))
        boxes = np.clip(np.asarray(corners(jnp.asarray(output["boxes"]))), 0, 1) * [width, height, width, height]
        return {
            "objects": [
                {
                    "label": self._name(int(output["classes"][i])),
                    "score": float(output["scores"][i]),
                    "box": [float(value) for value in boxes[i]],
                }
                for i in np.argsort(-output["scores"], kind="stable")
                if output["scores"][i] >= self.threshold
            ]
        }

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask for the class logits of the best queries: those above the threshold, three at most, or else the first.

        With a `target` they are the queries that say most likely that they see that class.
        """
        scores_Q, classes_Q = output["scores"], output["classes"]
        if target:
            names = self.label_names or tuple(str(i) for i in range(getattr(self.model, "num_outputs", 0)))
            if target not in names:
                raise UserError(f"--target: there is no class '{target}'{nearest(target, names)}")
            logits_QxC = np.asarray(self._outputs(params, batch, {})[0][-1, 0])
            scores_Q = np.asarray(jax.nn.softmax(logits_QxC))[:, names.index(target)]
            classes_Q = np.full_like(classes_Q, names.index(target))
        first: list[int] = np.argsort(-scores_Q, kind="stable")[:3].tolist()
        best = [i for i in first if scores_Q[i] >= self.threshold] or first[:1]
        return [
            Question(
                f"the logit of '{self._name(int(classes_Q[i]))}' of query {i}, whose score is {scores_Q[i]:.2f}",
                batch,
                INPUTS,
                _class_logit,
                {"query": i, "class": int(classes_Q[i])},
                position=i,
                box=tuple(np.clip(np.asarray(corners(jnp.asarray(output["boxes"][i]))), 0, 1).tolist()),
            )
            for i in best
        ]

    def _name(self, number: int) -> str:
        return self.label_names[number] if self.label_names else str(number)

    def _outputs(self, params: Params, batch: Batch, rngs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits, boxes = self.model.apply({"params": params}, *[batch.get(name) for name in INPUTS], rngs=rngs)
        return jnp.asarray(logits, jnp.float32), jnp.asarray(boxes, jnp.float32)

    def _means(self, params: Params, batch: Batch, rngs: dict[str, jax.Array]) -> dict[str, Mean]:
        logits, boxes = self._outputs(params, batch, rngs)
        layers = slice(None) if self.auxiliary else slice(-1, None)
        return self.set_loss(logits[layers], boxes[layers], batch)

    def set_loss(self, logits_LxBxQxC: jax.Array, boxes_LxBxQx4: jax.Array, batch: Batch) -> dict[str, Mean]:
        """Return what `metrics` does, for outputs of one or more layers; "loss" is the sum of theirs."""
        queries, none = logits_LxBxQxC.shape[2], logits_LxBxQxC.shape[3] - 1
        real_BxN = (batch["box_mask"] * batch["mask"][:, None]).astype(jnp.float32)
        # An unknown class has no probability, and makes the loss NaN rather than wrong.
        known_BxN = (batch["classes"] >= 0) & (batch["classes"] < none)
        classes_BxN = jnp.where(known_BxN, batch["classes"], none + 1)
        # What fills up is a box like any other, so that no gradient is NaN.
        targets_BxNx4 = jnp.where(real_BxN[..., None] != 0, batch["boxes"], 0.5)
        cost = self._cost(logits_LxBxQxC, boxes_LxBxQx4, classes_BxN, targets_BxNx4)
        matched_LxBxN = matching.assign(cost, real_BxN, self.mesh)

        chosen_LxBxNxQ = jax.nn.one_hot(matched_LxBxN, queries, dtype=jnp.int32)
        wanted_LxBxQ = none + jnp.einsum("LBNQ,BN->LBQ", chosen_LxBxNxQ, classes_BxN - none)
        weights_LxBxQ = jnp.where(wanted_LxBxQ == none, self.no_object_weight, 1.0) * batch["mask"][:, None]
        log_LxBxQxC = jax.nn.log_softmax(logits_LxBxQxC)
        losses_LxBxQ = -jnp.take_along_axis(log_LxBxQxC, wanted_LxBxQ[..., None], axis=-1, mode="fill")[..., 0]
        found_LxBxNx4 = jnp.take_along_axis(boxes_LxBxQx4, jnp.minimum(matched_LxBxN, queries - 1)[..., None], axis=2)

        def total(values_LxBxN: jax.Array, weights: jax.Array) -> jax.Array:
            return weighted(values_LxBxN, weights).sum((1, 2))

        sums = {
            "class_loss": total(losses_LxBxQ, weights_LxBxQ),
            "box_loss": total(jnp.abs(found_LxBxNx4 - targets_BxNx4).sum(axis=-1), real_BxN),
            "giou_loss": total(1 - generalised_iou(found_LxBxNx4, targets_BxNx4), real_BxN),
        }
        counts = {"class_loss": weights_LxBxQ[-1].sum(), "box_loss": real_BxN.sum(), "giou_loss": real_BxN.sum()}
        count = jnp.maximum(counts["box_loss"], 1.0)
        weights = {"class_loss": self.class_weight, "box_loss": self.box_weight, "giou_loss": self.giou_weight}
        tiny = jnp.finfo(jnp.float32).tiny
        loss = sum(weights[name] * sums[name].sum() / jnp.maximum(counts[name], tiny) for name in sums)
        means = {name: Mean(sums[name][-1], counts[name]) for name in sums}
        found_B = (logits_LxBxQxC[-1].argmax(axis=-1) != none).sum(axis=-1)
        means["cardinality_error"] = Mean.of(jnp.abs(found_B - real_BxN.sum(axis=-1)), batch["mask"])
        return {"loss": Mean(loss * count, count)} | means

    def _cost(self, logits: jax.Array, boxes: jax.Array, classes_BxN: jax.Array, targets_BxNx4: jax.Array) -> jax.Array:
        """Return what it costs that a query stands for an object, [L, B, Q, N]."""
        probabilities = jax.nn.softmax(logits)
        index = jnp.broadcast_to(classes_BxN[:, None], (*logits.shape[:3], classes_BxN.shape[1]))
        of_class = jnp.take_along_axis(probabilities, index, axis=-1, mode="fill")
        boxes, targets = boxes[..., None, :], targets_BxNx4[:, None]
        distances = jnp.abs(boxes - targets).sum(axis=-1)
        overlaps = generalised_iou(boxes, targets)
        return self.box_weight * distances - self.class_weight * of_class - self.giou_weight * overlaps


def _class_logit(model: nn.Module, inputs: Sequence[jax.Array | None], choice: Mapping[str, jax.Array]) -> jax.Array:
    """Return the logit that one query gives one class, float32 [B, 1]: see `Question.score`."""
    logits_LxBxQxC: Any = model(*inputs)[0]
    return logits_LxBxQxC[-1, :, choice["query"], choice["class"], None].astype(jnp.float32)


def corners(boxes: jax.Array) -> jax.Array:
    """Map boxes [..., 4] from centre (x, y), width and height to left, top, right and bottom."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def generalised_iou(one: jax.Array, other: jax.Array) -> jax.Array:
    """Return the generalised intersection over union (Rezatofighi 2019, algorithm 1), from -1 to 1, of two boxes.

    Args:
      one: boxes [..., 4]: centre (x, y), width and height.
      other: boxes of a shape that broadcasts against it.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    one_low, one_high = jnp.split(corners(one), 2, axis=-1)
    other_low, other_high = jnp.split(corners(other), 2, axis=-1)
    shared = _area(jnp.maximum(jnp.minimum(one_high, other_high) - jnp.maximum(one_low, other_low), 0))
    around = _area(jnp.maximum(one_high, other_high) - jnp.minimum(one_low, other_low))
    union = _area(one[..., 2:]) + _area(other[..., 2:]) - shared
    return shared / jnp.maximum(union, tiny) - (around - union) / jnp.maximum(around, tiny)


def _area(sizes: jax.Array) -> jax.Array:
    return sizes[..., 0] * sizes[..., 1]
