"""Flash attention for GPUs, in Pallas: what cuDNN's lacks, which is documents in a row and dropout of weights.

The algorithm is that of Dao 2023 ("FlashAttention-2"): scores exist a block at a time, and are computed again in the
backward pass. Blocks of keys that no query of a block may attend to are skipped, so that a packed row costs what its
documents would alone. Shape letters as in `layers`; a program works on one block of one head of one row.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from research.models.layers import random_bits
from research.models.positions import by_distance

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # of scores; finite, so that the difference of two is no NaN
# Blocks: of what a program holds, and of what it goes through. On an H200, 32 packed rows of 1,024 tokens in 12 heads
# of 64 took 0.58 ms both ways; 0.79 ms with 128 and 64, 1.28 with 128 and 128, 0.61 with 64 and 32.
WIDE, NARROW = 64, 64


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change from call to call.

    Attributes:
      causal: whether queries attend to no later key.
      window: queries attend to the last `window` keys only; None for all.
      scale: what scores are multiplied by.
      rate: of the dropout.
      biased: whether scores have a bias by distance.
      heads: of the whole model, on all devices.
      lengths: of queries and keys, without what fills up blocks; with `heads`, they number the weights for dropout.
      interpret: whether to run on any device, slowly.
    """

    causal: bool
    window: int | None
    scale: float
    rate: float
    biased: bool
    heads: int
    lengths: tuple[int, int]
    interpret: bool = False


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
        functools.partial(_forward_kernel, options, sizes),
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
        functools.partial(_query_kernel, options, (wide, narrow)),
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
        functools.partial(_key_kernel, options, (narrow, wide)),
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
        functools.partial(_bias_kernel, options, block, counts, rows),
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


def _blocks(begin_ref: Any, end_ref: Any, block: int) -> tuple[jax.Array, jax.Array]:
    """Return the first block that this program meets, and the one after the last."""
    place = pl.program_id(0)
    begin, end = begin_ref[place], end_ref[place]
    return jax.lax.div(begin, jnp.int32(block)), jax.lax.div(end + (block - 1), jnp.int32(block))


def _visible(options: Options, rows: jax.Array, columns: jax.Array, numbers: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return which keys, at `columns`, the queries at `rows` may attend to, by place and document number."""
    visible = (numbers[0][:, None] == numbers[1][None, :]) & (numbers[0] != 0)[:, None]
    if options.causal:
        visible &= columns[None, :] <= rows[:, None]
    if options.window is not None:
        visible &= columns[None, :] > rows[:, None] - options.window
    return visible


def _biased(options: Options, bias_ref: Any, rows: jax.Array, columns: jax.Array) -> jax.Array | float:
    """Return the bias of a block of scores, by the distance of each."""
    if not options.biased:
        return 0.0
    places = columns[None, :] - rows[:, None] + (options.lengths[0] - 1)
    return bias_ref[jnp.clip(places, 0, sum(options.lengths) - 2)]  # what fills up a block is masked


def _seed(options: Options, seed_ref: Any, row: jax.Array, head: jax.Array) -> tuple[jax.Array, ...]:
    """Return the two words of the dropout, and the number of a head's first line in the scores of all."""
    row = seed_ref[2] + row.astype(jnp.uint32)
    head = seed_ref[3] + head.astype(jnp.uint32)
    line = (row * jnp.uint32(options.heads) + head) * jnp.uint32(options.lengths[0])
    return seed_ref[0], seed_ref[1], line


def _kept(options: Options, rows: jax.Array, columns: jax.Array, seed: tuple[jax.Array, ...]) -> jax.Array:
    """Return what dropout makes of each weight, as `attention` would: 0 or 1 / (1 - rate)."""
    first, second, line = seed
    lines = (line + rows.astype(jnp.uint32)) * jnp.uint32(options.lengths[1])
    bits = random_bits(first, second, lines[:, None] + columns.astype(jnp.uint32)[None, :])
    return jnp.where(bits >= jnp.uint32(round(options.rate * 2**32)), 1.0 / (1.0 - options.rate), 0.0)


def _forward_kernel(
    options: Options,
    sizes: tuple[int, int],
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    queries_ref: Any,
    keys_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    seed_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    log_sum_ref: Any,
) -> None:
    rows, places = pl.program_id(0) * sizes[0] + jnp.arange(sizes[0]), (pl.program_id(1), pl.program_id(2))
    query, of_query, seed = query_ref[...], queries_ref[...], _seed(options, seed_ref, *places)

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, largest, total = carry
        part = pl.ds(index * sizes[1], sizes[1])
        columns = index * sizes[1] + jnp.arange(sizes[1])
        visible = _visible(options, rows, columns, (of_query, keys_ref[part]))
        bias = _biased(options, bias_ref, rows, columns)
        scores = jnp.where(visible, _scores(options, query, key_ref[part, :], bias), LOWEST)
        larger = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - larger[:, None]), 0.0)
        shrunk = jnp.exp2(largest - larger)
        total = total * shrunk + weights.sum(axis=1)
        if options.rate:
            weights *= _kept(options, rows, columns, seed)
        out = out * shrunk[:, None] + triton.dot(weights.astype(value_ref.dtype), value_ref[part, :])
        return out, larger, total

    start = jnp.zeros(query.shape, jnp.float32), jnp.full(sizes[0], LOWEST), jnp.zeros(sizes[0])
    out, largest, total = jax.lax.fori_loop(*_blocks(begin_ref, end_ref, sizes[1]), step, start)
    total = jnp.where(total == 0, 1.0, total)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = largest + jnp.log2(total)


def _scores(options: Options, query: jax.Array, key: jax.Array, bias: jax.Array | float) -> jax.Array:
    """Return the scores of a block, for powers of two."""
    return (triton.dot(query, key.T) * options.scale + bias) * LOG2_E


