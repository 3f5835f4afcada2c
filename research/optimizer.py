"""AdamW and gradient descent as optax chains, with schedules, clipping, decay masks, freezing and rates by path.

A path reads "encoder/layers/3/attention/query/kernel": below a module named "layers", whose parameters are stacked on a
leading axis, every layer has a path of its own, so that one regular expression can name a layer, a range or all.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.errors import UserError, nearest
from research.task import Params

Rules = Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation and what the step needs to know of it.

    Attributes:
      init: params -> state.
      update: (gradients, state, params) -> (updates, state).
      learning_rate: step -> float.
      trainable: gradients -> those that are not frozen.
      microbatches: parts into which a batch is split to save memory; the gradient is that of the whole batch.
    """

    init: Callable[[Params], optax.OptState]
    update: Callable[..., tuple[Params, optax.OptState]]
    learning_rate: optax.Schedule
    trainable: Callable[[Params], Params]
    microbatches: int


def adamw(
    num_steps: int,
    learning_rate: float,
    schedule: str = "linear",
    warmup: int | float = 0,
    end_factor: float = 0.0,
    drop_at: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = (r"bias$", r"scale$"),
    clip_norm: float | None = 1.0,
    microbatches: int = 1,
    freeze: tuple[str, ...] = (),
    learning_rate_multipliers: tuple[tuple[str, float], ...] = (),
    layer_decay: float | None = None,
    average: float | None = None,
) -> Optimizer:
    """Returns AdamW (Loshchilov 2019).

    Args:
      num_steps: length of the run, which the schedules need.
      learning_rate: the peak.
      schedule: "linear", "cosine", "inverse_sqrt", "constant" or "step", after a linear warm-up from 0.
      warmup: a share of `num_steps` below 1, else steps.
      end_factor: what part of the peak "linear", "cosine" and "step" end at.
      drop_at: the share of the run after which "step" falls to that.
      b1: decay of the first moment.
      b2: decay of the second moment.
      epsilon: added to the root of the second moment.
      weight_decay: decoupled, times the learning rate.
      no_decay: regular expressions; parameters whose path one of them finds are not decayed.
      clip_norm: gradients of a greater global norm are scaled down to it; None leaves them.
      microbatches: see Optimizer.
      freeze: regular expressions of parameters that must not change.
      learning_rate_multipliers: (regular expression, factor); the first that finds a path counts.
      layer_decay: factor a layer, from the head (1) down to the embeddings (Clark 2020, section 3.1.2).
      average: decay of an exponential moving average of the parameters, which is then what is evaluated.

    Raises:
      UserError: an argument is out of range, or a regular expression finds no parameter.
    """
    _check(b1=b1, b2=b2)
    return _make(
        optax.scale_by_adam(b1, b2, epsilon),
        make_schedule(schedule, learning_rate, warmup, num_steps, end_factor, drop_at),
        weight_decay=weight_decay,
        no_decay=no_decay,
        clip_norm=clip_norm,
        microbatches=microbatches,
        freeze=freeze,
        learning_rate_multipliers=learning_rate_multipliers,
        layer_decay=layer_decay,
        average=average,
    )


def sgd(
    num_steps: int,
    learning_rate: float,
    momentum: float = 0.9,
    schedule: str = "linear",
    warmup: int | float = 0,
    end_factor: float = 0.0,
    drop_at: float | None = None,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = (r"bias$", r"scale$"),
    clip_norm: float | None = 1.0,
    microbatches: int = 1,
    freeze: tuple[str, ...] = (),
    learning_rate_multipliers: tuple[tuple[str, float], ...] = (),
    layer_decay: float | None = None,
    average: float | None = None,
) -> Optimizer:
    """Returns gradient descent with momentum, whose sum of past gradients shrinks by `momentum` a step (Polyak 1964).

    The other arguments are those of `adamw`; its weight decay is decoupled too.
    """
    _check(momentum=momentum)
    return _make(
        optax.trace(momentum),
        make_schedule(schedule, learning_rate, warmup, num_steps, end_factor, drop_at),
        weight_decay=weight_decay,
        no_decay=no_decay,
        clip_norm=clip_norm,
        microbatches=microbatches,
        freeze=freeze,
        learning_rate_multipliers=learning_rate_multipliers,
        layer_decay=layer_decay,
        average=average,
    )


