"""One training step: pure, jitted once a batch shape, over any mesh."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from research import sharding
from research.metrics import Mean, merge
from research.optimizer import Optimizer
from research.task import Batch, Params, Spec, Starts, Task


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      step: int32 scalar, how many steps were taken.
      params: the model's parameters.
      opt_state: the optimizer's state; averaged parameters are in it.
      rng: uint32 key data; step i draws from this key folded by i.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    rng: jax.Array


def init_state(task: Task, optimizer: Optimizer, spec: Spec, seed: int, loaded: Params | None = None) -> TrainState:
    """Return the state before the first step; pure, so that it can be shape-evaluated and jitted with shardings.

    `loaded` is a tree like the model's parameters, with None for those that are to be initialised.
    """
    init_rng, step_rng = jax.random.split(jax.random.key(seed))
    params = task.init(init_rng, spec)
    if loaded is not None:
        params = jax.tree.map(lambda new, old: new if old is None else old, params, loaded)
    if isinstance(task, Starts):
        params = task.start(params)
    opt_state = optimizer.init(_real(params))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(step_rng))


def train_step(task: Task, optimizer: Optimizer, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
    """Take one step.

    Returns:
      the next state, and the metrics of this step: the task's own, "loss", "gradient_norm" (before clipping) and
      "learning_rate".
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    with jax.named_scope("gradients"):
        gradients, metrics = _gradients(task, state.params, batch, rng, optimizer.microbatches)
    with jax.named_scope("update"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, _real(state.params))
    one = jnp.ones(())
    metrics |= {
        "gradient_norm": Mean(optax.tree.norm(optimizer.trainable(gradients)), one),
        "learning_rate": Mean(jnp.asarray(optimizer.learning_rate(state.step), jnp.float32), one),
    }
    params = _with(state.params, optax.apply_updates(_real(state.params), updates))
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def _gradients(
    task: Task, params: Params, batch: Batch, rng: jax.Array, microbatches: int
) -> tuple[Params, dict[str, Mean]]:
    """Return the gradient of total loss / total count, the same however the batch is split, and the metrics."""
    every, params = params, _real(params)

    def total_loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        loss, metrics = task.loss(_with(every, params), batch, rng)
        return loss.total, {"loss": loss} | metrics

    gradient = jax.grad(total_loss, has_aux=True)
    if microbatches == 1:
        gradients, metrics = gradient(params, batch, rng)
    else:

        def add(sums: tuple, xs: tuple) -> tuple[tuple, None]:
            microbatch, index = xs
            microbatch = {name: sharding.constrain(x, "batch") for name, x in microbatch.items()}
            gradients, metrics = gradient(params, microbatch, jax.random.fold_in(rng, index))
            return (jax.tree.map(jnp.add, sums[0], gradients), merge([sums[1], metrics])), None

        split = jax.tree.map(functools.partial(_split, microbatches), dict(batch))
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], split), rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, metrics), _ = jax.lax.scan(add, zeros, (split, jnp.arange(microbatches)))
    # A fully masked batch has a zero gradient, not NaN.
    count = jnp.maximum(metrics["loss"].count, jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(lambda g: g / count, gradients), metrics


def _real(params: Params) -> Params:
    """Return the parameters with None for integers, as codes of frozen kernels are, which have no gradient."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, params)


def _with(params: Params, real: Params) -> Params:
    """Return the parameters with what `_real` makes of them in place of it."""
    return jax.tree.map(lambda x, new: x if new is None else new, params, real)


def _split(microbatches: int, x: jax.Array) -> jax.Array:
    """Reshape [B, ...] to [microbatches, B / microbatches, ...]; every device keeps its own rows."""
    return x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
