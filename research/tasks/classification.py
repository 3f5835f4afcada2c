"""Classification and regression of whole examples: one logit vector an example."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.errors import UserError, nearest
from research.metrics import Mean
from research.task import Batch, Params, Question, Spec
from research.tasks import encoders

OBJECTIVES = ("softmax", "sigmoid", "regression")


@dataclasses.dataclass(frozen=True)
class Classification:
    """A model of (input_ids, attention_mask, token_type_ids) -> logits [B, C], and an objective.

    Attributes:
      model: the Linen module; its `num_outputs` is C.
      objective: "softmax": one of C classes, cross-entropy, labels int [B]. "sigmoid": each of C labels on or off,
        binary cross-entropy, labels 0 or 1 [B, C] (or [B] where C is 1). "regression": squared error, labels float [B].
      label_smoothing: share of the probability spread evenly over the classes; "softmax" only.
      label_names: C names, for display; taken from the training data where they are left out.
    """

    model: nn.Module
    objective: str = "softmax"
    label_smoothing: float = 0.0
    label_names: tuple[str, ...] = ()

    def __post_init__(self):
        outputs = getattr(self.model, "num_outputs", None)
        if self.objective not in OBJECTIVES:
            raise UserError(f"config.task.objective: unknown '{self.objective}'{nearest(self.objective, OBJECTIVES)}")
        if self.label_smoothing and self.objective != "softmax":
            raise UserError("config.task.label_smoothing: only objective 'softmax' smooths labels")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"config.task.label_smoothing: {self.label_smoothing} must lie in [0, 1)")
        names = len(self.label_names)
        binary = self.objective == "sigmoid" and outputs == 1 and names == 2
        if names and self.objective != "regression" and names != outputs and not binary:
            raise UserError(f"config.task.model.num_outputs: {outputs} outputs for {names} labels {self.label_names}")
        if self.objective == "softmax" and outputs is not None and outputs < 2:
            raise UserError("config.task.model.num_outputs: 'softmax' needs 2 or more; use objective 'sigmoid' for 1")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters.

        Raises:
          UserError: the features are not those that the model and the objective need.
        """
        params = encoders.init(self.model, spec, rng, ("label",))
        self._check(spec)
        return params

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean loss over real examples, with dropout, and the accuracy on the batch."""
        logits_BxC = encoders.logits(self.model, params, batch, {"dropout": rng})
        return self._loss(logits_BxC, batch, self.label_smoothing), self._scores(logits_BxC, batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the loss, without dropout or smoothing, and the accuracy."""
        logits_BxC = encoders.logits(self.model, params, batch, {})
        return {"loss": self._loss(logits_BxC, batch, 0.0)} | self._scores(logits_BxC, batch)

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return "logits" [B, C] and, but for regression, "probabilities" [B, C] and "label" (int, as in the data)."""
        del rng  # nothing is drawn
        logits_BxC = encoders.logits(self.model, params, batch, {})
        if self.objective == "regression":
            return {"logits": logits_BxC}
        if self.objective == "softmax":
            return {
                "logits": logits_BxC,
                "probabilities": jax.nn.softmax(logits_BxC),
                "label": logits_BxC.argmax(axis=-1),
            }
        on_BxC = (logits_BxC > 0).astype(jnp.int32)
        label = on_BxC[:, 0] if logits_BxC.shape[-1] == 1 else on_BxC
        return {"logits": logits_BxC, "probabilities": jax.nn.sigmoid(logits_BxC), "label": label}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Put one example's prediction in words: its label and every label's probability, or the predicted value."""
        if self.objective == "regression":
            values = [float(x) for x in output["logits"]]
            return {"value": values if len(values) > 1 else values[0]}
        probabilities = [float(p) for p in output["probabilities"]]
        if self.objective == "sigmoid" and len(probabilities) == 1:
            probabilities = [1 - probabilities[0], probabilities[0]]
        names = self.label_names or tuple(str(i) for i in range(len(probabilities)))
        if np.ndim(output["label"]):
            label: Any = [name for name, on in zip(names, output["label"]) if on]
        else:
            label = names[int(output["label"])]
        return {"label": label, "probabilities": dict(zip(names, probabilities))}

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask for the logit of the likeliest class, or of the one that `target` names, or for the predicted value."""
        del params
        names = self.label_names or tuple(str(i) for i in range(len(output["logits"])))
        if self.objective == "sigmoid" and len(output["logits"]) == 1:
            names = names[-1:]  # the logit is that of the second of two classes
        if target and target not in names:
            raise UserError(f"--target: there is no class '{target}'{nearest(target, names)}")
        chosen = names.index(target) if target else int(np.argmax(output["logits"]))
        what = "the predicted value" if self.objective == "regression" else "the logit of the class"
        title = what if self.objective == "regression" and len(names) == 1 else f"{what} '{names[chosen]}'"
        position = encoders.position(self.model)
        return [Question(title, batch, encoders.inputs(self.model), encoders.output, chosen, position=position)]

    def _loss(self, logits_BxC: jax.Array, batch: Batch, smoothing: float) -> Mean:
        labels, mask = self._labels(logits_BxC, batch), batch["mask"]
        if self.objective == "softmax":
            classes = logits_BxC.shape[-1]
            targets_BxC = optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)
            losses_B = optax.softmax_cross_entropy(logits_BxC, targets_BxC)
            # An unknown class makes the loss NaN rather than wrong: its one-hot vector is zero, and so were its loss.
            return Mean.of(jnp.where((labels >= 0) & (labels < classes), losses_B, jnp.nan), mask)
        each = optax.sigmoid_binary_cross_entropy if self.objective == "sigmoid" else optax.squared_error
        return Mean.of(each(logits_BxC, labels).mean(axis=-1), mask)

    def _scores(self, logits_BxC: jax.Array, batch: Batch) -> dict[str, Mean]:
        labels, mask = self._labels(logits_BxC, batch), batch["mask"]
        scores: dict[str, Callable[[], jax.Array]] = {
            "softmax": lambda: logits_BxC.argmax(axis=-1) == labels,
            "sigmoid": lambda: ((logits_BxC > 0) == (labels > 0.5)).astype(jnp.float32).mean(axis=-1),
        }
        return {"accuracy": Mean.of(scores[self.objective](), mask)} if self.objective in scores else {}

    def _labels(self, logits_BxC: jax.Array, batch: Batch) -> jax.Array:
        """Return int [B] for softmax, else float [B, C]."""
        labels = batch["label"]
        return labels if self.objective == "softmax" else labels.reshape(logits_BxC.shape).astype(jnp.float32)

    def _check(self, spec: Spec) -> None:
        """Raise UserError unless the labels have the objective's shape and type."""
        label, outputs = spec["label"], getattr(self.model, "num_outputs", None)
        integers = jnp.issubdtype(label.dtype, jnp.integer)
        found = f"{label.dtype} {'[B, C]' if label.ndim == 2 else '[B]'}"
        if self.objective == "softmax" and not (integers and label.ndim == 1):
            wanted = "class numbers, integers [B]"
        elif self.objective != "softmax" and label.shape[1:] not in [(outputs,)] + [()] * (outputs == 1):
            wanted = f"{outputs} numbers an example (config.task.model.num_outputs)"
        else:
            return
        raise UserError(f"config.task.objective: '{self.objective}' takes {wanted}; the labels are {found}")
