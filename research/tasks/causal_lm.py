"""Causal language modelling: predict each token from those before it; pretraining and instruction tuning alike."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from research.data.tokenizer import Tokenizer
from research.generation.decoding import Decoding
from research.generation.detokenizer import completion
from research.generation.sampling import generate
from research.metrics import Mean
from research.task import Batch, Params, Question, Spec
from research.tasks import tokens

INPUTS = ("input_ids", "attention_mask", "positions")


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """A model of (input_ids, attention_mask, positions) -> hidden states -> logits [B, T, V], and its cross-entropy.

    The batch holds "targets", the token after each, and "target_mask", which of them count: all in pretraining, the
    answers in instruction tuning.

    Attributes:
      model: the Linen module, with methods `hidden` and `logits`; see `models.gpt`.
      z_loss: weight of the squared log-normaliser in training: see `cross_entropy.token_losses`.
      logits_chunk: positions of a row whose logits exist at once; 0 for all, None for as many as a device can hold.
      tokenizer: to put outputs in words.
      decoding: how `predict` continues a text.
    """

    model: nn.Module
    z_loss: float = 0.0
    logits_chunk: int | None = None
    tokenizer: Tokenizer | None = None
    decoding: Decoding = dataclasses.field(default_factory=Decoding)

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; raise UserError if a feature is missing or rows are too long."""
        learned = getattr(self.model, "positions", None) == "learned"
        tokens.check(spec, ("input_ids", "targets", "target_mask"), self.model.max_positions if learned else None)
        return tokens.init(self.model, rng, spec, INPUTS)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean cross-entropy over the targets, in nats, with dropout, and the share predicted right."""
        means = self._score(params, batch, {"dropout": rng}, self.z_loss)
        return means["loss"], {"accuracy": means["accuracy"]}

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return "loss", "accuracy" and, where the batch has "target_bytes", "bits_per_byte"."""
        return self._score(params, batch, {})

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the "log_likelihood" of each row's targets, in nats, and how many there are, "targets".

        Of a batch without targets, questions, it returns the "tokens" int32 [B, N] that go on; padding follows the end.
        """
        if "targets" not in batch:
            return {"tokens": generate(self.model, params, batch, self.decoding, self.tokenizer, rng)}
        hidden_BxTxD = tokens.hidden(self.model, params, batch, INPUTS, {})
        likelihood_B = tokens.log_likelihoods(self.model, params, hidden_BxTxD, batch, self.logits_chunk)
        return {"log_likelihood": likelihood_B, "targets": batch["target_mask"].sum(axis=1)}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one text's log-likelihood, in nats, its number of tokens and its perplexity; or its continuation."""
        if "tokens" in output:
            return {"prediction": completion(self.tokenizer, output["tokens"], self.decoding.stop)}
        likelihood, count = float(output["log_likelihood"]), float(output["targets"])
        perplexity = float(np.exp(-likelihood / count)) if count else None
        return {"log_likelihood": likelihood, "tokens": int(count), "perplexity": perplexity}

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask for the log-likelihood of the token that is likeliest to follow, or of the one that `target` names."""
        del output
        ids_BxT = batch["input_ids"]
        real_T = np.asarray(batch.get("attention_mask", np.ones_like(ids_BxT)))[0] != 0
        position = int(np.flatnonzero(real_T)[-1])
        if target:
            chosen = tokens.one_token(self.tokenizer, target)
        else:
            hidden_BxTxD = tokens.hidden(self.model, params, batch, INPUTS, {})
            chosen = int(tokens.logits(self.model, params, hidden_BxTxD[:, position])[0].argmax())
        choice = {"positions": np.array([position]), "tokens": np.array([chosen])}
        title = f"the log-likelihood of {tokens.word(self.tokenizer, chosen)!r} as the next token"
        return [Question(title, batch, INPUTS, tokens.chosen_tokens, choice, position=position, vocabulary="layers")]

    def _score(self, params: Params, batch: Batch, rngs: dict[str, jax.Array], z_loss: float = 0.0) -> dict[str, Mean]:
        hidden_BxTxD = tokens.hidden(self.model, params, batch, INPUTS, rngs)
        return tokens.score(self.model, params, hidden_BxTxD, batch, z_loss=z_loss, chunk=self.logits_chunk)
