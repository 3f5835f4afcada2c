"""Decoding settings, and prefill and single-token steps of language models with a key-value cache.

Shape letters: B prompts, T places of a prompt, N new tokens, V vocabulary, K beams of a prompt, S places in the cache.
The numbers are those of Hugging Face Transformers' `generate`, so that its settings mean the same here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError
from research.task import Batch, Params

State = dict[str, Any]  # the decoding state: "cache", "mask" and perhaps "source" and "source_mask"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The settings of text generation.

    Attributes:
      max_new_tokens: N, the maximum number of tokens, including the end token.
      temperature: the divisor of the logits before sampling; 0 is greedy decoding.
      top_k: sample from the k most likely tokens (Fan 2018); 0 for all.
      top_p: sample from the smallest set of tokens with this total probability (Holtzman 2019); 1 for all.
      min_p: sample from tokens with at least this share of the highest probability (Nguyen 2024).
      repetition_penalty: positive logits of earlier tokens are divided by it, negative ones multiplied (Keskar 2019);
        1 disables it.
      num_beams: K of beam search; 1 disables it.
      length_penalty: a finished beam's log-probability is divided by its length to this power.
      early_stopping: end when K beams have finished; else when no running beam, at its current length, beats them.
      stop: texts, or special tokens by their names, that end the output and are excluded from it.
      decoder_start_id: what an encoder-decoder's output begins with; None for the padding token, as in T5 and Marian.
      forced_first_id: the first new token, whatever the model says; None for the model's choice. BART's summarisers are
        generated from with their beginning-of-text token here, as their config.json has in forced_bos_token_id.
      bos: whether to put the beginning-of-text token before a prompt, as `data.language.CausalTokens` does.
      chat: whether a prompt is a user's turn, formatted by the tokenizer's chat template.
      prefix: text put before every prompt, as in `data.language.Seq2Seq`.
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
    forced_first_id: int | None = None
    bos: bool = True
    chat: bool = False
    prefix: str = ""

    def __post_init__(self):
        for name, least in {"max_new_tokens": 1, "num_beams": 1, "temperature": 0, "top_k": 0}.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name}: {value} must be at least {least}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p: {self.min_p} must lie in [0, 1]")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty: {self.repetition_penalty} must be above 0")
        if "" in self.stop:
            raise UserError("stop: an empty text would end every output at once; remove it")
        if self.temperature and self.num_beams > 1:
            raise UserError(
                f"temperature: beam search does not sample; set it to 0, or num_beams to 1, not {self.num_beams}"
            )
        self._check_idle(("top_k", "top_p", "min_p"), not self.temperature, "a temperature above 0")
        self._check_idle(("length_penalty", "early_stopping"), self.num_beams == 1, "num_beams above 1")

    def _check_idle(self, names: Sequence[str], idle: bool, needed: str) -> None:
        """Raise UserError for a setting that has no effect."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in names:
            if idle and getattr(self, name) != defaults[name]:
                raise UserError(f"{name}: {getattr(self, name)} needs {needed}")


def penalise(scores_BxV: jax.Array, seen_BxV: jax.Array, penalty: float) -> jax.Array:
    """Apply the repetition penalty to the logits of seen tokens: divide positive ones by it, multiply negative ones."""
    worse_BxV = jnp.where(scores_BxV < 0, scores_BxV * penalty, scores_BxV / penalty)
    return jnp.where(seen_BxV, worse_BxV, scores_BxV)


def prefill(
    model: nn.Module, params: Params, batch: Batch, decoding: Decoding, pad_id: int = 0
) -> tuple[jax.Array, State]:
    """Prefill: process prompts, or the inputs of an encoder.

    Args:
      model: see `generate`.
      params: as `unstack` returns them.
      batch: see `generate`.
      decoding: its max_new_tokens sets the size of the cache.
      pad_id: the first decoder input, unless `decoding` sets another.

    Returns:
      the logits float32 [B, V] of the first tokens, and the state for `advance`.
    """
    ids_BxT = batch["input_ids"]
    mask_BxT = (batch["attention_mask"] != 0).astype(jnp.int32) if "attention_mask" in batch else jnp.ones_like(ids_BxT)
    ones_BxN = jnp.ones((len(ids_BxT), decoding.max_new_tokens), jnp.int32)
    if hasattr(model, "encode"):
        encoded_BxTxD = model.apply({"params": params}, ids_BxT, mask_BxT, method="encode")
        start_Bx1 = ones_BxN[:, :1] * (pad_id if decoding.decoder_start_id is None else decoding.decoder_start_id)
        state = {"source": encoded_BxTxD, "source_mask": mask_BxT, "mask": ones_BxN}
        logits_BxV, state = _apply(model, params, state, start_Bx1)
    else:
        ids_BxT, mask_BxT = _left_padded(ids_BxT, mask_BxT)
        state = {"mask": jnp.concatenate([mask_BxT, ones_BxN[:, 1:]], axis=1)}
        logits_BxV, state = _apply(model, params, state, ids_BxT)
    if (forced := decoding.forced_first_id) is not None:
        logits_BxV = jnp.full_like(logits_BxV, -jnp.inf).at[:, forced].set(0.0)
    return logits_BxV, state


