"""Layer and root-mean-square normalisation for GPUs, in Pallas: one pass over the rows forward, and one backward.

XLA makes three passes of a forward norm after a residual sum and three of a backward one, 5.3 ms of a step of GPT-2 of
65 on an H200. Shape letters: N rows, D width, P programs of the backward pass, each of which adds up its rows' share of
the gradients by scale and bias.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from research.sharding import on_each_device

# Values that a program works on at once, and the programs of the backward pass: some for each processor.
BLOCK, PROGRAMS = 4096, 528
WIDTHS = range(256, BLOCK * 2 + 1)


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change from call to call.

    Attributes:
      centred: whether rows lose their mean, and are shifted at the end.
      epsilon: added to the variance, or the mean square.
      dtype: of the result.
      interpret: whether to run on any device, slowly.
    """

    centred: bool
    epsilon: float
    dtype: Any
    interpret: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, options: Options) -> jax.Array:
    """Return the norm of x [B, ..., D], computed in float32; `bias_D` is ignored where rows are not centred."""
    return _forward(x, scale_D, bias_D, options)[0]


def _forward(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, options: Options) -> tuple[jax.Array, Any]:
    def compute(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> tuple[jax.Array, ...]:
        rows_NxD = x.reshape(-1, x.shape[-1])
        count, width = rows_NxD.shape
        sizes = _sizes(width)
        numbers = jax.ShapeDtypeStruct((count,), jnp.float32)
        y_NxD, *kept = pl.pallas_call(
            functools.partial(_forward_kernel, options, sizes, (count, width)),
            grid=(pl.cdiv(count, sizes[0]),),
            out_shape=[jax.ShapeDtypeStruct(rows_NxD.shape, options.dtype), numbers, numbers],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
            interpret=options.interpret,
            name="norm_forward",
        )(rows_NxD, scale_D, bias_D)
        return y_NxD.reshape(x.shape), *(each.reshape(x.shape[:-1]) for each in kept)

    y, mean, inverse = on_each_device(compute, x, shared=(scale_D, bias_D))
    return y, (x, mean, inverse, scale_D)


def _backward(options: Options, kept: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale_D = kept

    def compute(
        x: jax.Array, cotangent: jax.Array, mean: jax.Array, inverse: jax.Array, scale_D: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows_NxD, cotangent_NxD = (array.reshape(-1, x.shape[-1]) for array in (x, cotangent))
        count, width = rows_NxD.shape
        sizes = _sizes(width)
        programs = min(PROGRAMS, pl.cdiv(count, sizes[0]))
        sums = jax.ShapeDtypeStruct((programs, width), jnp.float32)
        by_x, by_scale, by_bias = pl.pallas_call(
            functools.partial(_backward_kernel, options, sizes, (count, width), programs),
            grid=(programs,),
            out_shape=[jax.ShapeDtypeStruct(rows_NxD.shape, x.dtype), sums, sums],
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
            interpret=options.interpret,
            name="norm_backward",
        )(rows_NxD, cotangent_NxD, mean.reshape(-1), inverse.reshape(-1), scale_D)
        return by_x.reshape(x.shape), by_scale, by_bias

    by_x, by_scale_PxD, by_bias_PxD = on_each_device(compute, x, cotangent, mean, inverse, shared=(scale_D,))
    by_bias_D = by_bias_PxD.sum(axis=0)
    return by_x, by_scale_PxD.sum(axis=0), by_bias_D if options.centred else jnp.zeros_like(by_bias_D)


norm.defvjp(_forward, _backward)


def _sizes(width: int) -> tuple[int, int]:
    """Return the rows that a program works on at once, and their width as a power of two."""
    wide = pl.next_power_of_2(width)
    return max(BLOCK // wide, 1), wide


def _load(ref: Any, rows: jax.Array, columns: jax.Array, real: jax.Array) -> jax.Array:
    return triton.load(ref.at[rows[:, None], columns[None, :]], mask=real, other=0.0).astype(jnp.float32)


def _forward_kernel(
    options: Options,
    sizes: tuple[int, int],
    shape: tuple[int, int],
    x_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    y_ref: Any,
    mean_ref: Any,
    inverse_ref: Any,
) -> None:
    rows, columns = pl.program_id(0) * sizes[0] + jnp.arange(sizes[0]), jnp.arange(sizes[1])
    exists, inside = rows < shape[0], columns < shape[1]
    real = exists[:, None] & inside[None, :]
    x = _load(x_ref, rows, columns, real)
    mean = x.sum(axis=1) / shape[1] if options.centred else jnp.zeros(sizes[0])
    x = jnp.where(real, x - mean[:, None], 0.0)
    inverse = jax.lax.rsqrt((x * x).sum(axis=1) / shape[1] + options.epsilon)
    y = x * inverse[:, None] * triton.load(scale_ref.at[columns], mask=inside, other=0.0)
    if options.centred:
        y += triton.load(bias_ref.at[columns], mask=inside, other=0.0)
    triton.store(y_ref.at[rows[:, None], columns[None, :]], y.astype(y_ref.dtype), mask=real)
    triton.store(mean_ref.at[rows], mean, mask=exists)
    triton.store(inverse_ref.at[rows], inverse, mask=exists)


def _backward_kernel(
    options: Options,
    sizes: tuple[int, int],
    shape: tuple[int, int],
    programs: int,
    x_ref: Any,
    cotangent_ref: Any,
    mean_ref: Any,
    inverse_ref: Any,
    scale_ref: Any,
    by_x_ref: Any,
    by_scale_ref: Any,
    by_bias_ref: Any,
) -> None:
    columns, program = jnp.arange(sizes[1]), pl.program_id(0)
    inside = columns < shape[1]
    scale = triton.load(scale_ref.at[columns], mask=inside, other=0.0)

    def step(index: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = (index * programs + program) * sizes[0] + jnp.arange(sizes[0])
        exists = rows < shape[0]
        real = exists[:, None] & inside[None, :]
        x, cotangent = _load(x_ref, rows, columns, real), _load(cotangent_ref, rows, columns, real)
        inverse = triton.load(inverse_ref.at[rows], mask=exists, other=0.0)[:, None]
        if options.centred:
            x = jnp.where(real, x - triton.load(mean_ref.at[rows], mask=exists, other=0.0)[:, None], 0.0)
        normal, scaled = x * inverse, cotangent * scale
        along = (scaled * normal).sum(axis=1)[:, None] / shape[1]
        centre = scaled.sum(axis=1)[:, None] / shape[1] if options.centred else 0.0
        by_x = inverse * (scaled - centre - normal * along)
        triton.store(by_x_ref.at[rows[:, None], columns[None, :]], by_x.astype(by_x_ref.dtype), mask=real)
        return sums[0] + cotangent * normal, sums[1] + cotangent

    start = jnp.zeros(sizes, jnp.float32), jnp.zeros(sizes, jnp.float32)
    by_scale, by_bias = jax.lax.fori_loop(0, pl.cdiv(shape[0], sizes[0] * programs), step, start)
    for ref, sums in ((by_scale_ref, by_scale), (by_bias_ref, by_bias)):
        triton.store(ref.at[program, columns], sums.sum(axis=0), mask=inside)
