"""What the tasks share whose models take an encoder's features: those of a text, or those that the model names."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.task import Batch, Params, Spec
from research.tasks import tokens

TEXT = ("input_ids", "attention_mask", "token_type_ids")  # the last one may be absent


def init(model: nn.Module, spec: Spec, rng: jax.Array, needed: Sequence[str] = ()) -> Params:
    """Return new float32 parameters.

    Raises:
      UserError: the batches lack a feature of `needed` or of the encoder, or are longer than the model takes.
    """
    names = inputs(model)
    tokens.check(spec, (*(TEXT[:2] if names == TEXT else names), *needed))
    check_length(model, spec)
    return tokens.init(model, rng, spec, names)


def logits(model: nn.Module, params: Params, batch: Batch, rngs: dict[str, jax.Array]) -> jax.Array:
    """Return the model's outputs for a batch, in float32."""
    check_length(model, batch)
    outputs = model.apply({"params": params}, *[batch.get(name) for name in inputs(model)], rngs=rngs)
    return jnp.asarray(outputs, jnp.float32)


def inputs(model: nn.Module) -> tuple[str, ...]:
    """Return the features that a model is called with: its class's `inputs`, else those of a text."""
    return getattr(model, "inputs", TEXT)


def output(model: nn.Module, inputs: Sequence[jax.Array | None], chosen: Any) -> jax.Array:
    """Return one of the model's outputs for each example, float32 [B, 1]: see `Question.score`."""
    outputs: Any = model(*inputs)
    return outputs.reshape(len(outputs), -1)[:, chosen, None].astype(jnp.float32)


def position(model: nn.Module) -> int | None:
    """Return the token that a model of whole examples reads its outputs from; None where it reads the mean of all."""
    return None if getattr(model, "pooling", "token") == "mean" or not hasattr(model, "encoder") else 0


def check_length(model: nn.Module, batch: Batch | Spec) -> None:
    """Raise UserError if the model has too few positions for "input_ids", which indexing would not tell."""
    if "input_ids" not in batch:
        return
    length = batch["input_ids"].shape[1]
    encoder = getattr(model, "encoder", None)
    offset = getattr(encoder, "position_offset", None)
    most = getattr(encoder, "max_positions", length) - (0 if offset is None else offset + 1)
    if length > most:
        raise UserError(f"config.data.ops: max_length {length} is more than the {most} tokens that the model takes")