def advance(model: nn.Module, params: Params, state: State, token_B: jax.Array) -> tuple[jax.Array, State]:
    """Return the logits float32 [B, V] after one more token int32 [B], and the new state."""
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
    """Return the parameters with the decoder's layers unstacked; see `layers.stack`."""
    if "decoder" in params:
        return {**params, "decoder": unstack(params["decoder"])}
    stacked = params.get("layers", {})
    if not stacked or "0" in stacked:
        return params
    count = len(jax.tree.leaves(stacked)[0])
    return {**params, "layers": {str(i): jax.tree.map(lambda x: x[i], stacked) for i in range(count)}}  # noqa: B023


def _left_padded(ids_BxT: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotate rows so that their padding comes first."""
    length = ids_BxT.shape[1]
    after_B = jnp.argmax(mask_BxT[:, ::-1], axis=1)  # trailing padding
    index_BxT = (jnp.arange(length)[None] - after_B[:, None]) % length
    return jnp.take_along_axis(ids_BxT, index_BxT, 1), jnp.take_along_axis(mask_BxT, index_BxT, 1)


def seen_tokens(batch: Batch, state: State, decoding: Decoding, pad_id: int, vocab_size: int) -> jax.Array:
    """Return which tokens the decoder has read, bool [B, V]."""
    ids_BxT = batch["input_ids"]
    if "source" in state:
        start = pad_id if decoding.decoder_start_id is None else decoding.decoder_start_id
        return jnp.zeros((len(ids_BxT), vocab_size), bool).at[:, start].set(True)
    real_BxT = batch["attention_mask"] != 0 if "attention_mask" in batch else jnp.ones(ids_BxT.shape, bool)
    rows_Bx1 = jnp.arange(len(ids_BxT))[:, None]
    return jnp.zeros((len(ids_BxT), vocab_size), bool).at[rows_Bx1, ids_BxT].max(real_BxT)


def room(model: nn.Module, batch: Batch) -> jax.Array | None:
    """Return how many tokens, int32 [B], a decoder may generate; None if its positions are unbounded."""
    if getattr(model, "positions", None) != "learned":
        return None
    ids_BxT = batch["input_ids"]
    if hasattr(model, "encode"):
        return jnp.full(len(ids_BxT), model.max_positions, jnp.int32)  # the start token takes the first
    mask_BxT = batch["attention_mask"] != 0 if "attention_mask" in batch else jnp.ones(ids_BxT.shape, bool)
    return model.max_positions + 1 - mask_BxT.sum(axis=1, dtype=jnp.int32)  # the last token is not fed back


def token_ids(tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], int]:
    """Return the end tokens and the padding token."""
    return ((), 0) if tokenizer is None else (tokenizer.end_ids, tokenizer.pad_id)


def ends(tokens: jax.Array, end_ids: Sequence[int]) -> jax.Array:
    """Return which tokens end an output, bool of their shape."""
    return jnp.isin(tokens, jnp.array(end_ids, jnp.int32))


def pad(prompts: Sequence[Sequence[int]], pad_id: int, least: int = 16) -> dict[str, np.ndarray]:
    """Return prompts as a batch, int32 [B, T], padded on the left.

    T is a power of two and at least `least`, so that few programs are compiled.
    """
    length = least
    while length < max(map(len, prompts)):
        length *= 2
    ids_BxT = np.full((len(prompts), length), pad_id, np.int32)
    mask_BxT = np.zeros((len(prompts), length), np.int32)
    for i, prompt in enumerate(prompts):
        ids_BxT[i, length - len(prompt) :], mask_BxT[i, length - len(prompt) :] = prompt, 1
    return {"input_ids": ids_BxT, "attention_mask": mask_BxT}


def check_model(model: nn.Module) -> None:
    """Raise UserError unless the model is a decoder or an encoder-decoder."""
    if hasattr(model, "encode"):
        return
    inputs = jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if not hasattr(model, "hidden") or "cache" not in jax.eval_shape(model.init, *inputs):
        raise UserError(
            f"config.task.model: {type(model).__name__} cannot generate text; use a decoder or an encoder-decoder"
        )


def check_room(model: nn.Module, prompt: int, decoding: Decoding) -> None:
    """Raise UserError unless a decoder has enough positions for the prompt and the new tokens."""
    if getattr(model, "positions", None) != "learned":
        return
    most = model.max_positions
    if hasattr(model, "encode"):
        if prompt > most:
            raise UserError(f"the input has {prompt} tokens, but the model has {most} positions; shorten it")
        if decoding.max_new_tokens > most:
            raise UserError(
                f"config.decoding.max_new_tokens: {decoding.max_new_tokens} are too many, as the model has {most} "
                "positions"
            )
        return
    if prompt >= most:
        raise UserError(f"the prompt has {prompt} tokens, but the model has {most} positions; shorten it")
    if prompt + decoding.max_new_tokens > most + 1:
        raise UserError(
            f"config.decoding.max_new_tokens: {decoding.max_new_tokens} are too many after a prompt of {prompt} "
            f"tokens, as the model has {most} positions; set at most {most + 1 - prompt}"
        )
