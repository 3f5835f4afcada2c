"""From one text to another, by an encoder-decoder: translation, summarisation, span corruption and prefix LM alike."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from research.data.tokenizer import Tokenizer
from research.generation.decoding import Decoding, token_ids
from research.generation.detokenizer import completion
from research.generation.sampling import generate
from research.metrics import Mean
from research.task import Batch, Params, Question, Spec
from research.tasks import tokens

INPUTS = (
    *("input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask"),
    *("positions", "decoder_positions"),
)


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """An encoder-decoder, the cross-entropy of the target's tokens, and the search for the likeliest target.

    The batch holds what INPUTS name, masks and positions where there are any, "targets", the token after each of
    "decoder_input_ids", and "target_mask", which of them count.

    Attributes:
      model: the Linen module, with methods `encode`, `decode`, `hidden` and `logits`; see `models.encoder_decoder`.
      label_smoothing: share of the probability spread evenly over the vocabulary, in training.
      z_loss: weight of the squared log-normaliser in training: see `cross_entropy.token_losses`.
      logits_chunk: positions of a row whose logits exist at once; 0 for all, None for as many as a device can hold.
      tokenizer: to put outputs in words.
      decoding: how `predict` searches.
    """

    model: nn.Module
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logits_chunk: int | None = None
    tokenizer: Tokenizer | None = None
    decoding: Decoding = dataclasses.field(default_factory=Decoding)

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; raise UserError if a feature is missing."""
        tokens.check(spec, ("input_ids", "decoder_input_ids", "targets", "target_mask"))
        return tokens.init(self.model, rng, spec, INPUTS)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean cross-entropy over the targets, in nats, with dropout, and the share predicted right."""
        means = self._score(params, batch, {"dropout": rng}, self.label_smoothing, self.z_loss)
        return means["loss"], {"accuracy": means["accuracy"]}

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return "loss", without dropout or smoothing, and "accuracy"."""
        return self._score(params, batch, {})

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the "tokens" int32 [B, N] that `decoding` finds; padding follows the end token."""
        return {"tokens": generate(self.model, params, batch, self.decoding, self.tokenizer, rng)}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one output as text."""
        return {"prediction": completion(self.tokenizer, output["tokens"], self.decoding.stop)}

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask for the log-likelihoods of what is written, or of the text `target`, token by token."""
        del params
        end_ids, pad_id = token_ids(self.tokenizer)
        if target:
            ids = [*tokens.encode_target(self.tokenizer, target), *end_ids[:1]]
        else:
            ids = [int(id) for id in output["tokens"]]
            ids = ids[: next((i + 1 for i, id in enumerate(ids) if id in end_ids), len(ids))]
        start = pad_id if self.decoding.decoder_start_id is None else self.decoding.decoder_start_id
        source: dict[str, Any] = {
            name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "positions")
        }
        written = {"decoder_input_ids": np.array([[start, *ids[:-1]]], np.int32)}
        if "positions" in source:
            written |= {"decoder_positions": np.arange(len(ids), dtype=np.int32)[None]}
        choice = {"positions": np.arange(len(ids)), "tokens": np.array(ids)}
        whole = "the log-likelihood of the text of --target" if target else "the log-likelihood of what is written"
        return [
            Question(
                whole,
                source | written,
                INPUTS,
                tokens.chosen_tokens,
                choice,
                parts=tuple(tokens.word(self.tokenizer, id) for id in ids),
                vocabulary="decoder/layers",
            )
        ]

    def _score(
        self,
        params: Params,
        batch: Batch,
        rngs: dict[str, jax.Array],
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> dict[str, Mean]:
        hidden_BxTxD = tokens.hidden(self.model, params, batch, INPUTS, rngs)
        return tokens.score(self.model, params, hidden_BxTxD, batch, label_smoothing, z_loss, self.logits_chunk)
