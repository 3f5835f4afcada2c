"""Any optax transformation, with schedules, clipping, decay masks, freezing, rates by path and averages around it.

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
import optax.contrib

from research.errors import UserError, nearest
from research.schedules import make_schedule
from research.task import Params

Rules = Sequence[tuple[str, float]]
MOMENT_DTYPES = ("float32", "bfloat16")


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


def make_optimizer(
    num_steps: int,
    learning_rate: float,
    schedule: str = "linear",
    warmup: int | float = 0,
    end_factor: float = 0.0,
    drop_at: float | None = None,
    decay_share: float | None = None,
    direction: optax.GradientTransformation | None = None,
    b1: float | None = None,
    b2: float | None = None,
    epsilon: float | None = None,
    moment_dtype: str | None = None,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = (r"bias$", r"scale$"),
    clip_norm: float | None = 1.0,
    microbatches: int = 1,
    freeze: tuple[str, ...] = (),
    learning_rate_multipliers: tuple[tuple[str, float], ...] = (),
    layer_decay: float | None = None,
    average: float | None = None,
    schedule_free: float | None = None,
) -> Optimizer:
    """Return an optimizer: clipping, a direction, weight decay and rates by path, in this order.

    Args:
      num_steps: length of the run, which the schedules need.
      learning_rate: the peak.
      schedule: see `schedules.make_schedule`, also for the next four.
      warmup: a share of `num_steps` below 1, else steps.
      end_factor: the final rate as a share of the peak.
      drop_at: the share of the run after which "step" falls.
      decay_share: the share of the run in which "wsd" decays.
      direction: what turns gradients into a direction, such as `optax.scale_by_lion`, `research.directions.muon` or
        `research.directions.adafactor`; it must not apply a learning rate. AdamW's (Loshchilov 2019) where it is None.
      b1: decay of AdamW's first moment, 0.9.
      b2: decay of AdamW's second moment, 0.999.
      epsilon: added to the root of AdamW's second moment, 1e-8.
      moment_dtype: of AdamW's first moment, such as "bfloat16"; that of the parameters where it is None.
      weight_decay: decoupled, times the learning rate.
      no_decay: regular expressions; parameters whose path matches one are not decayed.
      clip_norm: gradients of a greater global norm are scaled down to it; None leaves them.
      microbatches: see Optimizer.
      freeze: regular expressions of parameters that must not change.
      learning_rate_multipliers: (regular expression, factor); the first that matches a path counts.
      layer_decay: factor a layer, from the head (1) down to the embeddings (Clark 2020, section 3.1.2).
      average: decay of an exponential moving average of the parameters, which is then what is evaluated.
      schedule_free: interpolation between the averaged and the latest parameters, such as 0.9, at which gradients are
        taken (Defazio 2024); the average is evaluated. Use schedule="constant", and b1=0 with AdamW.

    Raises:
      UserError: an argument is out of range, or a regular expression matches no parameter.
    """
    _check(b1=b1, b2=b2, epsilon=epsilon, weight_decay=weight_decay, microbatches=microbatches)
    _check(average=average, schedule_free=schedule_free)
    if average is not None and schedule_free is not None:
        raise UserError("config.optimizer.average: schedule_free has its own average; set one of the two")
    direction = _direction(direction, b1=b1, b2=b2, epsilon=epsilon, moment_dtype=moment_dtype)
    rate = make_schedule(schedule, learning_rate, warmup, num_steps, end_factor, drop_at, decay_share)
    frozen: Rules = tuple((pattern, 0.0) for pattern in freeze)
    trainable = functools.partial(_scale, functools.partial(path_values, rules=frozen))

    def factors(params: Params) -> Params:
        tree = path_values(params, rules=(*frozen, *learning_rate_multipliers))
        return tree if layer_decay is None else jax.tree.map(jnp.multiply, tree, _layer_decay(params, layer_decay))

    chain = [optax.stateless(lambda updates, params: trainable(updates))]
    if clip_norm is not None:
        chain.append(optax.clip_by_global_norm(clip_norm))
    # A parameter that is frozen altogether needs no moments.
    chain.append(optax.masked(direction, functools.partial(moving, freeze)) if freeze else direction)
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
    if schedule_free is not None:
        transformation = optax.contrib.schedule_free(transformation, rate, schedule_free)

    def init(params: Params) -> optax.OptState:
        check_patterns("config.optimizer.freeze", freeze, params)
        multiplied = [pattern for pattern, _ in learning_rate_multipliers]
        check_patterns("config.optimizer.learning_rate_multipliers", multiplied, params)
        return transformation.init(params)

    return Optimizer(init, transformation.update, rate, trainable, microbatches)


def _direction(given: optax.GradientTransformation | None, **adam: Any) -> optax.GradientTransformation:
    """Return the direction: the given one, or AdamW's with its settings."""
    if given is None:
        defaults = {"b1": 0.9, "b2": 0.999, "epsilon": 1e-8}
        settings = defaults | {key: value for key, value in adam.items() if value is not None}
        dtype = settings.pop("moment_dtype", None)
        if dtype is not None and dtype not in MOMENT_DTYPES:
            raise UserError(f"config.optimizer.moment_dtype: '{dtype}'{nearest(dtype, MOMENT_DTYPES)}")
        return optax.scale_by_adam(settings["b1"], settings["b2"], settings["epsilon"], mu_dtype=dtype)
    for key, value in adam.items():
        if value is not None:
            raise UserError(f"config.optimizer.{key}: it is AdamW's; set it in config.optimizer.direction")
    if not isinstance(given, optax.GradientTransformation):
        raise UserError(f"config.optimizer.direction: a {type(given).__name__} is no optax.GradientTransformation")
    if _descends(given):
        raise UserError(
            "config.optimizer.direction: it applies a learning rate already; name what it is made of, such as "
            "optax.scale_by_lion instead of optax.lion"
        )
    return given


