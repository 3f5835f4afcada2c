"""Beam search.

Shape letters as in `decoding`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.data.tokenizer import Tokenizer
from research.generation.decoding import (
    Decoding,
    State,
    advance,
    ends,
    penalise,
    prefill,
    room,
    seen_tokens,
    token_ids,
    unstack,
)
from research.task import Batch, Params

LEAST = -1e9  # the score of invalid candidates


def beam_search(
    model: nn.Module, params: Params, batch: Batch, decoding: Decoding, tokenizer: Tokenizer | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the K best outputs of each prompt, int32 [B, K, N], and their scores, float32 [B, K], best first.

    The score is the sum of the tokens' log-probabilities divided by length ** length_penalty. The arguments are those
    of `generate`, and outputs are terminated and padded alike.
    """
    params = unstack(params)
    end_ids, pad_id = token_ids(tokenizer)
    search = _BeamSearch(decoding, end_ids, pad_id)
    logits_BxV, state = prefill(model, params, batch, decoding, pad_id)
    seen = None
    if decoding.repetition_penalty != 1:
        seen = jnp.repeat(seen_tokens(batch, state, decoding, pad_id, logits_BxV.shape[-1]), decoding.num_beams, axis=0)
    logits, state = jax.tree.map(
        lambda x: jnp.repeat(x, decoding.num_beams, axis=0) if x.ndim else x, (logits_BxV, state)
    )
    beams = search.expand(search.start(len(logits_BxV), state, seen, room(model, batch)), logits)

    def step(beams: dict[str, Any]) -> dict[str, Any]:
        logits, state = advance(model, params, beams["state"], beams["token"])
        return search.expand(beams | {"state": state}, logits)

    beams = jax.lax.while_loop(search.unfinished, step, beams)
    return beams["finished_tokens"], beams["finished_scores"]


@dataclasses.dataclass(frozen=True)
class _BeamSearch:
    """The update of beam search between two calls of the model."""

    decoding: Decoding
    end_ids: tuple[int, ...]
    pad_id: int

    def start(self, count: int, state: State, seen: jax.Array | None, room_B: jax.Array | None) -> dict[str, Any]:
        """Return the beams of `count` prompts; only the first of each prompt is valid at the start."""
        beams, length = self.decoding.num_beams, self.decoding.max_new_tokens
        tokens_BxKxN = jnp.full((count, beams, length), self.pad_id, jnp.int32)
        least_BxK = jnp.full((count, beams), LEAST)
        return {
            "count": jnp.int32(0),
            "most": jnp.full(count, length) if room_B is None else jnp.minimum(room_B, length),
            "state": state,
            "token": jnp.zeros(count * beams, jnp.int32),
            "tokens": tokens_BxKxN,
            "scores": least_BxK.at[:, 0].set(0.0),
            "finished_tokens": tokens_BxKxN,
            "finished_scores": least_BxK,
            "finished": jnp.zeros((count, beams), bool),
            "improvable": jnp.ones(count, bool),  # whether a running beam can still enter the K best
        } | ({} if seen is None else {"seen": seen})

    def unfinished(self, beams: dict[str, Any]) -> jax.Array:
        """Return whether any beam is still running."""
        going = (beams["count"] < self.decoding.max_new_tokens) & beams["improvable"].any()
        return going & ~beams["finished"].all() if self.decoding.early_stopping else going

    def expand(self, beams: dict[str, Any], logits: jax.Array) -> dict[str, Any]:
        """Add a token to the beams, whose next logits are [B * K, V]; 2 K candidates are considered."""
        (count, width), settings, i = beams["scores"].shape, self.decoding, beams["count"]
        past_B = i >= beams["most"]  # their logits may be NaN, which top_k would rank first
        scores = jax.nn.log_softmax(jnp.where(jnp.repeat(past_B, width)[:, None], 0.0, logits))
        if "seen" in beams:
            scores = penalise(scores, beams["seen"], settings.repetition_penalty)
        vocab_size = scores.shape[-1]
        scores_BxKV = (scores.reshape(count, width, vocab_size) + beams["scores"][..., None]).reshape(count, -1)
        scores_BxC, index_BxC = jax.lax.top_k(scores_BxKV, 2 * width)
        parent_BxC, token_BxC = index_BxC // vocab_size, (index_BxC % vocab_size).astype(jnp.int32)
        tokens_BxCxN = _take(beams["tokens"], parent_BxC).at[:, :, i].set(token_BxC)
        ended_BxC = jnp.broadcast_to((i + 1 >= beams["most"])[:, None], token_BxC.shape)
        if self.end_ids:
            ended_BxC |= ends(token_BxC, self.end_ids)
        scores_BxK, chosen_BxK = jax.lax.top_k(scores_BxC + ended_BxC * LEAST, width)
        beams = beams | self._finish(beams, tokens_BxCxN, scores_BxC, ended_BxC)
        best_B = scores_BxK[:, 0] / (i + 1.0) ** settings.length_penalty
        worst_BxK = jnp.where(beams["finished"], beams["finished_scores"].min(axis=1, keepdims=True), LEAST)
        parent_BxK, token_BxK = _take(parent_BxC, chosen_BxK), _take(token_BxC, chosen_BxK)
        rows = (jnp.arange(count)[:, None] * width + parent_BxK).reshape(-1)
        grown = {
            "count": i + 1,
            "state": beams["state"] | {"cache": _reorder(beams["state"]["cache"], rows)},
            "token": token_BxK.reshape(-1),
            "tokens": _take(tokens_BxCxN, chosen_BxK),
            "scores": scores_BxK,
            "improvable": beams["improvable"] & (best_B[:, None] > worst_BxK).any(axis=1),
        }
        if "seen" in beams:
            grown["seen"] = beams["seen"][rows].at[jnp.arange(len(rows)), grown["token"]].set(True)
        return beams | grown

    def _finish(
        self, beams: dict[str, Any], tokens_BxCxN: jax.Array, scores_BxC: jax.Array, ended_BxC: jax.Array
    ) -> dict[str, Any]:
        """Merge ended candidates that are among the best K into the K best finished outputs."""
        width = self.decoding.num_beams
        ended_BxC &= jnp.arange(2 * width) < width
        scores_BxC = scores_BxC / (beams["count"] + 1.0) ** self.decoding.length_penalty
        closed_B = ~beams["improvable"]
        if self.decoding.early_stopping:
            closed_B |= beams["finished"].all(axis=1)
        scores_BxC += (closed_B[:, None] | ~ended_BxC) * LEAST
        scores, best_BxK = jax.lax.top_k(jnp.concatenate([beams["finished_scores"], scores_BxC], axis=1), width)
        merged = jnp.concatenate([beams["finished_tokens"], tokens_BxCxN], axis=1)
        finished = jnp.concatenate([beams["finished"], ended_BxC], axis=1)
        return {
            "finished_tokens": _take(merged, best_BxK),
            "finished_scores": scores,
            "finished": _take(finished, best_BxK),
        }


def _take(values: jax.Array, index_BxK: jax.Array) -> jax.Array:
    """Return values [B, C, ...] at an index into C."""
    return jnp.take_along_axis(values, index_BxK.reshape(*index_BxK.shape, *[1] * (values.ndim - 2)), axis=1)


def _reorder(cache: Any, rows: jax.Array) -> Any:
    """Return the cache of other rows; beams of one prompt share what is kept of its source."""

    def take(path: Any, x: jax.Array) -> jax.Array:
        shared = any(getattr(key, "key", None) == "cross_attention" for key in path)
        return x[rows] if x.ndim and not shared else x

    return jax.tree_util.tree_map_with_path(take, cache)
