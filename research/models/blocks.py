"""Transformer blocks, and stacks of them.

Shape letters as in `layers`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.models.layers import Dropout, DropPath
from research.models.structure import EVERYTHING, Structure
from research.sharding import constrain, platform

# What a block normalises: what goes into each part (Xiong 2020), what comes out of it (OLMo Team 2024), both (Gemma
# Team 2024), or each residual sum (Vaswani 2017).
NORMS = ("before", "after", "around", "sum")


class Block(nn.Module):
    """Attention, attention to a source where there is one, and MLP, each with a norm and a residual sum.

    Attributes:
      attention: makes an `Attention` of a name.
      mlp: makes an `MLP`.
      norm: makes a norm.
      norms: what is normalised, see `NORMS`.
      dropout: before each residual sum.
      layer_scale: what learned factors begin with that each part's output is multiplied by (Touvron 2021, "Going deeper
        with image transformers"); None leaves them out.
      drop_path: the share of examples that skip each part of the last block; it grows with depth from 0 (Huang 2016).
    """

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    norms: str = "before"
    dropout: float = 0.0
    layer_scale: float | None = None
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        *,
        structure: Structure = EVERYTHING,
        bias: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        position_BxTxD: jax.Array | None = None,
        source_BxSxD: jax.Array | None = None,
        source_structure: Structure = EVERYTHING,
        source_position_BxSxD: jax.Array | None = None,
        index: jax.Array | None = None,
        depth: jax.Array | None = None,
        local: jax.Array | None = None,
        local_rotary: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Map [B, T, D] to [B, T, D].

        `structure` to `index` are those of `Attention`; `depth` goes from 0 at the first block to 1 at the last.
        `local` says whether this block keeps to the structure's window, and then turns queries and keys by
        `local_rotary` where that is given; with None it keeps to the window and turns them by `rotary`.
        """
        if self.norms not in NORMS:
            raise UserError(f"unknown norms '{self.norms}'{nearest(self.norms, NORMS)}")
        if local is not None:
            structure = dataclasses.replace(structure, local=local)
            if local_rotary is not None and rotary is not None:
                rotary = jax.tree.map(functools.partial(jnp.where, local), local_rotary, rotary)

        def add(x: jax.Array, part: nn.Module, **context: Any) -> jax.Array:
            norm = self.norm(name=f"{part.name}_norm")
            y = part(norm(x) if self.norms in ("before", "around") else x, **context)
            if self.norms == "after":
                y = norm(y)
            elif self.norms == "around":
                y = self.norm(name=f"{part.name}_out_norm")(y)
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                y *= self.param(f"{part.name}_scale", init, (y.shape[-1],), jnp.float32).astype(y.dtype)
            y = Dropout(self.dropout, name=f"{part.name}_out_dropout")(y)
            if depth is not None:
                y = DropPath(self.drop_path, name=f"{part.name}_drop_path")(y, depth)
            x += y
            return norm(x) if self.norms == "sum" else x

        shared = {"position_BxTxD": position_BxTxD, "index": index}
        own = {"structure": structure, "bias": bias, "rotary": rotary}
        x_BxTxD = add(x_BxTxD, self.attention(name="attention"), **own, **shared)
        if source_BxSxD is not None:
            source = {"source_BxSxD": source_BxSxD, "source_position_BxSxD": source_position_BxSxD}
            x_BxTxD = add(
                x_BxTxD, self.attention(name="cross_attention"), structure=source_structure, **source, **shared
            )
        return add(x_BxTxD, self.mlp(name="mlp"))


Policy = Callable[..., Any]
ROWS = ("batch", "length", "width")  # where activations between blocks live