def _descends(direction: optax.GradientTransformation) -> bool:
    """Return whether a transformation's first update is against the gradient, as only whole optimizers' are."""
    params = {"layers": {"kernel": jnp.ones((1, 2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    with jax.ensure_compile_time_eval():
        updates, _ = direction.update(params, direction.init(params), params)
    return all(bool((update < 0).any()) for update in jax.tree.leaves(updates))


def moving(freeze: Sequence[str], params: Params) -> Params:
    """Return a tree of bools: where any layer of a parameter is trained, with these regular expressions frozen."""
    values = path_values(params, tuple((pattern, 0.0) for pattern in freeze))
    return jax.tree.map(lambda value: not np.isscalar(value) or value != 0.0, values)


class AverageState(NamedTuple):
    """The state of `average_params`."""

    updates: jax.Array
    average: Params


def average_params(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keep an exponential moving average of the parameters as they are after each update; put it last in a chain.

    At first it forgets faster, with the decay (1 + t) / (10 + t) of update t as long as that is smaller, so that the
    initial parameters do not stay in it (as TensorFlow's ExponentialMovingAverage does with `num_updates`).
    """

    def init(params: Params) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(updates: Params, state: AverageState, params: Params, **_: Any) -> tuple[Params, AverageState]:
        new = optax.apply_updates(params, updates)
        kept = jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
        average = jax.tree.map(lambda a, p: (kept * a + (1 - kept) * p).astype(a.dtype), state.average, new)
        return updates, AverageState(state.updates + 1, average)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(params: Params, opt_state: optax.OptState) -> Params:
    """Return the averaged parameters where the optimizer keeps them, else `params`."""
    kinds = (AverageState, optax.contrib.ScheduleFreeState)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(state, AverageState):
            return state.average
        if isinstance(state, optax.contrib.ScheduleFreeState):
            return optax.contrib.schedule_free_eval_params(state, params)
    return params


def paths(params: Params) -> Params:
    """Return a tree of lists of paths: one for a plain parameter, one a layer for a stacked one."""

    def of_leaf(keys: tuple, leaf: jax.Array) -> list[str]:
        names = [str(key.key) for key in keys]
        if "layers" not in names[:-1]:
            return ["/".join(names)]
        at = names.index("layers") + 1
        return ["/".join([*names[:at], str(layer), *names[at:]]) for layer in range(leaf.shape[0])]

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def path_values(params: Params, rules: Rules) -> Params:
    """Return for each parameter the value of the first rule that finds its path, 1 where none does.

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
    """Return decay**depth: 0 for a head, 1 for the last layer, and one more than layers for what comes before them.

    That is embeddings of text, the patches, the tokens before them and the positions of images, and a first block that
    stands beside the stack, as ModernBERT's does.
    """
    stacks = {found for path in jax.tree.leaves(paths(params)) for found in re.findall(r"^(.*?)layers/(\d+)/", path)}
    rules, deepest = [], 0
    for prefix in {prefix for prefix, _ in stacks}:
        depth = 1 + max(int(layer) for other, layer in stacks if other == prefix)
        deepest = max(deepest, depth)
        rules += [(f"^{re.escape(prefix)}layers/{layer}/", decay ** (depth - layer)) for layer in range(depth)]
        rules += [
            (f"^{re.escape(prefix)}(embeddings|patches|prefix|position|norm_in|first)(/|$)", decay ** (depth + 1))
        ]
    if not rules:
        raise UserError("config.optimizer.layer_decay: the model has no stacked layers to decay over")
    return path_values(params, [*rules, (r"/embedding$", decay ** (deepest + 1))])  # tables beside the stacks


def _scale(factors: Callable[[Params], Params], tree: Params) -> Params:
    """Multiply a tree by the factors of its paths; a factor of 0 gives 0 whatever it multiplies."""

    def scale(factor: float | np.ndarray, x: jax.Array) -> jax.Array:
        if isinstance(factor, float):
            return x if factor == 1.0 else jnp.zeros_like(x) if factor == 0.0 else factor * x
        return jnp.where(factor == 0, 0.0, factor * x)

    return jax.tree.map(scale, factors(tree), tree)


def check_patterns(key: str, patterns: Sequence[str], params: Params, kind: str = "parameter") -> None:
    """Raise UserError, which names the key, unless each pattern finds a path; a `kind` is what it was to find."""
    names = jax.tree.leaves(paths(params))
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"{key}: '{pattern}' finds no {kind}{nearest(pattern, names)}")


def _check(**values: float | None) -> None:
    ranges: dict[str, tuple[float, float]] = dict.fromkeys(("b1", "b2", "average", "schedule_free"), (0, 1))
    ranges["microbatches"] = (1, 2**31)
    for name, value in values.items():
        low, high = ranges.get(name, (0.0, math.inf))
        if value is not None and not low <= value <= high:
            raise UserError(f"config.optimizer.{name}: {value} must lie in [{low}, {high}]")
