"""Flash attention for GPUs, in Pallas: what cuDNN's lacks, which is documents in a row and dropout of weights.

The algorithm is that of Dao 2023 ("FlashAttention-2"): scores exist a block at a time, and are computed again in the
backward pass. Blocks of keys that no query of a block may attend to are skipped, so that a packed row costs what its
documents would alone. Shape letters as in `layers`; a program works on one block of one head of one row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from research.models import flash_kernels
from research.models.flash_kernels import Options
from research.models.positions import by_distance

# Blocks: of what a program holds, and of what it goes through. On an H200, 32 packed rows of 1,024 tokens in 12 heads
# of 64 took 0.58 ms both ways; 0.79 ms with 128 and 64, 1.28 with 128 and 128, 0.61 with 64 and 32.
WIDE, NARROW = 64, 64


def flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries_BxT: jax.Array,
    keys_BxS: jax.Array,
    seed: jax.Array,
    bias_HxN: jax.Array | None,
    options: Options,
) -> jax.Array:
    """Return what queries find, [B, T, H, K]; zeros for those of no document.

    Args:
      query: [B, T, H, K], H a multiple of G, K a power of two and at least 16.
      key: [B, S, G, K].
      value: [B, S, G, K].
      queries_BxT: document numbers, int32; 0 attends to nothing.
      keys_BxS: alike; 0 is attended to by nothing.
      seed: uint32 [4]: two words that decide what is dropped, and the numbers, in the whole batch and model, of the
        first row and the first head.
      bias_HxN: float32, see `attention.attend`; None for none.
      options: see `Options`.
    """
    bias_HxN = jnp.zeros((query.shape[2], 1)) if bias_HxN is None else bias_HxN.astype(jnp.float32)
    length = query.shape[1]
    wide = max(_block(query.shape[1], WIDE), _block(key.shape[1], WIDE))
    query, queries_BxT = (_filled(x, wide) for x in (query, queries_BxT))
    key, value, keys_BxS = (_filled(x, wide) for x in (key, value, keys_BxS))
    return _flash(query, key, value, queries_BxT, keys_BxS, seed, bias_HxN, options)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries_BxT: jax.Array,
    keys_BxS: jax.Array,
    seed: jax.Array,
    bias_HxN: jax.Array,
    options: Options,
) -> jax.Array:
    return _forward(query, key, value, queries_BxT, keys_BxS, seed, bias_HxN, options)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries_BxT: jax.Array,
    keys_BxS: jax.Array,
    seed: jax.Array,
    bias_HxN: jax.Array,
    options: Options,
) -> tuple[jax.Array, Any]:
    sizes = _block(query.shape[1], WIDE), _block(key.shape[1], NARROW)
    begin, end = _extents(queries_BxT, keys_BxS, sizes[0], options, of_queries=True)
    grid = (query.shape[1] // sizes[0], query.shape[0], query.shape[2])
    specs = _specs(query, key, sizes[0])
    out, log_sum = pl.pallas_call(
        functools.partial(flash_kernels.forward_kernel, options, sizes),
        grid=grid,
        in_specs=[
            *(specs["block"], specs["keys"], specs["keys"], specs["numbers"]),
            *(_row(keys_BxS), _row(begin), _row(end), specs["seed"], _row_of_head(bias_HxN)),
        ],
        out_specs=[specs["block"], specs["statistic"]],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((query.shape[0], query.shape[2], query.shape[1]), jnp.float32),
        ],
        compiler_params=_parameters(query),
        interpret=options.interpret,
        name="flash_forward",
    )(query, key, value, queries_BxT, keys_BxS, begin, end, seed, bias_HxN)
    return out, (query, key, value, queries_BxT, keys_BxS, seed, bias_HxN, out, log_sum)


def _backward(options: Options, kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    query, key, value, queries_BxT, keys_BxS, seed, bias_HxN, out, log_sum = kept
    along = (out.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
    batch, length, heads, width = query.shape
    size, groups = key.shape[1], key.shape[2]

    wide, narrow = _block(length, WIDE), _block(size, NARROW)
    specs = _specs(query, key, wide)
    extents = _extents(queries_BxT, keys_BxS, wide, options, of_queries=True)
    by_query = pl.pallas_call(
        functools.partial(flash_kernels.query_kernel, options, (wide, narrow)),
        grid=(length // wide, batch, heads),
        in_specs=[
            *(specs["block"], specs["keys"], specs["keys"], specs["numbers"], _row(keys_BxS)),
            *(*map(_row, extents), specs["seed"], _row_of_head(bias_HxN)),
            *(specs["block"], specs["statistic"], specs["statistic"]),
        ],
        out_specs=specs["block"],
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=_parameters(query),
        interpret=options.interpret,
        name="flash_by_query",
    )(query, key, value, queries_BxT, keys_BxS, *extents, seed, bias_HxN, cotangent, log_sum, along)

    narrow, wide = _block(length, NARROW), _block(size, WIDE)
    specs = _specs(query, key, wide)
    extents = _extents(keys_BxS, queries_BxT, wide, options, of_queries=False)
    shape = jax.ShapeDtypeStruct((batch, size, heads, width), jnp.float32 if groups < heads else key.dtype)
    by_key, by_value = pl.pallas_call(
        functools.partial(flash_kernels.key_kernel, options, (narrow, wide)),
        grid=(size // wide, batch, heads),
        in_specs=[
            *(specs["queries"], specs["key_block"], specs["key_block"], _row(queries_BxT), specs["numbers"]),
            *(*map(_row, extents), specs["seed"], _row_of_head(bias_HxN)),
            *(specs["queries"], specs["statistics"], specs["statistics"]),
        ],
        out_specs=[specs["block"], specs["block"]],
        out_shape=[shape, shape],
        compiler_params=_parameters(query),
        interpret=options.interpret,
        name="flash_by_key",
    )(query, key, value, queries_BxT, keys_BxS, *extents, seed, bias_HxN, cotangent, log_sum, along)
    if groups < heads:
        split = (batch, size, groups, heads // groups, width)
        by_key, by_value = (x.reshape(split).sum(axis=3).astype(key.dtype) for x in (by_key, by_value))
    by_bias = None
    if options.biased:
        by_bias = _by_bias(options, query, key, value, queries_BxT, keys_BxS, seed, bias_HxN, cotangent, log_sum, along)
    return by_query, by_key, by_value, None, None, None, by_bias


def _by_bias(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries_BxT: jax.Array,
    keys_BxS: jax.Array,
    seed: jax.Array,
    bias_HxN: jax.Array,
    cotangent: jax.Array,
    log_sum: jax.Array,
    along: jax.Array,
) -> jax.Array:
    """Return the gradient by the bias, float32 [H, N].

    Blocks of scores that lie on one diagonal hold the same distances in the same places: a program adds up those of one
    diagonal, of one head and a few rows.
    """
    (batch, length, heads, width), (size, groups) = query.shape, key.shape[1:3]
    block = min(_block(length, NARROW), _block(size, NARROW))
    counts = length // block, size // block
    rows = max(n for n in range(1, max(batch // 8, 1) + 1) if batch % n == 0)
    share = heads // groups
    queries = pl.BlockSpec((rows, length, None, width), lambda d, h, b: (b, 0, h, 0))
    keys = pl.BlockSpec((rows, size, None, width), lambda d, h, b: (b, 0, h // share, 0))
    statistics = pl.BlockSpec((rows, None, length), lambda d, h, b: (b, h, 0))
    tiles = pl.pallas_call(
        functools.partial(flash_kernels.bias_kernel, options, block, counts, rows),
        grid=(sum(counts) - 1, heads, batch // rows),
        in_specs=[
            *(queries, keys, keys),
            *(pl.BlockSpec((rows, n), lambda d, h, b: (b, 0)) for n in (length, size)),
            *(
                pl.BlockSpec((4,), lambda d, h, b: (0,)),
                pl.BlockSpec((None, bias_HxN.shape[1]), lambda d, h, b: (h, 0)),
            ),
            *(queries, statistics, statistics),
        ],
        out_specs=pl.BlockSpec((None, None, None, block, block), lambda d, h, b: (b, h, d, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch // rows, heads, sum(counts) - 1, block, block), jnp.float32),
        compiler_params=_parameters(query),
        interpret=options.interpret,
        name="flash_by_bias",
    )(query, key, value, queries_BxT, keys_BxS, seed, bias_HxN, cotangent, log_sum, along)
    # Each block is added up along its diagonals, then the blocks where their distances overlap.
    distances = 2 * block - 1
    shape = jax.ShapeDtypeStruct((heads * (sum(counts) - 1), distances), jnp.float32)
    (sums,) = jax.linear_transpose(lambda x: by_distance(x, block), shape)(tiles.sum(axis=0).reshape(-1, block, block))
    first = options.lengths[0] - length + block * np.arange(sum(counts) - 1)
    places = first[:, None] + np.arange(distances)
    places = np.where(places < 0, bias_HxN.shape[1], places)  # what fills up the last blocks has no bias
    return jnp.zeros_like(bias_HxN).at[:, places].add(sums.reshape(heads, -1, distances), mode="drop")


_flash.defvjp(_forward, _backward)


def _specs(query: jax.Array, key: jax.Array, block: int) -> dict[str, pl.BlockSpec]:
    """Return which part of each array a program (block, row, head) sees."""
    length, heads, width = query.shape[1:]
    size, groups = key.shape[1:3]
    share = heads // groups
    return {
        "block": pl.BlockSpec((None, block, None, width), lambda i, b, h: (b, i, h, 0)),
        "key_block": pl.BlockSpec((None, block, None, width), lambda i, b, h: (b, i, h // share, 0)),
        "queries": pl.BlockSpec((None, length, None, width), lambda i, b, h: (b, 0, h, 0)),
        "keys": pl.BlockSpec((None, size, None, width), lambda i, b, h: (b, 0, h // share, 0)),
        "numbers": pl.BlockSpec((None, block), lambda i, b, h: (b, i)),
        "statistic": pl.BlockSpec((None, None, block), lambda i, b, h: (b, h, i)),
        "statistics": pl.BlockSpec((None, None, length), lambda i, b, h: (b, h, 0)),
        "seed": pl.BlockSpec((4,), lambda i, b, h: (0,)),
    }


def _row(x: jax.Array) -> pl.BlockSpec:
    """Return the whole row of an array [B, N]."""
    return pl.BlockSpec((None, x.shape[1]), lambda i, b, h: (b, 0))


def _row_of_head(x: jax.Array) -> pl.BlockSpec:
    """Return the whole row of an array [H, N]."""
    return pl.BlockSpec((None, x.shape[1]), lambda i, b, h: (h, 0))


def _parameters(query: jax.Array) -> triton.CompilerParams:
    return triton.CompilerParams(num_warps=4 if query.shape[-1] <= 64 else 8, num_stages=2)


def _block(length: int, most: int) -> int:
    """Return the size of blocks: `most`, or less where the whole is shorter; a power of two, and what dot takes."""
    return min(most, max(16, 1 << (length - 1).bit_length()))


def _filled(x: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x, [(0, -x.shape[1] % block if axis == 1 else 0) for axis in range(x.ndim)])


def _extents(
    of: jax.Array, among: jax.Array, block: int, options: Options, of_queries: bool
) -> tuple[jax.Array, jax.Array]:
    """Return where what a block may meet begins and ends, int32 [B, blocks]: keys of queries, or queries of keys."""
    size, count = among.shape[1], of.shape[1] // block
    places = jnp.broadcast_to(jnp.arange(size), among.shape)
    rows = jnp.arange(len(among))[:, None]
    first = jnp.full((len(among), size + 1), size).at[rows, among].min(places, mode="drop")
    last = jnp.zeros((len(among), size + 1), jnp.int32).at[rows, among].max(places + 1, mode="drop")
    # Numbers beyond the table, which no packed row has, may be anywhere; padding is nowhere.
    begin, end = first.at[rows, of].get(mode="fill", fill_value=0), last.at[rows, of].get(mode="fill", fill_value=size)
    begin, end = jnp.where(of == 0, size, begin), jnp.where(of == 0, 0, end)
    begin = begin.reshape(-1, count, block).min(axis=2)
    end = end.reshape(-1, count, block).max(axis=2)
    starts = jnp.arange(count) * block
    if of_queries:
        if options.causal:
            end = jnp.minimum(end, starts + block)
        if options.window is not None:
            begin = jnp.maximum(begin, starts - options.window + 1)
    else:
        if options.causal:
            begin = jnp.maximum(begin, starts)
        if options.window is not None:
            end = jnp.minimum(end, starts + block + options.window - 1)
    return begin.astype(jnp.int32), end.astype(jnp.int32)
