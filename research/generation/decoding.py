"""Text from language models: the likeliest token each time, samples, or beam search, by a cache of keys and values.

Shape letters: B prompts, T places of a prompt, N new tokens, V vocabulary, K beams of a prompt, S places in the cache.
The numbers are those of Hugging Face Transformers' `generate`, so that its settings mean the same here.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.task import Batch, Params

State = dict[str, Any]  # what a model remembers of its rows: "cache", "mask" and perhaps "source" and "source_mask"
LEAST = -1e9  # the score of what is no candidate


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is generated.

    Attributes:
      max_new_tokens: N, the most tokens, the end token included.
      temperature: what logits are divided by before a token is drawn; 0 takes the likeliest one.
      top_k: draw from that many of the likeliest tokens (Fan 2018); 0 for all.
      top_p: draw from the fewest tokens that have this share of the probability (Holtzman 2019); 1 for all.
      min_p: draw from tokens that have at least this share of the likeliest one's probability (Nguyen 2024).
      repetition_penalty: what logits of tokens that occurred already are divided by, or multiplied with where they are
        negative (Keskar 2019); 1 changes nothing.
      num_beams: K of beam search; 1 for none.
      length_penalty: a finished beam's log-probability is divided by its length to this power.
      early_stopping: end when K beams have finished; else when no running one, at its present length, beats them.
      stop: texts, or special tokens by their names, that end the output, and are no part of it.
      decoder_start_id: what an encoder-decoder's output begins with; None for the padding token, T5's and Marian's.
      bos: whether a prompt is put after the token that begins a text, as `data.language.CausalTokens` does.
      chat: whether a prompt is a user's turn, to be put into the tokenizer's chat template.
      prefix: what is put before every prompt, as `data.language.Seq2Seq` does with what it reads.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    stop: tuple[str, ...] = ()
    decoder_start_id: int | None = None
    bos: bool = True
    chat: bool = False
    prefix: str = ""

    def __post_init__(self):
        for name, least in {"max_new_tokens": 1, "num_beams": 1, "temperature": 0, "top_k": 0}.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name}: {value} is less than {least}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p: {self.min_p} is not between 0 and 1")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty: {self.repetition_penalty} is not above 0")
        if "" in self.stop:
            raise UserError("stop: an empty text would end every output before it begins")
        if self.temperature and self.num_beams > 1:
            raise UserError(
                f"temperature: beam search draws nothing; set it to 0, or num_beams to 1, not {self.num_beams}"
            )
        self._check_idle(("top_k", "top_p", "min_p"), not self.temperature, "a temperature above 0")
        self._check_idle(("length_penalty", "early_stopping"), self.num_beams == 1, "num_beams above 1")

    def _check_idle(self, names: Sequence[str], idle: bool, needed: str) -> None:
        """Raises UserError for a setting that would change nothing."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in names:
            if idle and getattr(self, name) != defaults[name]:
                raise UserError(f"{name}: {getattr(self, name)} needs {needed}")