def _make(
    direction: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    weight_decay: float,
    no_decay: tuple[str, ...],
    clip_norm: float | None,
    microbatches: int,
    freeze: tuple[str, ...],
    learning_rate_multipliers: tuple[tuple[str, float], ...],
    layer_decay: float | None,
    average: float | None,
) -> Optimizer:
    """Returns the chain around what makes a direction of a gradient."""
    _check(weight_decay=weight_decay, microbatches=microbatches, average=average)
    frozen: Rules = tuple((pattern, 0.0) for pattern in freeze)
    trainable = functools.partial(_scale, functools.partial(path_values, rules=frozen))

    def factors(params: Params) -> Params:
        tree = path_values(params, rules=(*frozen, *learning_rate_multipliers))
        return tree if layer_decay is None else jax.tree.map(jnp.multiply, tree, _layer_decay(params, layer_decay))

    chain = [optax.stateless(lambda updates, params: trainable(updates))]
    if clip_norm is not None:
        chain.append(optax.clip_by_global_norm(clip_norm))
    # A parameter that is frozen altogether needs no moments.
    chain.append(
        optax.masked(
            direction, lambda p: jax.tree.map(lambda v: not np.isscalar(v) or v != 0.0, path_values(p, frozen))
        )
        if freeze
        else direction
    )
    if weight_decay:
        decay = functools.partial(path_values, rules=tuple((pattern, 0.0) for pattern in no_decay))
        chain.append(
            optax.stateless(lambda u, p: jax.tree.map(lambda u, p, d: u + weight_decay * d * p, u, p, decay(p)))
        )
    if freeze or learning_rate_multipliers or layer_decay is not None:
        chain.append(optax.stateless(lambda updates, params: _scale(factors, updates)))
    chain.append(optax.scale_by_learning_rate(rate))
    if average is not None:
        chain.append(average_params(average))
    transformation = optax.chain(*chain)

    def init(params: Params) -> optax.OptState:
        for key, patterns in {
            "freeze": freeze,
            "learning_rate_multipliers": [pattern for pattern, _ in learning_rate_multipliers],
        }.items():
            _check_patterns(key, patterns, params)
        return transformation.init(params)

    return Optimizer(init, transformation.update, rate, trainable, microbatches)


def make_schedule(
    name: str, peak: float, warmup: int | float, num_steps: int, end_factor: float, drop_at: float | None = None
) -> optax.Schedule:
    """Returns step -> learning rate: a linear warm-up from 0 to `peak`, then the named decay."""
    _check(learning_rate=peak)
    if warmup >= 1 and warmup != int(warmup):
        raise UserError(
            f"config.optimizer.warmup: {warmup} is no number of steps; a share of the run must lie in [0, 1)"
        )
    warmup_steps = int(warmup) if warmup >= 1 else math.ceil(warmup * num_steps)
    if not 0 <= warmup_steps <= num_steps:
        raise UserError(f"config.optimizer.warmup: {warmup_steps} steps do not fit a run of {num_steps}")
    if (drop_at is not None) != (name == "step") or not 0 <= (drop_at or 0) <= 1:
        raise UserError("config.optimizer.drop_at: schedule 'step' needs it, in [0, 1], and no other takes it")
    decay_steps = max(num_steps - warmup_steps, 1)
    drop = max(math.ceil((drop_at or 0) * num_steps) - warmup_steps, 0)
    decays: dict[str, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, peak * end_factor, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, end_factor),
        "constant": optax.constant_schedule(peak),
        "step": optax.piecewise_constant_schedule(peak, {drop: end_factor}),
        "inverse_sqrt": lambda step: peak * jnp.sqrt(max(warmup_steps, 1) / (step + max(warmup_steps, 1))),
    }
    if name not in decays:
        raise UserError(f"config.optimizer.schedule: unknown '{name}'{nearest(name, decays)}")
    if end_factor and name not in ("linear", "cosine", "step"):
        raise UserError(f"config.optimizer.end_factor: schedule '{name}' takes none")
    if warmup_steps == 0:
        return decays[name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decays[name]], [warmup_steps])


class AverageState(NamedTuple):
    """The state of `average_params`."""

    updates: jax.Array
    average: Params