# What the backward pass finds in memory (Chen 2016): everything; everything but what is inside of attention, which
# `Attention` itself sees to; the results of products with parameters; nothing but each block's input; or those results
# in the host's memory.
REMAT: dict[str, Policy | None] = {
    "none": None,
    "attention": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
MOST_UNROLLED = 32
EMPTY: Mapping[str, np.ndarray] = MappingProxyType({})


def remat_policy(name: str) -> Policy | None:
    """Return what `jax.checkpoint` may keep under the policy of that name, or raise UserError."""
    if name not in REMAT:
        raise UserError(f"remat: unknown policy '{name}'{nearest(name, REMAT)}")
    return REMAT[name]


def default_unroll(num_layers: int) -> int:
    """Return how many blocks a GPU's compiler sees at once: all, up to a depth that still compiles in a minute.

    On an H200 a scan of GPT-2's twelve blocks cost 36 % of a step; elsewhere it costs little and saves compilation.
    """
    return min(num_layers, MOST_UNROLLED) if platform() == "gpu" else 1


def stack(
    block: nn.Module,
    num_layers: int,
    x: jax.Array,
    *,
    unroll: int | None = None,
    remat: str = "none",
    each: Mapping[str, np.ndarray | jax.Array] = EMPTY,
    **context: Any,
) -> jax.Array:
    """Apply `num_layers` blocks in turn, compiled once by a scan over their stacked parameters.

    Args:
      block: the block. Its parameters get a leading axis of length `num_layers`. Name it "layers": `optimizer.py`
        numbers the layers below that name.
      num_layers: how many.
      x: activations, [B, T, D].
      unroll: how many blocks the compiler sees at once; None chooses by platform and depth, see `default_unroll`. The
        parameters' layout stays.
      remat: what is recomputed in the backward pass instead of kept, by the names of `REMAT`.
      each: of every array [num_layers, ...] a block gets its own row, by that name.
      **context: passed to every block.

    Where the parameters come as {"0": those of the first block, ...} the blocks are applied one by one, and their
    caches are kept alike. Decoding does so: a scan copies every layer's weights for every token.
    """
    if block.has_variable("params", "0"):
        return _one_by_one(block, num_layers, x, context, each)
    return _scan(block, num_layers, x, unroll, remat, context, each)[0]


def every_output(
    block: nn.Module, num_layers: int, x: jax.Array, *, unroll: int | None = None, remat: str = "none", **context: Any
) -> jax.Array:
    """Apply blocks as `stack` does and return the outputs of all of them, [num_layers, B, T, D]."""
    return _scan(block, num_layers, x, unroll, remat, context, EMPTY, every=True)[1]


def _scan(
    block: nn.Module,
    num_layers: int,
    x: jax.Array,
    unroll: int | None,
    remat: str,
    context: dict[str, Any],
    each: Mapping[str, np.ndarray | jax.Array],
    every: bool = False,
) -> tuple[jax.Array, Any]:
    """Return the output of the last block and, where `every` one is asked for, those of all, stacked."""
    # A share that is 0 everywhere is left out: blocks need not know of depth.
    depths = {"depth": jnp.linspace(0, 1, num_layers)} if getattr(block, "drop_path", 0.0) else {}

    def step(
        block: nn.Module, x: jax.Array, context: dict[str, Any], own: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        x = constrain(block(constrain(x, *ROWS), **context, **own), *ROWS)
        return x, x if every else None

    unroll = min(unroll or default_unroll(num_layers), num_layers)
    if (policy := remat_policy(remat)) is not None:
        # Inside a loop nothing can undo it; side by side, the compiler may find that it computes the same twice.
        step = nn.remat(step, prevent_cse=unroll > 1, policy=policy)
    scan = nn.scan(
        step,
        variable_axes={"params": 0, "intermediates": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=num_layers,
        unroll=unroll,
    )
    return scan(block, x, context, depths | {name: jnp.asarray(rows) for name, rows in each.items()})


def _one_by_one(
    block: nn.Module, num_layers: int, x: jax.Array, context: dict[str, Any], each: Mapping[str, np.ndarray | jax.Array]
) -> jax.Array:
    alone, held = block.clone(parent=None), block.variables
    mutable = ["cache"] if block.is_mutable_collection("cache") else []
    for layer in range(num_layers):
        name = str(layer)
        own: dict[str, Any] = {key: rows[layer] for key, rows in each.items()}
        variables = {collection: every[name] for collection, every in held.items() if name in every}
        x, changed = alone.apply(variables, x, mutable=mutable, **context, **own)
        for collection, value in changed.items():
            block.put_variable(collection, name, value)
    return x
