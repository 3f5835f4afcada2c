"""The cross-entropy over a vocabulary, whose logits and their gradient never exist all at once.

Shape letters: B rows, T positions, D width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research import sharding
from research.metrics import weighted
from research.task import Params

try:
    from research.tasks import fused_cross_entropy
except ImportError:  # JAX 0.12 announces that it will drop what this is written in
    fused_cross_entropy = None  # type: ignore[assignment]

# Bytes of logits that exist on a device at once, at most. Each block adds to the gradient of the whole vocabulary's
# weights, so that many small ones cost more than they save.
MOST_BYTES = 2**30

Sums = Callable[..., tuple[jax.Array, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def token_losses(
    logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy of logits [..., V] with targets int [...], and whether the target is the likeliest.

    Args:
      logits: of any float dtype; computed with in float32.
      targets: the right ids.
      label_smoothing: share of the probability spread evenly over the vocabulary (Szegedy 2016, section 7).
      z_loss: what the squared logarithm of the normaliser is multiplied by before it is added, so that logits stay
        small (Chowdhery 2022, section 5).

    Returns:
      two float32 [...]. Of n equal largest logits, one of which is the target's, 1 / n counts as right: those of
      bfloat16 products are often equal.
    """
    losses, right, _ = _forward(logits, targets, label_smoothing, z_loss)
    return losses, right


