"""Frozen kernels in fewer bits: packed once, and unpacked layer by layer where they are multiplied (Dettmers 2023).

A kernel [..., in, out] becomes two arrays beside each other: codes, int8 [..., in, out] or, of four bits, uint8
[..., in / 2, out], and float32 scales, [..., 1, out] or one for each block of inputs [..., in / block, out].
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.models import layers
from research.pretrained.pending import Pending
from research.pretrained.rounded import LEVELS

KERNEL, CODES, SCALES = "kernel", "kernel_codes", "kernel_scales"
FORMATS = ("float32", "bfloat16", "int8", *LEVELS)
BLOCK = 64  # inputs that share a scale in the formats of 4 bits


def pack(params: Mapping[str, Any], format: str) -> dict[str, Any]:
    """Return {path: leaf} with the kernels of stacked linear layers in a format of `FORMATS`.

    Leaves are arrays, what is still in its file, or shapes. Kernels are read and packed a layer at a time, so that
    all of them are never in memory in float32, unless the compiler sees them.

    Raises:
      UserError: a format of 4 bits cannot have whole blocks of a kernel's inputs.
    """
    packed: dict[str, Any] = {}
    for name, leaf in params.items():
        if format == "float32" or not _is_kernel(name, leaf):
            packed[name] = leaf
        elif format == "bfloat16":
            packed[name] = _each_layer(lambda kernel: {KERNEL: kernel.astype(jnp.bfloat16)}, leaf)[KERNEL]
        elif format in LEVELS and (leaf.shape[-2] % _block(leaf.shape[-2]) or leaf.shape[-2] % 2):
            raise UserError(
                f"config.task.base_format: '{format}' has blocks of {BLOCK} inputs, and {name} has {leaf.shape[-2]}; "
                "take int8"
            )
        else:
            parts = _each_layer(functools.partial(_pack, format=format), leaf)
            packed |= {name.removesuffix(KERNEL) + part: value for part, value in parts.items()}
    return packed


def unpack(params: Mapping[str, Any], format: str) -> dict[str, Any]:
    """Return {path: leaf} with float32 kernels; of shapes, their shapes."""
    plain: dict[str, Any] = {}
    for name, leaf in params.items():
        if name.endswith(CODES):
            place = name.removesuffix(CODES)
            parts = functools.partial(_unpack, format=format), leaf, params[place + SCALES]
            plain[place + KERNEL] = _made(*parts)
        elif format == "bfloat16" and _is_kernel(name, leaf):
            plain[name] = _made(lambda x: x.astype(jnp.float32), leaf)
        elif not name.endswith(SCALES):
            plain[name] = leaf
    return plain


def intercept(format: str, call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Multiply by the kernel that a linear layer has packed, see `nn.intercept_methods`."""
    module = context.module
    is_product = context.method_name == "multiply" and isinstance(module, layers.Dense)
    if not is_product or not module.has_variable("params", CODES):
        return call(*args, **kwargs)
    (x,) = args
    codes: jax.Array = module.get_variable("params", CODES)
    scales: jax.Array = module.get_variable("params", SCALES)
    return _product(format, x.astype(module.dtype), codes, scales)


def kernel_of(module: nn.Module, format: str) -> jax.Array:
    """Return the kernel [in, out] of a linear layer, packed or not, in float32."""
    if not module.has_variable("params", CODES):
        return jnp.asarray(module.get_variable("params", KERNEL), jnp.float32)
    return _unpack(module.get_variable("params", CODES), module.get_variable("params", SCALES), format)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(format: str, x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Return x [N, in] times the kernel, [N, out] in the dtype of x; the backward pass unpacks it again."""
    return x @ _unpack(codes, scales, format).astype(x.dtype)


def _forward(format: str, x: jax.Array, codes: jax.Array, scales: jax.Array) -> tuple[jax.Array, Any]:
    return _product(format, x, codes, scales), (codes, scales)


def _backward(format: str, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[Any, Any, Any]:
    codes, scales = jax.lax.optimization_barrier(kept)  # or the compiler keeps what is to be unpacked again
    kernel = _unpack(codes, scales, format).astype(cotangent.dtype)
    return cotangent @ kernel.T, np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(scales)


_product.defvjp(_forward, _backward)


def _block(inputs: int) -> int:
    """Return how many inputs share a scale: all of a kernel that has fewer."""
    return min(BLOCK, inputs)


def _pack(kernel: Any, format: str) -> dict[str, Any]:
    """Return the codes and scales of a kernel [..., in, out], in NumPy's arrays of NumPy's."""
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    if format == "int8":
        scales = xp.abs(kernel).max(axis=-2, keepdims=True) / np.float32(127)
        codes = xp.round(kernel / xp.where(scales == 0, np.float32(1), scales)).astype(np.int8)
        return {CODES: codes, SCALES: scales}
    *stack, inputs, outputs = kernel.shape
    blocks = kernel.reshape(*stack, -1, _block(inputs), outputs)
    scales = xp.abs(blocks).max(axis=-2, keepdims=True)
    shares = blocks / xp.where(scales == 0, np.float32(1), scales)
    levels = LEVELS[format].astype(np.float32)
    codes = sum((shares > middle).astype(np.uint8) for middle in (levels[1:] + levels[:-1]) / 2)
    low, high = xp.split(codes, 2, axis=-2)  # a byte holds an input of the block's first half and one of its second
    return {CODES: (low + 16 * high).reshape(*stack, inputs // 2, outputs), SCALES: scales[..., 0, :]}


def _unpack(codes: jax.Array, scales: jax.Array, format: str) -> jax.Array:
    """Return the float32 kernel [..., in, out] of codes and scales."""
    if format == "int8":
        return codes.astype(jnp.float32) * scales
    *stack, half, outputs = codes.shape
    blocks = codes.reshape(*stack, scales.shape[-2], -1, outputs)
    numbers = jnp.concatenate([blocks & 15, blocks >> 4], axis=-2)
    return (_level(numbers, format) * scales[..., None, :]).reshape(*stack, 2 * half, outputs)


def _level(numbers: jax.Array, format: str) -> jax.Array:
    """Return the levels float32 [...] of numbers of 4 bits [...].

    They are chosen bit by bit, which a compiler can do within a product's operand; a look-up in a table is a gather.
    """
    levels = [np.float32(level) for level in LEVELS[format]]
    choices: list[Any] = levels + levels[-1:] * (16 - len(levels))
    for bit in (1, 2, 4, 8):
        is_set = (numbers & bit) != 0
        choices = [jnp.where(is_set, high, low) for low, high in zip(choices[::2], choices[1::2])]
    return choices[0]


def _is_kernel(name: str, leaf: Any) -> bool:
    """Return whether a parameter is the kernels [layers, in, out] of a stack's linear layers."""
    return "layers" in name.split("/") and name.endswith(f"/{KERNEL}") and leaf.ndim == 3


def _each_layer(function: Any, leaf: Any) -> dict[str, Any]:
    """Return what a function makes of kernels [layers, in, out]; it sees one layer at a time where it can."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(function, leaf)
    if not isinstance(leaf, np.ndarray | Pending):
        return function(leaf)
    inside = (slice(None), slice(None))
    ranges = (slice(i, i + 1) for i in range(leaf.shape[0]))
    single = (leaf[i] if isinstance(leaf, np.ndarray) else leaf.parts([(i, *inside)])[0] for i in ranges)
    made = [function(kernel[0]) for kernel in single]
    return {name: np.stack([each[name] for each in made]) for name in made[0]}


def _made(function: Any, *leaves: Any) -> Any:
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    return jax.eval_shape(function, *leaves) if shapes else function(*leaves)
