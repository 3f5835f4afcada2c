"""Preference tuning of a language model: DPO, IPO, KTO, ORPO and SimPO on pairs of answers.

Shape letters: B pairs, S the two sides (chosen, rejected), T positions, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research import sharding
from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest
from research.generation.decoding import Decoding
from research.metrics import Mean
from research.task import Batch, Params, Question, Spec
from research.tasks import tokens
from research.tasks.causal_lm import INPUTS, CausalLM

OBJECTIVES = ("dpo", "ipo", "kto", "orpo", "simpo")
COMPARED = ("dpo", "ipo", "kto")  # with a reference
ALONE = ("dpo", "ipo")  # of these, those that compare a pair's own answers alone
LIKELIHOODS = ("reference_likelihood", "rejected_reference_likelihood")
FEATURES = ("input_ids", "targets", "target_mask")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Preferences:
    """A causal language model that learns which of two answers is preferred.

    The batch holds a `CausalLM`'s features of the prompt with the chosen answer, and the same, with "rejected_" before
    their names, of the rejected one; see `data.preferences.PreferenceTokens`. DPO, IPO and KTO compare the model with
    its reference, what it was when training began: parameters under "reference", which `config.optimizer.freeze` keeps;
    or, with `precompute_reference`, features float32 [B] of the batch: "reference_likelihood", the sum over the chosen
    answer's tokens in nats, and "rejected_reference_likelihood".

    Losses and rewards are those of TRL 1.16, means over pairs, where ORPO's likelihood term is of the chosen answer's
    tokens, averaged by answer, as its paper has it.

    Attributes:
      model: see `CausalLM`.
      objective: "dpo" (Rafailov 2023), "ipo" (Azar 2023, on means over tokens), "kto" (Ethayarajh 2024, each pair as
        one desirable and one undesirable example), "orpo" (Hong 2024) or "simpo" (Meng 2024).
      beta: how strongly the reference holds in dpo, ipo (tau) and kto; the weight of the odds ratio in orpo; the scale
        of the mean log-likelihood in simpo, where it is usually 2 or more.
      target_margin: of simpo (gamma): the reward that the chosen answer must be ahead by.
      chosen_weight: of kto: what losses of chosen answers are multiplied by.
      rejected_weight: alike.
      reference_dtype: what the reference is held in; bfloat16 takes half of the memory.
      precompute_reference: of dpo and ipo: compute the reference's log-likelihoods once, before training, and hold no
        reference. A step saves its forward pass. Rewards that are 0 before training are so to rounding then, as the two
        log-likelihoods come from two programs.
      logits_chunk: see `CausalLM`.
      tokenizer: alike.
      decoding: alike.
    """

    precomputed_title: ClassVar[str] = "the reference's likelihoods"

    model: nn.Module
    objective: str = "dpo"
    beta: float = 0.1
    target_margin: float = 0.5
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0
    reference_dtype: str = "float32"
    precompute_reference: bool = False
    logits_chunk: int | None = None
    tokenizer: Tokenizer | None = None
    decoding: Decoding = dataclasses.field(default_factory=Decoding)

    def __post_init__(self):
        for name, known in (("objective", OBJECTIVES), ("reference_dtype", DTYPES)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"config.task.{name}: no '{value}'{nearest(value, known)}")
        if self.beta <= 0:
            raise UserError(f"config.task.beta: {self.beta} is not greater than 0")
        if self.precompute_reference:
            self._check_precomputed()

    def _check_precomputed(self) -> None:
        """Raise UserError where the reference's log-likelihoods of the pairs are not all that is asked of it."""
        if self.objective not in ALONE:
            why = "asks its reference about other pairs' answers" if self.objective in COMPARED else "has no reference"
            raise UserError(f"config.task.precompute_reference: {self.objective} {why}; dpo and ipo take it")
        if self.reference_dtype != "float32":
            raise UserError(
                "config.task.precompute_reference: no reference is held; leave out config.task.reference_dtype"
            )

    @property
    def _holds(self) -> bool:
        """Whether the reference is held as parameters."""
        return self.objective in COMPARED and not self.precompute_reference

    @property
    def fixed(self) -> tuple[str, ...]:
        """The paths of the reference, if one is held."""
        return ("^reference/",) if self._holds else ()

    @property
    def precomputed(self) -> tuple[str, ...]:
        """The features of the batch that hold the reference's log-likelihoods, if it is not held itself."""
        return LIKELIHOODS if self.precompute_reference else ()

    def precompute(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Return the log-likelihoods float32 [B] of both answers by the reference's parameters; none of questions."""
        if "targets" not in batch:
            return {}
        likelihood_BxS = self._likelihoods(params, self._rows(batch), {})
        return {name: likelihood_BxS[:, side] for side, name in enumerate(LIKELIHOODS)}

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters of the model; raise UserError where rows are packed or too long."""
        if "positions" in spec:
            raise UserError("config.data.pack: pairs are not packed; leave it out, and 'positions' of the features")
        return self._language_model.init(rng, spec)

    def start(self, params: Params) -> Params:
        """Return the parameters with the reference, a copy of them, if one is held."""
        if not self._holds:
            return params
        return {**params, "reference": jax.tree.map(lambda x: jnp.array(x, self.reference_dtype), dict(params))}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean loss over the pairs, with dropout, and the metrics; see `metrics`."""
        means = self._score(params, batch, {"dropout": rng})
        return means.pop("loss"), means

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return means over the pairs.

        "loss"; "accuracy", the share whose chosen answer has the greater reward, equal ones counting as half;
        "margin", by how much; "chosen_reward" and "rejected_reward"; and "likelier", the share whose chosen answer is
        the likelier one by its mean over tokens, without regard to the reference.
        """
        return self._score(params, batch, {})

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return "chosen_reward" and "rejected_reward" [B]; of questions what `CausalLM` says."""
        if "targets" not in batch:
            return self._language_model.predict(params, batch, rng)
        rows = self._rows(batch)
        _, rewards_BxS = self._compare(params, batch, rows, self._likelihoods(params, rows, {}))
        return {"chosen_reward": rewards_BxS[:, 0], "rejected_reward": rewards_BxS[:, 1]}

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return both rewards of a pair and which answer is "preferred"; or a question's continuation."""
        if "tokens" in output:
            return self._language_model.describe(output)
        rewards = {name: float(value) for name, value in output.items()}
        return rewards | {"preferred": max(rewards, key=rewards.__getitem__).removesuffix("_reward")}

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask what `CausalLM` asks, after the chosen answer of a pair, or after a question."""
        return self._language_model.questions(params, batch, output, target)

    @property
    def _language_model(self) -> CausalLM:
        return CausalLM(self.model, 0.0, self.logits_chunk, self.tokenizer, self.decoding)

    def _score(self, params: Params, batch: Batch, rngs: dict[str, jax.Array]) -> dict[str, Mean]:
        rows, mask_B = self._rows(batch), batch["mask"]
        likelihood_BxS = self._likelihoods(params, rows, rngs)
        losses_B, rewards_BxS = self._compare(params, batch, rows, likelihood_BxS)
        margin_B = rewards_BxS[:, 0] - rewards_BxS[:, 1]
        mean_BxS = likelihood_BxS / _counts(rows)
        values = {
            "loss": losses_B,
            "accuracy": _ahead(margin_B),
            "margin": margin_B,
            "chosen_reward": rewards_BxS[:, 0],
            "rejected_reward": rewards_BxS[:, 1],
            "likelier": _ahead(mean_BxS[:, 0] - mean_BxS[:, 1]),
        }
        return {name: Mean.of(value, mask_B) for name, value in values.items()}

    def _rows(self, batch: Batch) -> Batch:
        """Return the features of both sides as rows [B * S, T], so that pairs stay on their devices."""
        sides = {name: f"rejected_{name}" for name in (*FEATURES, "attention_mask") if name in batch}
        tokens.check(batch, [*FEATURES, *sides.values()])
        both = {name: jnp.stack([batch[name], batch[other]], 1) for name, other in sides.items()}
        return {name: sharding.constrain(x.reshape(-1, x.shape[-1]), "batch") for name, x in both.items()}

    def _likelihoods(self, params: Params, rows: Batch, rngs: dict[str, jax.Array]) -> jax.Array:
        """Return the log-likelihoods float32 [B, S] of the answers, in nats."""
        hidden = tokens.hidden(self.model, params, rows, INPUTS, rngs)
        return tokens.log_likelihoods(self.model, params, hidden, rows, self.logits_chunk).reshape(-1, 2)

    def _compare(
        self, params: Params, batch: Batch, rows: Batch, likelihood_BxS: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the losses [B] and the rewards [B, S] of the log-likelihoods of the answers, `rows`, of a batch."""
        counts_BxS = _counts(rows)
        if self.objective == "orpo":
            return orpo(likelihood_BxS / counts_BxS, self.beta)
        if self.objective == "simpo":
            return simpo(likelihood_BxS / counts_BxS, self.beta, self.target_margin)
        ratio_BxS = likelihood_BxS - self._reference(params, batch, rows)
        if self.objective == "dpo":
            return dpo(ratio_BxS, self.beta)
        if self.objective == "ipo":
            return ipo(ratio_BxS, counts_BxS, self.beta)
        divergence = self._divergence(params, rows, batch["mask"])
        return kto(ratio_BxS, divergence, self.beta, (self.chosen_weight, self.rejected_weight))

    def _reference(self, params: Params, batch: Batch, rows: Batch) -> jax.Array:
        """Return the reference's log-likelihoods float32 [B, S] of the answers."""
        if self._holds:
            return self._likelihoods(jax.lax.stop_gradient(params["reference"]), rows, {})
        tokens.check(batch, LIKELIHOODS)
        return jnp.stack([batch[name] for name in LIKELIHOODS], axis=1)

    def _divergence(self, params: Params, rows: Batch, mask_B: jax.Array) -> jax.Array:
        """Return KTO's estimate of the divergence from the reference: of prompts with other prompts' answers."""
        if mask_B.shape[0] < 2:
            raise UserError("config.batch_size: kto compares a prompt with other answers; it needs 2 pairs or more")
        params = jax.lax.stop_gradient(params)
        others = mismatched(rows, jnp.repeat(mask_B, 2))
        ratio_BxS = self._likelihoods(params, others, {}) - self._likelihoods(params["reference"], others, {})
        return jnp.maximum(Mean.of(ratio_BxS.mean(axis=1), mask_B).total / jnp.maximum(mask_B.sum(), 1.0), 0.0)


def dpo(ratio_BxS: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Return losses [B] and rewards [B, S]; `ratio_BxS` is log p - log p of the reference (Rafailov 2023, eq. 7)."""
    rewards_BxS = beta * ratio_BxS
    return -jax.nn.log_sigmoid(rewards_BxS[:, 0] - rewards_BxS[:, 1]), rewards_BxS


def ipo(ratio_BxS: jax.Array, counts_BxS: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Return losses and rewards (Azar 2023, eq. 17), with log-ratios averaged over the answers' tokens."""
    mean_BxS = ratio_BxS / counts_BxS
    return jnp.square(mean_BxS[:, 0] - mean_BxS[:, 1] - 1 / (2 * beta)), beta * ratio_BxS


def kto(
    ratio_BxS: jax.Array, divergence: jax.Array, beta: float, weights: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """Return losses and rewards (Ethayarajh 2024, eq. 8): each pair's is the mean of its two answers'."""
    gain_BxS = beta * (ratio_BxS - divergence) * jnp.array([1.0, -1.0])
    losses_BxS = jnp.array(weights) * (1 - jax.nn.sigmoid(gain_BxS))
    return losses_BxS.mean(axis=1), beta * ratio_BxS


def orpo(mean_BxS: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Return losses and rewards (Hong 2024, eq. 6) of log-likelihoods averaged over tokens."""
    odds_BxS = mean_BxS - _log_complement(mean_BxS)
    ratio_B = jax.nn.log_sigmoid(odds_BxS[:, 0] - odds_BxS[:, 1])
    return -mean_BxS[:, 0] - beta * ratio_B, beta * mean_BxS


def simpo(mean_BxS: jax.Array, beta: float, target_margin: float) -> tuple[jax.Array, jax.Array]:
    """Return losses and rewards (Meng 2024, eq. 6) of log-likelihoods averaged over tokens."""
    rewards_BxS = beta * mean_BxS
    return -jax.nn.log_sigmoid(rewards_BxS[:, 0] - rewards_BxS[:, 1] - target_margin), rewards_BxS


def _log_complement(x: jax.Array) -> jax.Array:
    """Return log(1 - exp(x)) of x < 0, without loss of digits at either end."""
    x, middle = jnp.minimum(x, -1e-6), -float(np.log(2))
    small = jnp.log1p(-jnp.exp(jnp.minimum(x, middle)))
    return jnp.where(x < middle, small, jnp.log(-jnp.expm1(jnp.maximum(x, middle))))


def mismatched(rows: Batch, mask: jax.Array) -> dict[str, jax.Array]:
    """Return rows [B * S, T] with their own prompts and the answers, of the same side, of the pairs before them.

    What follows the first token that counts is the answer. A pair keeps its own where that before it is padding.
    """
    real = jnp.roll(mask, 2)[:, None] != 0
    other = {name: jnp.where(real, jnp.roll(x, 2, axis=0), x) for name, x in rows.items()}
    begin, their_begin = (jnp.argmax(x["target_mask"] != 0, axis=1)[:, None] for x in (rows, other))
    length = rows["targets"].shape[1]
    target = jnp.arange(length)[None]  # position t of the inputs is position t - 1 of the targets
    theirs = target - begin + their_begin

    def at(name: str, index: jax.Array) -> jax.Array:
        value = jnp.take_along_axis(other[name], jnp.clip(index, 0, length - 1), 1)
        return jnp.where(index < length, value, 0)

    made = {
        "input_ids": jnp.where(target <= begin, rows["input_ids"], at("input_ids", theirs)),
        "targets": jnp.where(target < begin, rows["targets"], at("targets", theirs)),
        "target_mask": jnp.where(target < begin, 0, at("target_mask", theirs)),
    }
    if "attention_mask" in rows:
        made["attention_mask"] = jnp.where(target <= begin, rows["attention_mask"], at("attention_mask", theirs))
    return made


def _counts(rows: Batch) -> jax.Array:
    """Return how many tokens each answer has, at least 1, float32 [B, S]."""
    return jnp.maximum(rows["target_mask"].sum(axis=1), 1.0).reshape(-1, 2)


def _ahead(margin_B: jax.Array) -> jax.Array:
    return jnp.where(margin_B == 0, 0.5, (margin_B > 0).astype(jnp.float32))
