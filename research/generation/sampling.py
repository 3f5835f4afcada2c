"""Autoregressive text generation: greedy decoding and sampling.

Shape letters as in `decoding`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.data.tokenizer import Tokenizer
from research.generation.beam_search import beam_search
from research.generation.decoding import (
    Decoding,
    advance,
    ends,
    pad,
    penalise,
    prefill,
    room,
    seen_tokens,
    token_ids,
    unstack,
)
from research.task import Batch, Params


def generate(
    model: nn.Module,
    params: Params,
    batch: Batch,
    decoding: Decoding,
    tokenizer: Tokenizer | None = None,
    rng: jax.Array | None = None,
    rows_B: jax.Array | None = None,
) -> jax.Array:
    """Return the tokens int32 [B, N] generated after prompts, or by an encoder-decoder from its inputs. Pure.

    Args:
      model: a decoder such as `gpt.Decoder`, or an encoder-decoder, which has a method `encode`.
      params: of the model, stacked or as `unstack` returns them.
      batch: "input_ids" int [B, T] and, where there is padding, "attention_mask", which is 0 at it. The prompts of a
        decoder may be padded on either side.
      decoding: the settings; `stop` is applied by `detokenizer.completion`.
      tokenizer: gives the end and padding tokens; without it there is no end token, and padding is 0.
      rng: the key for sampling.
      rows_B: int [B]. A sample is a function of `rng`, this number and the prompt; by default 0, 1, ...

    Returns:
      the end token, where there is one, is followed by padding; so is the last token that the model, if its positions
      are learned, has one for.
    """
    if decoding.num_beams > 1:
        return beam_search(model, params, batch, decoding, tokenizer)[0][:, 0]
    params = unstack(params)
    sampler = Sampler(model, decoding, *token_ids(tokenizer))
    count = batch["input_ids"].shape[0]
    token_B, carry = sampler.start(params, batch, row_keys(rng, jnp.arange(count) if rows_B is None else rows_B))
    tokens_BxN = jnp.full((count, decoding.max_new_tokens), sampler.pad_id, jnp.int32).at[:, 0].set(token_B)

    def unfinished(loop: tuple[Any, ...]) -> jax.Array:
        i, _, _, carry = loop
        return (i < decoding.max_new_tokens) & ~carry["finished"].all()

    def step(loop: tuple[Any, ...]) -> tuple[Any, ...]:
        i, token_B, tokens_BxN, carry = loop
        token_B, carry = sampler.step(params, token_B, carry)
        return i + 1, token_B, tokens_BxN.at[:, i].set(token_B), carry

    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), token_B, tokens_BxN, carry))[2]


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Chooses tokens for B independent rows; its methods are pure.

    Attributes:
      model: see `generate`.
      decoding: the settings.
      end_ids: the tokens that end an output.
      pad_id: the token that follows them.
    """

    model: nn.Module
    decoding: Decoding
    end_ids: tuple[int, ...]
    pad_id: int

    def start(self, params: Params, batch: Batch, keys_B: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Return the first tokens int32 [B], and the state for `step`; `keys_B` are those of `row_keys`."""
        logits_BxV, state = prefill(self.model, params, batch, self.decoding, self.pad_id)
        carry = {"state": state, "keys": keys_B, "count": jnp.int32(0)}
        carry["finished"] = jnp.zeros(len(logits_BxV), bool)
        if (room_B := room(self.model, batch)) is not None:
            carry["room"] = room_B
        if self.decoding.repetition_penalty != 1:
            carry["seen"] = seen_tokens(batch, state, self.decoding, self.pad_id, logits_BxV.shape[-1])
        return self._choose(logits_BxV, carry)

    def step(self, params: Params, token_B: jax.Array, carry: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the tokens int32 [B] that follow `token_B`, and the new state."""
        logits_BxV, state = advance(self.model, params, carry["state"], token_B)
        return self._choose(logits_BxV, carry | {"state": state})

    def _choose(self, logits_BxV: jax.Array, carry: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        settings, carry = self.decoding, dict(carry)
        if "seen" in carry:
            logits_BxV = penalise(logits_BxV, carry["seen"], settings.repetition_penalty)
        if settings.temperature:
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(carry["keys"], carry["count"])
            token_B = jax.vmap(jax.random.categorical)(keys_B, warp(logits_BxV, settings))
        else:
            token_B = logits_BxV.argmax(axis=-1)
        token_B = jnp.where(carry["finished"], self.pad_id, token_B).astype(jnp.int32)
        if self.end_ids:
            carry["finished"] |= ends(token_B, self.end_ids)
        if "room" in carry:
            carry["finished"] |= carry["count"] + 1 >= carry["room"]
        if "seen" in carry:
            carry["seen"] = carry["seen"].at[jnp.arange(len(token_B)), token_B].set(True)
        return token_B, carry | {"count": carry["count"] + 1}


def row_keys(rng: jax.Array | None, rows_B: jax.Array) -> jax.Array:
    """Return a key for each row, a function of `rng` and the row's number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0) if rng is None else rng, rows_B)


def warp(logits_BxV: jax.Array, decoding: Decoding) -> jax.Array:
    """Return the logits to draw from: by temperature, then top-k, top-p and min-p; -inf for excluded tokens."""
    logits_BxV = logits_BxV / decoding.temperature
    if decoding.top_k:
        logits_BxV = keep_top_k(logits_BxV, decoding.top_k)
    if decoding.top_p < 1:
        logits_BxV = keep_top_p(logits_BxV, decoding.top_p)
    return keep_min_p(logits_BxV, decoding.min_p) if decoding.min_p else logits_BxV


def keep_top_k(logits_BxV: jax.Array, k: int) -> jax.Array:
    """Mask logits below the k-th largest with -inf."""
    largest_BxK, _ = jax.lax.top_k(logits_BxV, min(k, logits_BxV.shape[-1]))
    return jnp.where(logits_BxV < largest_BxK[:, -1:], -jnp.inf, logits_BxV)


def keep_top_p(logits_BxV: jax.Array, p: float) -> jax.Array:
    """Mask the least likely tokens of total probability at most 1 - p with -inf; one always remains."""
    ascending_BxV = jnp.sort(logits_BxV, axis=-1)
    kept_BxV = jnp.cumsum(jax.nn.softmax(ascending_BxV), axis=-1) > 1 - p
    kept_BxV = kept_BxV.at[:, -1].set(True)
    least_Bx1 = jnp.where(kept_BxV, ascending_BxV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)


def keep_min_p(logits_BxV: jax.Array, p: float) -> jax.Array:
    """Mask tokens of less than p times the highest probability with -inf."""
    probabilities_BxV = jax.nn.softmax(logits_BxV)
    least_Bx1 = p * probabilities_BxV.max(axis=-1, keepdims=True)
    return jnp.where(probabilities_BxV < least_Bx1, -jnp.inf, logits_BxV)


class Stream:
    """Generates for one prompt at a time and yields each token as soon as it is sampled."""

    def __init__(self, model: nn.Module, params: Params, decoding: Decoding, tokenizer: Tokenizer):
        """Initialise with the arguments of `generate`; beam search is not supported."""
        self._sampler = Sampler(model, decoding, *token_ids(tokenizer))
        self._params, self._start = unstack(params), jax.jit(self._sampler.start)
        self._step = jax.jit(self._sampler.step, donate_argnums=2)

    def __call__(self, prompt: Sequence[int], rng: jax.Array, row: int = 0) -> Iterator[int]:
        """Yield the tokens that `generate` returns for this prompt and row, without the end token."""
        batch = pad([prompt], self._sampler.pad_id)
        token, carry = self._start(self._params, batch, row_keys(rng, jnp.array([row])))
        for i in range(self._sampler.decoding.max_new_tokens):
            if i:
                token, carry = self._step(self._params, token, carry)
            if int(token[0]) in self._sampler.end_ids:
                return
            yield int(token[0])