def generate(
    model: nn.Module,
    params: Params,
    batch: Batch,
    decoding: Decoding,
    tokenizer: Tokenizer | None = None,
    rng: jax.Array | None = None,
    rows_B: jax.Array | None = None,
) -> jax.Array:
    """Returns the tokens int32 [B, N] that follow prompts, or that an encoder-decoder makes of its inputs. Pure.

    Args:
      model: a decoder such as `gpt.Decoder`, or an encoder-decoder, which has a method `encode`.
      params: of the model, stacked or as `unstack` returns them.
      batch: "input_ids" int [B, T] and, where there is padding, "attention_mask", which is 0 at it. The prompts of a
        decoder may be padded on either side.
      decoding: the settings; `stop` is for `detokenizer.completion` to see to.
      tokenizer: says which token ends an output and which one fills it up; without it none does, and 0 does.
      rng: of the samples.
      rows_B: int [B]. A sample is a function of `rng`, this number and the prompt; 0, 1, ... where it is left out.

    Returns:
      the end token, where there is one, is followed by padding; so is the last token that the model, if its positions
      are learned, has one for.
    """
    if decoding.num_beams > 1:
        return beam_search(model, params, batch, decoding, tokenizer)[0][:, 0]
    params = unstack(params)
    sampler = Sampler(model, decoding, *_ids(tokenizer))
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
    """Chooses one token after the other for B rows that do not know of each other; its methods are pure.

    Attributes:
      model: see `generate`.
      decoding: the settings.
      eos_id: the token that ends an output; None for none.
      pad_id: the token that follows it.
    """

    model: nn.Module
    decoding: Decoding
    eos_id: int | None
    pad_id: int

    def start(self, params: Params, batch: Batch, keys_B: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the first tokens int32 [B], and what `step` needs; `keys_B` are those of `row_keys`."""
        logits_BxV, state = prefill(self.model, params, batch, self.decoding, self.pad_id)
        carry = {"state": state, "keys": keys_B, "count": jnp.int32(0)}
        carry["finished"] = jnp.zeros(len(logits_BxV), bool)
        if (room_B := _room(self.model, batch)) is not None:
            carry["room"] = room_B
        if self.decoding.repetition_penalty != 1:
            carry["seen"] = _seen(batch, state, self.decoding, self.pad_id, logits_BxV.shape[-1])
        return self._choose(logits_BxV, carry)

    def step(self, params: Params, token_B: jax.Array, carry: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the tokens int32 [B] that follow `token_B`, and what the next step needs."""
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
        if self.eos_id is not None:
            carry["finished"] |= token_B == self.eos_id
        if "room" in carry:
            carry["finished"] |= carry["count"] + 1 >= carry["room"]
        if "seen" in carry:
            carry["seen"] = carry["seen"].at[jnp.arange(len(token_B)), token_B].set(True)
        return token_B, carry | {"count": carry["count"] + 1}


def row_keys(rng: jax.Array | None, rows_B: jax.Array) -> jax.Array:
    """Returns a key for each row, a function of `rng` and the row's number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0) if rng is None else rng, rows_B)


def warp(logits_BxV: jax.Array, decoding: Decoding) -> jax.Array:
    """Returns the logits to draw from: by temperature, then top-k, top-p and min-p; -inf where a token is left out."""
    logits_BxV = logits_BxV / decoding.temperature
    if decoding.top_k:
        logits_BxV = keep_top_k(logits_BxV, decoding.top_k)
    if decoding.top_p < 1:
        logits_BxV = keep_top_p(logits_BxV, decoding.top_p)
    return keep_min_p(logits_BxV, decoding.min_p) if decoding.min_p else logits_BxV


def keep_top_k(logits_BxV: jax.Array, k: int) -> jax.Array:
    """Puts -inf in place of logits that are less than the k-th largest."""
    largest_BxK, _ = jax.lax.top_k(logits_BxV, min(k, logits_BxV.shape[-1]))
    return jnp.where(logits_BxV < largest_BxK[:, -1:], -jnp.inf, logits_BxV)


def keep_top_p(logits_BxV: jax.Array, p: float) -> jax.Array:
    """Puts -inf in place of the least likely tokens that have a share of at most 1 - p together; one always stays."""
    ascending_BxV = jnp.sort(logits_BxV, axis=-1)
    kept_BxV = jnp.cumsum(jax.nn.softmax(ascending_BxV), axis=-1) > 1 - p
    kept_BxV = kept_BxV.at[:, -1].set(True)
    least_Bx1 = jnp.where(kept_BxV, ascending_BxV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)


def keep_min_p(logits_BxV: jax.Array, p: float) -> jax.Array:
    """Puts -inf in place of tokens that have less than the share p of the likeliest one's probability."""
    probabilities_BxV = jax.nn.softmax(logits_BxV)
    least_Bx1 = p * probabilities_BxV.max(axis=-1, keepdims=True)
    return jnp.where(probabilities_BxV < least_Bx1, -jnp.inf, logits_BxV)


def penalise(scores_BxV: jax.Array, seen_BxV: jax.Array, penalty: float) -> jax.Array:
    """Makes scores of tokens that were seen worse: divides those above 0 by the penalty, multiplies those below."""
    worse_BxV = jnp.where(scores_BxV < 0, scores_BxV * penalty, scores_BxV / penalty)
    return jnp.where(seen_BxV, worse_BxV, scores_BxV)


def beam_search(
    model: nn.Module, params: Params, batch: Batch, decoding: Decoding, tokenizer: Tokenizer | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the K best outputs of each prompt, int32 [B, K, N], and their scores, float32 [B, K], best first.

    The score is the sum of the tokens' log-probabilities divided by length ** length_penalty. The arguments are those
    of `generate`, and outputs are ended and filled up alike.
    """
    params = unstack(params)
    eos_id, pad_id = _ids(tokenizer)
    search = _BeamSearch(decoding, eos_id, pad_id)
    logits_BxV, state = prefill(model, params, batch, decoding, pad_id)
    seen = None
    if decoding.repetition_penalty != 1:
        seen = jnp.repeat(_seen(batch, state, decoding, pad_id, logits_BxV.shape[-1]), decoding.num_beams, axis=0)
    logits, state = jax.tree.map(
        lambda x: jnp.repeat(x, decoding.num_beams, axis=0) if x.ndim else x, (logits_BxV, state)
    )
    beams = search.expand(search.start(len(logits_BxV), state, seen, _room(model, batch)), logits)

    def step(beams: dict[str, Any]) -> dict[str, Any]:
        logits, state = advance(model, params, beams["state"], beams["token"])
        return search.expand(beams | {"state": state}, logits)

    beams = jax.lax.while_loop(search.unfinished, step, beams)
    return beams["finished_tokens"], beams["finished_scores"]


@dataclasses.dataclass(frozen=True)
class _BeamSearch:
    """What beam search does between two calls of the model."""

    decoding: Decoding
    eos_id: int | None
    pad_id: int

    def start(self, count: int, state: State, seen: jax.Array | None, room_B: jax.Array | None) -> dict[str, Any]:
        """Returns the beams of `count` prompts; all but the first one of each count for nothing."""
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
            "improvable": jnp.ones(count, bool),  # whether a running beam may still become one of the K best
        } | ({} if seen is None else {"seen": seen})

    def unfinished(self, beams: dict[str, Any]) -> jax.Array:
        """Returns whether there is anything left to do."""
        going = (beams["count"] < self.decoding.max_new_tokens) & beams["improvable"].any()
        return going & ~beams["finished"].all() if self.decoding.early_stopping else going

    def expand(self, beams: dict[str, Any], logits: jax.Array) -> dict[str, Any]:
        """Adds a token to the beams, whose next logits are [B * K, V]; twice as many candidates are looked at."""
        (count, width), settings, i = beams["scores"].shape, self.decoding, beams["count"]
        past_B = i >= beams["most"]  # their logits may be NaN, which a search takes for the best of all
        scores = jax.nn.log_softmax(jnp.where(jnp.repeat(past_B, width)[:, None], 0.0, logits))
        if "seen" in beams:
            scores = penalise(scores, beams["seen"], settings.repetition_penalty)
        vocab_size = scores.shape[-1]
        scores_BxKV = (scores.reshape(count, width, vocab_size) + beams["scores"][..., None]).reshape(count, -1)
        scores_BxC, index_BxC = jax.lax.top_k(scores_BxKV, 2 * width)
        parent_BxC, token_BxC = index_BxC // vocab_size, (index_BxC % vocab_size).astype(jnp.int32)
        tokens_BxCxN = _take(beams["tokens"], parent_BxC).at[:, :, i].set(token_BxC)
        ended_BxC = jnp.broadcast_to((i + 1 >= beams["most"])[:, None], token_BxC.shape)
        if self.eos_id is not None:
            ended_BxC |= token_BxC == self.eos_id
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
        """Lets candidates that have ended, and are among the best K, in among the K best finished outputs."""
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
    """Returns values [B, C, ...] at an index into C."""
    return jnp.take_along_axis(values, index_BxK.reshape(*index_BxK.shape, *[1] * (values.ndim - 2)), axis=1)


def _reorder(cache: Any, rows: jax.Array) -> Any:
    """Returns the cache of other rows; beams of one prompt share what is kept of its source."""

    def take(path: Any, x: jax.Array) -> jax.Array:
        shared = any(getattr(key, "key", None) == "cross_attention" for key in path)
        return x[rows] if x.ndim and not shared else x

    return jax.tree_util.tree_map_with_path(take, cache)


def prefill(
    model: nn.Module, params: Params, batch: Batch, decoding: Decoding, pad_id: int = 0
) -> tuple[jax.Array, State]:
    """Reads prompts, or the inputs of an encoder.

    Args:
      model: see `generate`.
      params: as `unstack` returns them.
      batch: see `generate`.
      decoding: the cache gets room for as many tokens as it allows.
      pad_id: what an encoder-decoder's output begins with, where `decoding` says nothing else.

    Returns:
      the logits float32 [B, V] of the tokens that come first, and what `advance` needs for the next ones.
    """
    ids_BxT = batch["input_ids"]
    mask_BxT = (batch["attention_mask"] != 0).astype(jnp.int32) if "attention_mask" in batch else jnp.ones_like(ids_BxT)
    ones_BxN = jnp.ones((len(ids_BxT), decoding.max_new_tokens), jnp.int32)
    if hasattr(model, "encode"):
        encoded_BxTxD = model.apply({"params": params}, ids_BxT, mask_BxT, method="encode")
        start_Bx1 = ones_BxN[:, :1] * (pad_id if decoding.decoder_start_id is None else decoding.decoder_start_id)
        return _apply(model, params, {"source": encoded_BxTxD, "source_mask": mask_BxT, "mask": ones_BxN}, start_Bx1)
    ids_BxT, mask_BxT = _left_padded(ids_BxT, mask_BxT)
    return _apply(model, params, {"mask": jnp.concatenate([mask_BxT, ones_BxN[:, 1:]], axis=1)}, ids_BxT)


def advance(model: nn.Module, params: Params, state: State, token_B: jax.Array) -> tuple[jax.Array, State]:
    """Returns the logits float32 [B, V] of what follows one more token int32 [B], and the state after it."""
    return _apply(model, params, state, token_B[:, None])


def _apply(model: nn.Module, params: Params, state: State, ids_BxT: jax.Array) -> tuple[jax.Array, State]:
    variables = {"params": params, "cache": state.get("cache", {})}
    if "source" in state:
        inputs: tuple[jax.Array, ...] = (state["source"], state["source_mask"], state["mask"])
    else:
        inputs = (state["mask"],)
    hidden_BxTxD, changed = model.apply(
        variables, ids_BxT, *inputs, mutable=["cache"], method="decode" if "source" in state else "hidden"
    )
    logits_BxV = jnp.asarray(model.apply({"params": params}, hidden_BxTxD[:, -1], method="logits"), jnp.float32)
    return logits_BxV, state | {"cache": changed["cache"]}


def unstack(params: Params) -> Params:
    """Returns the parameters with those of each of the decoder's layers by themselves; see `layers.stack`."""
    if "decoder" in params:
        return {**params, "decoder": unstack(params["decoder"])}
    stacked = params.get("layers", {})
    if not stacked or "0" in stacked:
        return params
    count = len(jax.tree.leaves(stacked)[0])
    return {**params, "layers": {str(i): jax.tree.map(lambda x: x[i], stacked) for i in range(count)}}  # noqa: B023


def _left_padded(ids_BxT: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns rows around so that their padding comes first."""
    length = ids_BxT.shape[1]
    after_B = jnp.argmax(mask_BxT[:, ::-1], axis=1)  # how much padding comes last
    index_BxT = (jnp.arange(length)[None] - after_B[:, None]) % length
    return jnp.take_along_axis(ids_BxT, index_BxT, 1), jnp.take_along_axis(mask_BxT, index_BxT, 1)


def _seen(batch: Batch, state: State, decoding: Decoding, pad_id: int, vocab_size: int) -> jax.Array:
    """Returns which tokens the decoder has read, bool [B, V]."""
    ids_BxT = batch["input_ids"]
    if "source" in state:
        start = pad_id if decoding.decoder_start_id is None else decoding.decoder_start_id
        return jnp.zeros((len(ids_BxT), vocab_size), bool).at[:, start].set(True)
    real_BxT = batch["attention_mask"] != 0 if "attention_mask" in batch else jnp.ones(ids_BxT.shape, bool)
    rows_Bx1 = jnp.arange(len(ids_BxT))[:, None]
    return jnp.zeros((len(ids_BxT), vocab_size), bool).at[rows_Bx1, ids_BxT].max(real_BxT)


def _room(model: nn.Module, batch: Batch) -> jax.Array | None:
    """Returns how many tokens, int32 [B], a decoder may generate; None where its positions have no end."""
    if getattr(model, "positions", None) != "learned":
        return None
    ids_BxT = batch["input_ids"]
    mask_BxT = batch["attention_mask"] != 0 if "attention_mask" in batch else jnp.ones(ids_BxT.shape, bool)
    return model.max_positions + 1 - mask_BxT.sum(axis=1, dtype=jnp.int32)  # the last token is not read any more


def _ids(tokenizer: Tokenizer | None) -> tuple[int | None, int]:
    """Returns the token that ends a text and the one that fills it up."""
    return (None, 0) if tokenizer is None else (tokenizer.eos_id, tokenizer.pad_id)


def pad(prompts: Sequence[Sequence[int]], pad_id: int, least: int = 16) -> dict[str, np.ndarray]:
    """Returns prompts as a batch, int32 [B, T], padded on the left.

    T is a power of two, and `least` or more, so that few programs are compiled.
    """
    length = least
    while length < max(map(len, prompts)):
        length *= 2
    ids_BxT = np.full((len(prompts), length), pad_id, np.int32)
    mask_BxT = np.zeros((len(prompts), length), np.int32)
    for i, prompt in enumerate(prompts):
        ids_BxT[i, length - len(prompt) :], mask_BxT[i, length - len(prompt) :] = prompt, 1
    return {"input_ids": ids_BxT, "attention_mask": mask_BxT}


class Stream:
    """Generates for one prompt at a time, and gives out each token as soon as it is known."""

    def __init__(self, model: nn.Module, params: Params, decoding: Decoding, tokenizer: Tokenizer):
        """The arguments are those of `generate`; there are no beams."""
        self._sampler = Sampler(model, decoding, *_ids(tokenizer))
        self._params, self._start = unstack(params), jax.jit(self._sampler.start)
        self._step = jax.jit(self._sampler.step, donate_argnums=2)

    def __call__(self, prompt: Sequence[int], rng: jax.Array, row: int = 0) -> Iterator[int]:
        """Yields the tokens that `generate` returns for this prompt and row, without the end token."""
        batch = pad([prompt], self._sampler.pad_id)
        token, carry = self._start(self._params, batch, row_keys(rng, jnp.array([row])))
        for i in range(self._sampler.decoding.max_new_tokens):
            if i:
                token, carry = self._step(self._params, token, carry)
            if int(token[0]) == self._sampler.eos_id:
                return
            yield int(token[0])


def check_model(model: nn.Module) -> None:
    """Raises UserError unless it is an encoder-decoder, or a decoder, which keeps a cache."""
    if hasattr(model, "encode"):
        return
    inputs = jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if not hasattr(model, "hidden") or "cache" not in jax.eval_shape(model.init, *inputs):
        raise UserError(f"config.task.model: {type(model).__name__} cannot generate text; it is no decoder")


def check_room(model: nn.Module, prompt: int, decoding: Decoding) -> None:
    """Raises UserError unless a decoder has positions for that many tokens of a prompt and those that follow."""
    if getattr(model, "positions", None) != "learned":
        return
    most = model.max_positions
    if prompt >= most:
        raise UserError(f"the prompt has {prompt} tokens, and the model positions for {most}; shorten it")
    if prompt + decoding.max_new_tokens > most + 1:
        raise UserError(
            f"config.decoding.max_new_tokens: {decoding.max_new_tokens} are too many after a prompt of {prompt} "
            f"tokens, as the model has positions for {most}; set at most {most + 1 - prompt}"
        )
