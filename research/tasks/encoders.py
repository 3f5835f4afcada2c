"""What the tasks share whose models take an encoder's features."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.task import Batch, Params, Spec
from research.tasks import tokens

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def init(model: nn.Module, spec: Spec, rng: jax.Array, needed: Sequence[str] = ()) -> Params:
    """Returns new float32 parameters.

    Raises:
      UserError: the batches lack a feature of `needed` or of the encoder, or are longer than the model takes.
    """
    tokens.check(spec, ("input_ids", "attention_mask", *needed))
    check_length(model, spec["input_ids"].shape[1])
    return tokens.init(model, rng, spec, INPUTS)


def logits(model: nn.Module, params: Params, batch: Batch, rngs: dict[str, jax.Array]) -> jax.Array:
    """Returns the model's outputs for a batch, in float32."""
    check_length(model, batch["input_ids"].shape[1])
    outputs = model.apply({"params": params}, *[batch.get(name) for name in INPUTS], rngs=rngs)
    return jnp.asarray(outputs, jnp.float32)


def check_length(model: nn.Module, length: int) -> None:
    """Raises UserError if the model has too few positions, which indexing would not tell."""
    encoder = getattr(model, "encoder", None)
    offset = getattr(encoder, "position_offset", None)
    most = getattr(encoder, "max_positions", length) - (0 if offset is None else offset + 1)
    if length > most:
        raise UserError(f"config.data.ops: max_length {length} is more than the {most} tokens that the model takes")
