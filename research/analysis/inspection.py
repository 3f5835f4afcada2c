"""Looking into a model while it computes, without a change to it: embeddings, attention, the residual stream.

Shape letters as in `models.layers`; L counts the layers of a stack of blocks, which is a module named "layers"; one
named "first" may stand before it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from research.models.layers import Embedding
from research.task import Batch, Params, Question

ENTERING, LEAVING, WEIGHTS = "stream_entering", "stream_leaving", "weights"
STACK, FIRST = "layers", "first"  # names of a stack's blocks, and of one of another kind before them


def scores(model: nn.Module, params: Params, question: Question, batch: Batch, embedded: Batch) -> jax.Array:
    """Return the numbers that a question asks for, float32 [B, P].

    Args:
      model: the module.
      params: of the model.
      question: its `batch` is not looked at.
      batch: the features, [B, ...].
      embedded: {feature: [B, T, D]}: what stands in place of the words that the tokens of a feature are looked up as.
    """

    def replace(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        for name in embedded if _looks_up(context) else ():
            if args and args[0] is batch[name]:
                return embedded[name].astype(context.module.dtype)
        return call(*args, **kwargs)

    with nn.intercept_methods(replace):
        return jnp.asarray(_apply(model, params, question, batch), jnp.float32)


def words(model: nn.Module, params: Params, question: Question, batch: Batch) -> dict[str, jax.Array]:
    """Return {feature: float32 [B, T, D]}: what tokens are looked up as, before positions and the like are added.

    A feature is missing whose tokens no table of the model is asked for.
    """
    found = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*args, **kwargs)
        for name in batch if _looks_up(context) else ():
            if name.endswith("input_ids") and args and args[0] is batch[name]:
                found[name] = outputs.astype(jnp.float32)
        return outputs

    with nn.intercept_methods(record):
        _apply(model, params, question, batch)
    return found


def look_inside(
    model: nn.Module, params: Params, question: Question, batch: Batch
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return the attention weights and the residual streams of every stack of blocks, by path.

    Returns:
      {"decoder/layers/cross_attention": float32 [L, B, H, T, S]}, and {"decoder/layers": float32 [L + 1, B, T, D]}:
      what enters the first block, and what leaves each. Both are empty for a model without attention, without blocks.
    """

    def sow(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*args, **kwargs)
        if _is_block(context) and args:
            context.module.sow("intermediates", ENTERING, args[0])
            context.module.sow("intermediates", LEAVING, outputs)
        return outputs

    with nn.intercept_methods(sow):
        _, state = _apply(model, params, question, batch, mutable=["intermediates"])
    sown = flax.traverse_util.flatten_dict(state.get("intermediates", {}), sep="/")
    attention, streams = {}, {}
    for path, (value, *_) in sown.items():
        where, _, kind = f"/{path}".rpartition("/")
        if kind == WEIGHTS:
            attention[where[1:]] = value if value.ndim == 5 else value[None]
        elif kind == ENTERING:
            leaving = sown[path.removesuffix(ENTERING) + LEAVING][0]
            stacked = value.ndim == 4
            first, rest = (value[:1], leaving) if stacked else (value[None], leaving[None])
            streams[where[1:]] = jnp.concatenate([first, rest]).astype(jnp.float32)
    return _joined(attention, 0), _joined(streams, 1)


def _joined(found: dict[str, jax.Array], shared: int) -> dict[str, jax.Array]:
    """Return what was found with a block that stands before a stack put first in it; `shared` rows are of both."""
    for path in list(found):
        stack = "/".join(STACK if part == FIRST else part for part in path.split("/"))
        if stack != path and stack in found:
            found[stack] = jnp.concatenate([found.pop(path), found[stack][shared:]])
    return found


def lens(
    model: nn.Module, params: Params, question: Question, batch: Batch, stream_LxBxTxD: jax.Array, best: int
) -> tuple[jax.Array, jax.Array]:
    """Read the residual stream after every block as the last one is read: the logit lens (nostalgebraist 2020).

    Args:
      model: whose output layer makes logits [B, T, V] of what its blocks at `question.vocabulary` make.
      params: of the model.
      question: whose `vocabulary` is not None.
      batch: the features.
      stream_LxBxTxD: the stream at those blocks: see `look_inside`.
      best: how many tokens are kept.

    Returns:
      the likeliest tokens, int32 [L, B, T, best], and their log-likelihoods, float32.
    """

    def read(stream_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BxTxV = lens_logits(model, params, question, batch, stream_BxTxD)
        values, ids = jax.lax.top_k(jax.nn.log_softmax(logits_BxTxV), best)
        return ids, values

    return jax.lax.map(read, stream_LxBxTxD)


def lens_logits(
    model: nn.Module, params: Params, question: Question, batch: Batch, stream_BxTxD: jax.Array
) -> jax.Array:
    """Return the logits float32 [B, T, V] that a model makes where its blocks leave `stream_BxTxD`."""

    def replace(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if _is_block(context) and "/".join(context.module.path) == question.vocabulary:
            return stream_BxTxD.astype(args[0].dtype)
        return call(*args, **kwargs)

    inputs = [batch.get(name) for name in question.inputs]
    with nn.intercept_methods(replace):
        return jnp.asarray(model.apply({"params": params}, *inputs), jnp.float32)


def _apply(model: nn.Module, params: Params, question: Question, batch: Batch, **settings: Any) -> Any:
    score: Callable[..., Any] = question.score
    inputs: Sequence[jax.Array | None] = [batch.get(name) for name in question.inputs]
    variables: Mapping[str, Any] = {"params": params}
    return model.apply(variables, inputs, question.choice, method=score, **settings)


def _looks_up(context: nn.module.InterceptorContext) -> bool:
    return isinstance(context.module, Embedding) and context.method_name == "__call__"


def _is_block(context: nn.module.InterceptorContext) -> bool:
    return context.module.name in (STACK, FIRST) and context.method_name == "__call__"
