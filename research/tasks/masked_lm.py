"""Masked language modelling: predict the tokens that were hidden in a text (Devlin 2018, section 3.1)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.metrics import Mean
from research.task import Batch, Params, Question, Spec
from research.tasks import encoders, tokens

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "positions")


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """A model of (input_ids, attention_mask, token_type_ids, positions) -> hidden states -> logits [B, T, V].

    The batch holds "targets", the original tokens, and "target_mask", which of them were chosen to be predicted.

    Attributes:
      model: the Linen module, with methods `hidden` and `logits`; see `models.bert.MaskedLM`.
      max_predictions: chosen tokens of a row that count, at most; logits are computed for no others, which saves most
        of the output layer's work. None counts all, and computes logits everywhere.
      tokenizer: to put predictions in words.
    """

    model: nn.Module
    max_predictions: int | None = None
    tokenizer: Tokenizer | None = None

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; raise UserError if a feature is missing or rows are too long."""
        tokens.check(spec, ("input_ids", "targets", "target_mask"))
        encoders.check_length(self.model, spec)
        return tokens.init(self.model, rng, spec, INPUTS)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean cross-entropy over the chosen tokens, in nats, with dropout, and the share that is right."""
        means = self._score(params, batch, {"dropout": rng})
        return means["loss"], {"accuracy": means["accuracy"]}

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return "loss" and "accuracy"."""
        return self._score(params, batch, {})

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the five likeliest tokens everywhere, "tokens" int [B, T, 5], and their "probabilities".

        "chosen" [B, T] says where one was asked for.
        """
        del rng  # nothing is drawn
        hidden_BxTxD = tokens.hidden(self.model, params, batch, INPUTS, {})
        logits_BxTxV = tokens.logits(self.model, params, hidden_BxTxD)
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(logits_BxTxV), 5)
        return {"tokens": ids, "probabilities": probabilities, "chosen": batch["target_mask"]}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return for each chosen place of one text the likeliest tokens and their probabilities."""
        masks = []
        for place in np.flatnonzero(output["chosen"]):
            words = [self._word(int(id)) for id in output["tokens"][place]]
            masks.append(dict(zip(words, map(float, output["probabilities"][place]))))
        return {"masks": masks}

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask at each chosen place, three at most, for the log-likelihood of the best token, or of the target's."""
        del params
        found = []
        for place in np.flatnonzero(output["chosen"])[:3]:
            chosen = tokens.one_token(self.tokenizer, target) if target else int(output["tokens"][place, 0])
            choice = {"positions": np.array([place]), "tokens": np.array([chosen])}
            title = f"the log-likelihood of {self._word(chosen)!r} at token {place}"
            found.append(
                Question(
                    title,
                    batch,
                    INPUTS,
                    tokens.chosen_tokens,
                    choice,
                    position=int(place),
                    vocabulary="encoder/layers",
                )
            )
        if not found:
            raise UserError("no token of it is hidden; put the mask token where one is to be predicted")
        return found

    def _score(self, params: Params, batch: Batch, rngs: dict[str, jax.Array]) -> dict[str, Mean]:
        hidden_BxTxD = tokens.hidden(self.model, params, batch, INPUTS, rngs)
        return tokens.score(self.model, params, hidden_BxTxD, batch, most=self.max_predictions)

    def _word(self, id: int) -> str:
        return str(id) if self.tokenizer is None else self.tokenizer.decode([id], skip_special=False)
