"""Token classification: a label for every word, such as the named entity that it belongs to."""

import dataclasses
from collections.abc import Mapping, Sequence
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

OUTSIDE = "O"


@dataclasses.dataclass(frozen=True)
class TokenClassification:
    """A model of (input_ids, attention_mask, token_type_ids) -> logits [B, T, C], trained by cross-entropy.

    Batches hold `targets` [B, T], classes, and `target_mask` [B, T], 1 where a target counts: the first token of every
    word (Devlin 2018, section 5.3), as `research.data.token_classification.AlignLabels` makes them.

    Attributes:
      model: the Linen module; its `num_outputs` is C.
      label_names: C names; taken from the training data where they are left out.
    """

    model: nn.Module
    label_names: tuple[str, ...] = ()

    def __post_init__(self):
        outputs, names = getattr(self.model, "num_outputs", None), len(self.label_names)
        if names and names != outputs:
            raise UserError(f"config.task.model.num_outputs: {outputs} outputs for {names} labels {self.label_names}")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters.

        Raises:
          UserError: a feature that the task needs is missing.
        """
        return encoders.init(self.model, spec, rng, ("targets", "target_mask"))

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean cross-entropy over words, with dropout, and the accuracy on the batch."""
        scores = self._scores(encoders.logits(self.model, params, batch, {"dropout": rng}), batch)
        return scores["loss"], {"accuracy": scores["accuracy"]}

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the loss, without dropout, and the accuracy, over words."""
        return self._scores(encoders.logits(self.model, params, batch, {}), batch)

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return "label" int32 [B, T] and "probability" float32 [B, T], that of the label."""
        del rng  # nothing is drawn
        probabilities_BxTxC = jax.nn.softmax(encoders.logits(self.model, params, batch, {}))
        return {"label": probabilities_BxTxC.argmax(axis=-1), "probability": probabilities_BxTxC.max(axis=-1)}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return the label of every token; `describe_rows` knows the words."""
        return {"labels": [self._name(int(label)) for label in output["label"]]}

    def describe_rows(
        self, rows: Sequence[Mapping[str, Any]], outputs: Sequence[dict[str, np.ndarray]]
    ) -> dict[str, Any]:
        """Put one example's prediction in words.

        Args:
          rows: the one row that `AlignLabels` made.
          outputs: what `predict` says of it.

        Returns:
          "labels", one a word, and "entities", each with "label", "text", and "start" and "end", the words from `start`
          to before `end`.
        """
        (row,), (output,) = rows, outputs
        labels = self.word_labels(row, output)
        entities = [
            {"label": kind, "text": " ".join(row["words"][start:end]), "start": start, "end": end}
            for kind, start, end in spans(labels)
        ]
        return {"labels": labels, "entities": entities}

    def word_labels(self, row: Mapping[str, Any], output: dict[str, np.ndarray]) -> list[str]:
        """Return the names of the labels of a row's words; words that have no token are outside of everything."""
        return [self._name(int(output["label"][token])) if token >= 0 else OUTSIDE for token in row["first_tokens"]]

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask for the logits of the labels of the first three entities' tokens, or of the label `target` at each."""
        del params
        names = self.label_names or tuple(str(i) for i in range(getattr(self.model, "num_outputs", 0)))
        if target and target not in names:
            raise UserError(f"--target: there is no label '{target}'{nearest(target, names)}")
        real_T = np.asarray(batch["target_mask"])[0] != 0
        places = np.flatnonzero(real_T & [self._name(int(label)) != OUTSIDE for label in output["label"]])
        places = places if len(places) else np.flatnonzero(real_T)
        found = []
        for place in places[:3].tolist():
            label = names.index(target) if target else int(output["label"][place])
            title = f"the logit of the label '{self._name(label)}' at token {place}"
            choice = {"position": place, "label": label}
            found.append(Question(title, batch, encoders.inputs(self.model), _logit, choice, position=place))
        if not found:
            raise UserError("it holds no word")
        return found

    def _name(self, label: int) -> str:
        return self.label_names[label] if self.label_names else str(label)

    def _scores(self, logits_BxTxC: jax.Array, batch: Batch) -> dict[str, Mean]:
        targets_BxT = batch["targets"]
        mask_BxT = batch["target_mask"].astype(jnp.float32) * batch["mask"][:, None]
        losses_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxC, targets_BxT)
        return {
            "loss": Mean.of(losses_BxT, mask_BxT),
            "accuracy": Mean.of(logits_BxTxC.argmax(axis=-1) == targets_BxT, mask_BxT),
        }


def _logit(model: nn.Module, inputs: Sequence[jax.Array | None], choice: Mapping[str, jax.Array]) -> jax.Array:
    """Return one label's logit at one token, float32 [B, 1]: see `Question.score`."""
    logits_BxTxC: Any = model(*inputs)
    return logits_BxTxC[:, choice["position"], choice["label"], None].astype(jnp.float32)


def spans(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the entities that the labels of consecutive words describe: (kind, first word, word after the last).

    Labels are "O", or a letter, a hyphen and a kind: B begins an entity, I goes on, E ends one, S is one by itself. As
    the CoNLL evaluation does, an entity also begins where an I or E follows something else than its kind.
    """
    found: list[tuple[str, int, int]] = []
    begin, previous, previous_kind = 0, OUTSIDE, ""
    for i, label in enumerate([*labels, OUTSIDE]):
        letter, _, kind = label.partition("-")
        goes_on = letter in ("I", "E") and previous in ("B", "I") and kind == previous_kind
        if previous != OUTSIDE and not goes_on:
            found.append((previous_kind, begin, i))
        if not goes_on:
            begin = i
        previous, previous_kind = letter, kind
    return found