def _by_score(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    log_sum: jax.Array,
    along: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    visible: jax.Array,
    seed: tuple[jax.Array, ...],
    bias_ref: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the weights of a block after dropout, and the gradient by its scores."""
    scores = _scores(options, query, key, _biased(options, bias_ref, rows, columns))
    weights = jnp.where(visible, jnp.exp2(scores - log_sum[:, None]), 0.0)
    by_weight = triton.dot(cotangent, value.T)
    dropped = weights
    if options.rate:
        kept = _kept(options, rows, columns, seed)
        dropped, by_weight = weights * kept, by_weight * kept
    return dropped, weights * (by_weight - along[:, None])


def _query_kernel(
    options: Options,
    sizes: tuple[int, int],
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    queries_ref: Any,
    keys_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    seed_ref: Any,
    bias_ref: Any,
    cotangent_ref: Any,
    log_sum_ref: Any,
    along_ref: Any,
    by_query_ref: Any,
) -> None:
    rows, places = pl.program_id(0) * sizes[0] + jnp.arange(sizes[0]), (pl.program_id(1), pl.program_id(2))
    query, of_query, cotangent = query_ref[...], queries_ref[...], cotangent_ref[...]
    log_sum, along, seed = log_sum_ref[...], along_ref[...], _seed(options, seed_ref, *places)

    def step(index: jax.Array, by_query: jax.Array) -> jax.Array:
        part = pl.ds(index * sizes[1], sizes[1])
        columns = index * sizes[1] + jnp.arange(sizes[1])
        key, value = key_ref[part, :], value_ref[part, :]
        block = rows, columns, _visible(options, rows, columns, (of_query, keys_ref[part])), seed, bias_ref
        _, by_score = _by_score(options, query, key, value, cotangent, log_sum, along, *block)
        return by_query + triton.dot((by_score * options.scale).astype(key.dtype), key)

    start = jnp.zeros(query.shape, jnp.float32)
    by_query = jax.lax.fori_loop(*_blocks(begin_ref, end_ref, sizes[1]), step, start)
    by_query_ref[...] = by_query.astype(by_query_ref.dtype)


def _key_kernel(
    options: Options,
    sizes: tuple[int, int],
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    queries_ref: Any,
    keys_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    seed_ref: Any,
    bias_ref: Any,
    cotangent_ref: Any,
    log_sum_ref: Any,
    along_ref: Any,
    by_key_ref: Any,
    by_value_ref: Any,
) -> None:
    columns, places = pl.program_id(0) * sizes[1] + jnp.arange(sizes[1]), (pl.program_id(1), pl.program_id(2))
    key, value, of_key, seed = key_ref[...], value_ref[...], keys_ref[...], _seed(options, seed_ref, *places)

    def step(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        by_key, by_value = carry
        part = pl.ds(index * sizes[0], sizes[0])
        rows = index * sizes[0] + jnp.arange(sizes[0])
        query, cotangent = query_ref[part, :], cotangent_ref[part, :]
        block = rows, columns, _visible(options, rows, columns, (queries_ref[part], of_key)), seed, bias_ref
        statistics = log_sum_ref[part], along_ref[part]
        weights, by_score = _by_score(options, query, key, value, cotangent, *statistics, *block)
        by_value += triton.dot(weights.astype(cotangent.dtype).T, cotangent)
        by_key += triton.dot((by_score * options.scale).astype(query.dtype).T, query)
        return by_key, by_value

    start = jnp.zeros(key.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32)
    by_key, by_value = jax.lax.fori_loop(*_blocks(begin_ref, end_ref, sizes[0]), step, start)
    by_key_ref[...] = by_key.astype(by_key_ref.dtype)
    by_value_ref[...] = by_value.astype(by_value_ref.dtype)


def _bias_kernel(
    options: Options,
    size: int,
    counts: tuple[int, int],
    batch: int,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    queries_ref: Any,
    keys_ref: Any,
    seed_ref: Any,
    bias_ref: Any,
    cotangent_ref: Any,
    log_sum_ref: Any,
    along_ref: Any,
    by_bias_ref: Any,
) -> None:
    diagonal, head = pl.program_id(0) - (counts[0] - 1), pl.program_id(1)  # blocks of keys less blocks of queries
    begin, end = jnp.maximum(0, -diagonal), jnp.minimum(counts[0], counts[1] - diagonal)
    first = pl.program_id(2) * batch
    if options.causal:
        end = jnp.where(diagonal > 0, begin, end)

    def add(index: jax.Array, by_bias: jax.Array, row: jax.Array, seed: tuple[jax.Array, ...]) -> jax.Array:
        here, there = pl.ds(index * size, size), pl.ds((index + diagonal) * size, size)
        rows, columns = index * size + jnp.arange(size), (index + diagonal) * size + jnp.arange(size)
        visible = _visible(options, rows, columns, (queries_ref[row, here], keys_ref[row, there]))
        operands = query_ref[row, here, :], key_ref[row, there, :], value_ref[row, there, :]
        statistics = cotangent_ref[row, here, :], log_sum_ref[row, here], along_ref[row, here]
        return by_bias + _by_score(options, *operands, *statistics, rows, columns, visible, seed, bias_ref)[1]

    def add_row(row: jax.Array, by_bias: jax.Array) -> jax.Array:
        seed = _seed(options, seed_ref, first + row, head)
        return jax.lax.fori_loop(begin, end, functools.partial(add, row=row, seed=seed), by_bias)

    by_bias_ref[...] = jax.lax.fori_loop(0, batch, add_row, jnp.zeros((size, size), jnp.float32))
