"""Knowledge distillation of language models: a student learns a teacher's distribution over the next token.

Shape letters: B rows, T positions, D width, V vocabulary.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError, nearest
from research.metrics import Mean, weighted
from research.task import Batch, Params, Spec
from research.tasks import tokens
from research.tasks.causal_lm import INPUTS, CausalLM
from research.tasks.cross_entropy import in_blocks, token_losses

DIVERGENCES = ("forward", "reverse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelDistillation(CausalLM):
    """Causal language modelling in which a teacher of the same vocabulary says how likely every token is.

    The teacher's parameters stand under "teacher": `config.init` brings them, see `pretrained.teacher.load_params`, and
    `config.optimizer.freeze` keeps them as they are.

    Attributes:
      teacher: a model with methods `hidden` and `logits`, as the student is.
      divergence: "forward", KL(teacher || student), which covers all that the teacher finds likely (Hinton 2015), or
        "reverse", KL(student || teacher), which keeps to what it finds likeliest (Gu 2024). Both are over the tokens
        of the batch, and not over what the student writes itself.
      temperature: both models' logits are divided by it, and the divergence is multiplied by its square, so that
        gradients keep their size.
      teacher_share: of the divergence in the loss; the rest is the cross-entropy of the targets.
    """

    teacher: nn.Module
    divergence: str = "forward"
    temperature: float = 1.0
    teacher_share: float = 1.0

    borrowed: ClassVar[tuple[str, ...]] = ("^teacher/",)

    def __post_init__(self):
        if self.divergence not in DIVERGENCES:
            raise UserError(f"config.task.divergence: no '{self.divergence}'{nearest(self.divergence, DIVERGENCES)}")
        if self.temperature <= 0:
            raise UserError(f"config.task.temperature: {self.temperature} is not greater than 0")
        if not 0 <= self.teacher_share <= 1:
            raise UserError(f"config.task.teacher_share: {self.teacher_share} must lie in [0, 1]")
        theirs, ours = (getattr(model, "vocab_size", None) for model in (self.teacher, self.model))
        if theirs != ours:
            raise UserError(f"config.task.teacher: it knows {theirs} tokens, the model {ours}")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters; those under "teacher" are of no use until they are replaced."""
        return {**super().init(rng, spec), "teacher": tokens.init(self.teacher, rng, spec, INPUTS)}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean loss over the targets, in nats, with dropout, and the metrics; see `metrics`."""
        means = self._distil(params, batch, {"dropout": rng}, self.z_loss)
        return means.pop("loss"), means

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return means over the targets: "loss", its "divergence" and "cross_entropy", in nats, and "accuracy"."""
        return self._distil(params, batch, {})

    def _distil(self, params: Params, batch: Batch, rngs: dict[str, jax.Array], z_loss: float = 0.0) -> dict[str, Mean]:
        hidden_BxTxD = tokens.hidden(self.model, params, batch, INPUTS, rngs)
        teacher = jax.lax.stop_gradient(params["teacher"])
        said_BxTxD = jax.lax.stop_gradient(tokens.hidden(self.teacher, teacher, batch, INPUTS, {}))

        def sums(
            params: Params, hidden: jax.Array, said: jax.Array, targets: jax.Array, weights: jax.Array
        ) -> tuple[jax.Array, ...]:
            logits = tokens.logits(self.model, params, hidden)
            divergences = self._divergence(logits, tokens.logits(self.teacher, teacher, said))
            losses, correct = token_losses(logits, targets, 0.0, z_loss)
            mixed = self.teacher_share * divergences + (1 - self.teacher_share) * losses
            parts = (mixed, divergences, losses, correct)
            return tuple(weighted(x, weights).sum() for x in parts)

        weights_BxT = batch["target_mask"] * batch["mask"][:, None]
        block = tokens.block(self.model, params, hidden_BxTxD, self.logits_chunk)
        totals = in_blocks(sums, block, params, hidden_BxTxD, said_BxTxD, batch["targets"], weights_BxT)
        names = ("loss", "divergence", "cross_entropy", "accuracy")
        return {name: Mean(total, weights_BxT.sum()) for name, total in zip(names, totals)}

    def _divergence(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """Return the divergence float32 [...] of logits [..., V], in nats."""
        ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / self.temperature) for x in (student, teacher))
        first, second = (theirs, ours) if self.divergence == "forward" else (ours, theirs)
        return self.temperature**2 * (jnp.exp(first) * (first - second)).sum(axis=-1)
