"""The programs of `flash`: each works on blocks of one head, whose scores exist a block at a time.

Shape letters as in `layers`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from research.models.layers import random_bits

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # of scores; finite, so that the difference of two is no NaN


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


def forward_kernel(
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
    """Make the result of a block of queries, and the logarithms, to base 2, of the sums of exponentials."""
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
    operands: tuple[jax.Array, ...],
    rows: jax.Array,
    columns: jax.Array,
    visible: jax.Array,
    seed: tuple[jax.Array, ...],
    bias_ref: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the weights of a block after dropout, and the gradient by its scores.

    The operands are queries, keys, values, the result's cotangent, the logarithms of the sums of exponentials, and how
    far the result lies along its cotangent.
    """
    query, key, value, cotangent, log_sum, along = operands
    scores = _scores(options, query, key, _biased(options, bias_ref, rows, columns))
    weights = jnp.where(visible, jnp.exp2(scores - log_sum[:, None]), 0.0)
    by_weight = triton.dot(cotangent, value.T)
    dropped = weights
    if options.rate:
        kept = _kept(options, rows, columns, seed)
        dropped, by_weight = weights * kept, by_weight * kept
    return dropped, weights * (by_weight - along[:, None])


def query_kernel(
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
    """Make the gradient by a block of queries."""
    rows, places = pl.program_id(0) * sizes[0] + jnp.arange(sizes[0]), (pl.program_id(1), pl.program_id(2))
    query, of_query, cotangent = query_ref[...], queries_ref[...], cotangent_ref[...]
    log_sum, along, seed = log_sum_ref[...], along_ref[...], _seed(options, seed_ref, *places)

    def step(index: jax.Array, by_query: jax.Array) -> jax.Array:
        part = pl.ds(index * sizes[1], sizes[1])
        columns = index * sizes[1] + jnp.arange(sizes[1])
        key, value = key_ref[part, :], value_ref[part, :]
        visible = _visible(options, rows, columns, (of_query, keys_ref[part]))
        operands = query, key, value, cotangent, log_sum, along
        _, by_score = _by_score(options, operands, rows, columns, visible, seed, bias_ref)
        return by_query + triton.dot((by_score * options.scale).astype(key.dtype), key)

    start = jnp.zeros(query.shape, jnp.float32)
    by_query = jax.lax.fori_loop(*_blocks(begin_ref, end_ref, sizes[1]), step, start)
    by_query_ref[...] = by_query.astype(by_query_ref.dtype)


def key_kernel(
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
    """Make the gradients by a block of keys and of values."""
    columns, places = pl.program_id(0) * sizes[1] + jnp.arange(sizes[1]), (pl.program_id(1), pl.program_id(2))
    key, value, of_key, seed = key_ref[...], value_ref[...], keys_ref[...], _seed(options, seed_ref, *places)

    def step(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        by_key, by_value = carry
        part = pl.ds(index * sizes[0], sizes[0])
        rows = index * sizes[0] + jnp.arange(sizes[0])
        query, cotangent = query_ref[part, :], cotangent_ref[part, :]
        visible = _visible(options, rows, columns, (queries_ref[part], of_key))
        operands = query, key, value, cotangent, log_sum_ref[part], along_ref[part]
        weights, by_score = _by_score(options, operands, rows, columns, visible, seed, bias_ref)
        by_value += triton.dot(weights.astype(cotangent.dtype).T, cotangent)
        by_key += triton.dot((by_score * options.scale).astype(query.dtype).T, query)
        return by_key, by_value

    start = jnp.zeros(key.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32)
    by_key, by_value = jax.lax.fori_loop(*_blocks(begin_ref, end_ref, sizes[0]), step, start)
    by_key_ref[...] = by_key.astype(by_key_ref.dtype)
    by_value_ref[...] = by_value.astype(by_value_ref.dtype)


def bias_kernel(
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
    """Add up the gradient by the scores of the blocks on one diagonal, of one head and `batch` rows."""
    diagonal, head = pl.program_id(0) - (counts[0] - 1), pl.program_id(1)  # blocks of keys less blocks of queries
    begin, end = jnp.maximum(0, -diagonal), jnp.minimum(counts[0], counts[1] - diagonal)
    first = pl.program_id(2) * batch
    if options.causal:
        end = jnp.where(diagonal > 0, begin, end)

    def add(index: jax.Array, by_bias: jax.Array, row: jax.Array, seed: tuple[jax.Array, ...]) -> jax.Array:
        here, there = pl.ds(index * size, size), pl.ds((index + diagonal) * size, size)
        rows, columns = index * size + jnp.arange(size), (index + diagonal) * size + jnp.arange(size)
        visible = _visible(options, rows, columns, (queries_ref[row, here], keys_ref[row, there]))
        operands = (
            *(query_ref[row, here, :], key_ref[row, there, :], value_ref[row, there, :]),
            *(cotangent_ref[row, here, :], log_sum_ref[row, here], along_ref[row, here]),
        )
        return by_bias + _by_score(options, operands, rows, columns, visible, seed, bias_ref)[1]

    def add_row(row: jax.Array, by_bias: jax.Array) -> jax.Array:
        seed = _seed(options, seed_ref, first + row, head)
        return jax.lax.fori_loop(begin, end, functools.partial(add, row=row, seed=seed), by_bias)

    by_bias_ref[...] = jax.lax.fori_loop(0, batch, add_row, jnp.zeros((size, size), jnp.float32))
