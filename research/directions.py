"""Directions for `config.optimizer.direction` that optax has in parts: Adafactor and Muon.

A direction turns gradients into what the learning rate is multiplied by, as optax's `scale_by_...` transformations do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from research.task import Params


def adafactor(
    decay_rate: float = 0.8,
    min_dim_size_to_factor: int = 128,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    momentum: float | None = None,
) -> optax.GradientTransformation:
    """Return Adafactor (Shazeer 2018), layer by layer where layers are stacked.

    Args:
      decay_rate: exponent of the second moment's decay, 1 - t ** -decay_rate.
      min_dim_size_to_factor: matrices with a smaller second-largest dimension keep a whole second moment.
      clipping_threshold: greatest root mean square of an update; None does not clip.
      multiply_by_parameter_scale: whether the learning rate is relative to a parameter's root mean square.
      momentum: decay of an average of the updates; None for none.
    """
    parts = [optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor)]
    if clipping_threshold is not None:
        parts.append(_stateless(lambda update, _: update / jnp.maximum(1.0, _rms(update) / clipping_threshold)))
    if multiply_by_parameter_scale:
        # The floor lets parameters that are initialised to 0 move (Shazeer 2018, section 8).
        parts.append(_stateless(lambda update, param: update * jnp.maximum(_rms(param), 1e-3)))
    if momentum is not None:
        parts.append(optax.ema(momentum, debias=False))
    return optax.chain(*parts)


def muon(
    beta: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    consistent_rms: float | None = 0.2,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Return Muon (Jordan 2024) for the kernels of stacked layers, each orthogonalised alone, and Adam for the rest.

    Args:
      beta: decay of Muon's momentum.
      nesterov: whether the momentum looks ahead.
      ns_steps: Newton-Schulz iterations.
      consistent_rms: root mean square of Muon's updates, near that of Adam's so that one learning rate serves both (Liu
        2025, section 2.2); None scales by the square root of outputs / inputs where that is above 1 (Jordan 2024).
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      epsilon: of Adam.
    """

    def axes(params: Params) -> Any:
        return jax.tree.map(lambda p: MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params)

    def scale(update: jax.Array, _: jax.Array) -> jax.Array:
        inputs, outputs = update.shape
        if consistent_rms is None:
            return update * math.sqrt(max(1, outputs / inputs))
        return update * consistent_rms * math.sqrt(max(inputs, outputs))

    matrices = optax.chain(
        scale_by_muon(beta=beta, nesterov=nesterov, ns_steps=ns_steps, weight_dimension_numbers=axes),
        _stateless(scale),
    )
    return optax.partition({"muon": matrices, "adam": optax.scale_by_adam(b1, b2, epsilon)}, _muon_labels)


def _muon_labels(params: Params) -> Any:
    """Return "muon" for the kernels [layers, inputs, outputs] of stacked layers, "adam" for all else."""

    def label(keys: tuple, leaf: jax.Array) -> str:
        return "muon" if _is_stacked(keys) and str(keys[-1].key) == "kernel" and leaf.ndim == 3 else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _is_stacked(keys: tuple) -> bool:
    return "layers" in [str(key.key) for key in keys[:-1]]


def _stateless(scale: Callable[[jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Return a transformation of every layer's (update, parameter), alone where layers are stacked."""

    def of_leaf(keys: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        return (jax.vmap(scale) if _is_stacked(keys) else scale)(update, param)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(of_leaf, updates, params))


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))