def average_params(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters as they are after each update; put it last in a chain.

    At first it forgets faster, with the decay (1 + t) / (10 + t) of update t as long as that is smaller, so that the
    initial parameters do not stay in it (as TensorFlow's ExponentialMovingAverage does with `num_updates`).
    """

    def init(params: Params) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(updates: Params, state: AverageState, params: Params, **_: Any) -> tuple[Params, AverageState]:
        new = optax.apply_updates(params, updates)
        kept = jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
        average = jax.tree.map(lambda a, p: kept * a + (1 - kept) * p, state.average, new)
        return updates, AverageState(state.updates + 1, average)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(params: Params, opt_state: optax.OptState) -> Params:
    """Returns the averaged parameters where the optimizer keeps them, else `params`."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, AverageState))
    return next((state.average for state in states if isinstance(state, AverageState)), params)


def paths(params: Params) -> Params:
    """Returns a tree of lists of paths: one for a plain parameter, one a layer for a stacked one."""

    def of_leaf(keys: tuple, leaf: jax.Array) -> list[str]:
        names = [str(key.key) for key in keys]
        if "layers" not in names[:-1]:
            return ["/".join(names)]
        at = names.index("layers") + 1
        return ["/".join([*names[:at], str(layer), *names[at:]]) for layer in range(leaf.shape[0])]

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def path_values(params: Params, rules: Rules) -> Params:
    """Returns for each parameter the value of the first rule that finds its path, 1 where none does.

    The value of a stacked parameter is an array [layers, 1, ...] where its layers differ, else a float.
    """

    def value(path: str) -> float:
        return next((value for pattern, value in rules if re.search(pattern, path)), 1.0)

    def of_leaf(names: list[str], leaf: jax.Array) -> float | np.ndarray:
        values = [value(name) for name in names]
        if len(set(values)) == 1:
            return values[0]
        return np.asarray(values, np.float32).reshape(-1, *[1] * (leaf.ndim - 1))

    return jax.tree.map(of_leaf, paths(params), params, is_leaf=lambda x: isinstance(x, list))


def _layer_decay(params: Params, decay: float) -> Params:
    """Returns decay**depth: 0 for a head, 1 for the last layer, and one more than layers for what comes before them.

    That is embeddings of text, and the patches, the tokens before them and the positions of images.
    """
    stacks = {found for path in jax.tree.leaves(paths(params)) for found in re.findall(r"^(.*?)layers/(\d+)/", path)}
    rules, deepest = [], 0
    for prefix in {prefix for prefix, _ in stacks}:
        depth = 1 + max(int(layer) for other, layer in stacks if other == prefix)
        deepest = max(deepest, depth)
        rules += [(f"^{re.escape(prefix)}layers/{layer}/", decay ** (depth - layer)) for layer in range(depth)]
        rules += [(f"^{re.escape(prefix)}(embeddings|patches|prefix|position)(/|$)", decay ** (depth + 1))]
    if not rules:
        raise UserError("config.optimizer.layer_decay: the model has no stacked layers to decay over")
    return path_values(params, [*rules, (r"/embedding$", decay ** (deepest + 1))])  # tables beside the stacks


def _scale(factors: Callable[[Params], Params], tree: Params) -> Params:
    """Multiplies a tree by the factors of its paths; a factor of 0 gives 0 whatever it multiplies."""

    def scale(factor: float | np.ndarray, x: jax.Array) -> jax.Array:
        if isinstance(factor, float):
            return x if factor == 1.0 else jnp.zeros_like(x) if factor == 0.0 else factor * x
        return jnp.where(factor == 0, 0.0, factor * x)

    return jax.tree.map(scale, factors(tree), tree)


def _check_patterns(key: str, patterns: Sequence[str], params: Params) -> None:
    names = jax.tree.leaves(paths(params))
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"config.optimizer.{key}: '{pattern}' finds no parameter{nearest(pattern, names)}")


def _check(**values: float | None) -> None:
    ranges: dict[str, tuple[float, float]] = dict.fromkeys(("b1", "b2", "momentum", "average"), (0, 1))
    ranges["microbatches"] = (1, 2**31)
    for name, value in values.items():
        low, high = ranges.get(name, (0.0, math.inf))
        if value is not None and not low <= value <= high:
            raise UserError(f"config.optimizer.{name}: {value} must lie in [{low}, {high}]")