def _forward(
    logits: jax.Array, targets: jax.Array, label_smoothing: float, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the losses, what is right and the logarithms of the normalisers, in two passes over the logits."""
    # The largest logit is compared with the target's, as an argmax over a vocabulary is slow on CPUs. What is picked is
    # picked before the conversion, so that no compiler keeps a converted copy for it.
    largest = logits.max(axis=-1).astype(jnp.float32)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)
    precise = logits.astype(jnp.float32)
    normaliser = largest + jnp.log(jnp.exp(precise - largest[..., None]).sum(axis=-1))
    equals = (precise == largest[..., None]).sum(axis=-1, dtype=jnp.float32)
    expected = of_target
    if label_smoothing:
        expected = (1 - label_smoothing) * of_target + label_smoothing * precise.mean(axis=-1)
    losses = normaliser - expected + z_loss * jnp.square(normaliser)
    return losses, jnp.where(of_target >= largest, 1.0 / equals, 0.0), normaliser


def _keep(logits: jax.Array, targets: jax.Array, label_smoothing: float, z_loss: float) -> tuple[Any, Any]:
    losses, right, normaliser = _forward(logits, targets, label_smoothing, z_loss)
    return (losses, right), (logits, targets, normaliser)


def _backward(label_smoothing: float, z_loss: float, kept: Any, cotangents: Any) -> tuple[jax.Array, None]:
    """Return the gradient by the logits in one pass over them: the probabilities less what they should be."""
    logits, targets, normaliser = kept
    probabilities = jnp.exp(logits.astype(jnp.float32) - normaliser[..., None])
    vocab_size = logits.shape[-1]
    is_target = targets[..., None] == jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    wanted = jnp.where(is_target, 1.0 - label_smoothing, 0.0) + label_smoothing / vocab_size
    scale = 1.0 + 2.0 * z_loss * normaliser[..., None]
    gradient = cotangents[0][..., None] * (scale * probabilities - wanted)
    return gradient.astype(logits.dtype), None


token_losses.defvjp(_keep, _backward)


def sums(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the weighted sums of `token_losses`, of the losses without smoothing and z-loss, and of what is right.

    Only the first has a gradient. On GPUs a kernel makes it while it reads the logits, where one device has all of a
    row's, and they come as a product of 16 bits made them: converted ones would have to be written first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    served = fused_cross_entropy is not None and sharding.platform() == "gpu" and logits_BxTxV.dtype.itemsize == 2
    compute = _fused_sums if served and (mesh.empty or mesh.shape["model"] == 1) else _plain_sums
    return compute(logits_BxTxV, targets_BxT, weights_BxT, label_smoothing, z_loss)


def _plain_sums(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, label_smoothing: float, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    losses, right = token_losses(logits, targets, label_smoothing, z_loss)
    plain = token_losses(logits, targets)[0] if label_smoothing or z_loss else losses
    return weighted(losses, weights).sum(), weighted(plain, weights).sum(), weighted(right, weights).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _fused_sums(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    label_smoothing: float,
    z_loss: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del interpret  # of the kernel, which pays where there is a gradient to make
    return _plain_sums(logits, targets, weights, label_smoothing, z_loss)


def _fused_forward(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    label_smoothing: float,
    z_loss: float,
    interpret: bool,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    def compute(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        rows = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)
        *numbers, gradient = fused_cross_entropy.losses_and_gradient(*rows, label_smoothing, z_loss, interpret)
        return *(x.reshape(weights.shape) for x in numbers), gradient.reshape(logits.shape)

    *numbers, gradient = sharding.on_each_device(compute, logits, targets, weights)
    losses, plain, right = (weighted(x, weights).sum() for x in numbers)
    return (losses, plain, right), gradient


def _fused_backward(
    label_smoothing: float, z_loss: float, interpret: bool, gradient: jax.Array, cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, None, None]:
    return (gradient * cotangents[0]).astype(gradient.dtype), None, None


_fused_sums.defvjp(_fused_forward, _fused_backward)


def block_size(shape: tuple[int, int, int], dtype: Any) -> int:
    """Return how many positions of every row to compute the logits of at once, so that a device can hold them.

    Args:
      shape: of all logits, [B, T, V].
      dtype: of the product that makes them.
    """
    batch, length, vocab_size = shape
    rows = -(-batch // sharding.batch_ways())
    count = math.ceil(rows * length * vocab_size * jnp.dtype(dtype).itemsize / MOST_BYTES)
    return -(-length // count)


def in_blocks(
    sums: Sums, block: int, params: Params, hidden_BxTxD: jax.Array, *others: jax.Array
) -> tuple[jax.Array, ...]:
    """Add up `sums` over blocks of positions; where a gradient is asked for, make it in the same pass.

    Only the first sum has a gradient: by the parameters and by the hidden states.

    Args:
      sums: maps parameters, hidden states [B, block, D] and the others' blocks to float32 scalars.
      block: positions.
      params: the model's parameters, not all of which `sums` needs to use.
      hidden_BxTxD: hidden states.
      *others: arrays [B, T]; the last positions may be filled up with zeros.
    """
    own, join = _used(sums, params, hidden_BxTxD, *others)
    blocks = [_split(x, block) for x in (hidden_BxTxD, *others)]

    def value(own: list[jax.Array], blocks: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return _add_up(lambda part: (sums(join(own), *part), None), blocks)[0]

    def forward(own: list[jax.Array], blocks: Sequence[jax.Array]) -> tuple[Any, Any]:
        def loss(own: list[jax.Array], *part: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            first, *rest = sums(join(own), *part)
            return first, tuple(rest)

        def one(part: Sequence[jax.Array]) -> tuple[Any, jax.Array]:
            (first, rest), (by_own, by_hidden) = jax.value_and_grad(loss, (0, 1), has_aux=True)(own, *part)
            return ((first, *rest), by_own), by_hidden

        (totals, by_own), by_hidden = _add_up(one, blocks)
        return totals, (by_own, by_hidden)

    def backward(gradients: Any, cotangents: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        by_own, by_hidden = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
        return by_own, [by_hidden, *[None] * len(others)]

    total = jax.custom_vjp(value)
    total.defvjp(forward, backward)
    return total(own, blocks)


def by_row(sums: Callable[..., jax.Array], block: int, hidden_BxTxD: jax.Array, *others: jax.Array) -> jax.Array:
    """Return what `sums` gives each row, [B], added up over blocks of positions; each is computed again for a gradient.

    Unlike `in_blocks` the gradient may be of any function of the sums, and is known once all of them are.

    Args:
      sums: maps hidden states [B, block, D] and the others' blocks to float32 [B].
      block: positions.
      hidden_BxTxD: hidden states.
      *others: arrays [B, T]; the last positions may be filled up with zeros.
    """
    if block >= hidden_BxTxD.shape[1]:
        return sums(hidden_BxTxD, *others)
    blocks = [_split(x, block) for x in (hidden_BxTxD, *others)]

    @jax.checkpoint
    def add(total_B: jax.Array, part: Sequence[jax.Array]) -> tuple[jax.Array, None]:
        return total_B + sums(*part), None

    return jax.lax.scan(add, jnp.zeros(hidden_BxTxD.shape[0], jnp.float32), blocks)[0]


def _add_up(one: Callable[[Sequence[jax.Array]], tuple[Any, Any]], blocks: Sequence[jax.Array]) -> tuple[Any, Any]:
    """Return the sum of what `one` returns first of each block, and all that it returns second, stacked."""
    if len(blocks[0]) == 1:
        total, rest = one([x[0] for x in blocks])
        return total, jax.tree.map(lambda x: x[None], rest)
    shapes = jax.eval_shape(lambda blocks: one([x[0] for x in blocks])[0], blocks)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(total: Any, part: Sequence[jax.Array]) -> tuple[Any, Any]:
        new, rest = one(part)
        return jax.tree.map(jnp.add, total, new), rest

    return jax.lax.scan(step, zeros, blocks)


def _split(x: jax.Array, block: int) -> jax.Array:
    """Reshape [B, T, ...] to [blocks, B, block, ...], filled up with zeros."""
    count = -(-x.shape[1] // block)
    x = jnp.pad(x, [(0, 0), (0, count * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], count, block, *x.shape[2:]).swapaxes(0, 1)


def _used(sums: Sums, params: Params, *arguments: jax.Array) -> tuple[list[jax.Array], Callable[[list], Params]]:
    """Return the leaves of the parameters that `sums` uses, so that none else gets a gradient, and how to join them."""
    leaves, tree = jax.tree.flatten(params)
    jaxpr = jax.make_jaxpr(sums)(params, *arguments).jaxpr
    read = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
    uses = [id(variable) in read for variable in jaxpr.invars[: len(leaves)]]

    def join(own: list[jax.Array]) -> Params:
        rest = iter(own)
        return jax.tree.unflatten(tree, [next(rest) if use else None for use in uses])

    return [leaf for leaf, use in zip(leaves, uses) if use], join
