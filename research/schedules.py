"""Learning-rate schedules: a linear warm-up, then a named decay."""

import math

import jax.numpy as jnp
import optax

from research.errors import UserError, nearest

# The schedules that take each key that not all of them take.
TAKES = {
    "end_factor": ("linear", "cosine", "step", "wsd", "wsd_sqrt"),
    "drop_at": ("step",),
    "decay_share": ("wsd", "wsd_sqrt"),
}
DECAY_SHARE = 0.2  # of the run, as in Hägele 2024, section 3


def make_schedule(
    name: str,
    peak: float,
    warmup: int | float,
    num_steps: int,
    end_factor: float = 0.0,
    drop_at: float | None = None,
    decay_share: float | None = None,
) -> optax.Schedule:
    """Return step -> learning rate: a linear warm-up from 0 to `peak`, then the named decay.

    "wsd" and "wsd_sqrt" (warm-up, stable, decay; Hu 2024, section 4) stay at the peak until the last `decay_share` of
    the run, and then fall linearly, or as 1 - sqrt (Hägele 2024, section 3).

    Args:
      name: "linear", "cosine", "inverse_sqrt", "constant", "step", "wsd" or "wsd_sqrt".
      peak: the highest rate.
      warmup: a share of `num_steps` below 1, else steps.
      num_steps: length of the run.
      end_factor: the final rate as a share of the peak, for the schedules that decay to one.
      drop_at: the share of the run after which "step" falls to its final rate.
      decay_share: the share of the run in which "wsd" decays; 0.2 where it is None.

    Raises:
      UserError: an argument is out of range, or the schedule does not take it.
    """
    if not peak >= 0:
        raise UserError(f"config.optimizer.learning_rate: {peak} is negative")
    warmup_steps = _warmup_steps(warmup, num_steps)
    _check(name, end_factor, drop_at, decay_share, num_steps, warmup_steps)
    decay_steps = max(num_steps - warmup_steps, 1)
    drop = max(math.ceil((drop_at or 0) * num_steps) - warmup_steps, 0)
    last = max(math.ceil((DECAY_SHARE if decay_share is None else decay_share) * num_steps), 1)
    stable = optax.constant_schedule(peak)
    decays: dict[str, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, peak * end_factor, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, end_factor),
        "constant": stable,
        "step": optax.piecewise_constant_schedule(peak, {drop: end_factor}),
        "inverse_sqrt": lambda step: peak * jnp.sqrt(max(warmup_steps, 1) / (step + max(warmup_steps, 1))),
        "wsd": optax.linear_schedule(peak, peak * end_factor, last, max(decay_steps - last, 0)),
        "wsd_sqrt": optax.join_schedules(
            [stable, lambda step: peak * (1 - (1 - end_factor) * jnp.sqrt(jnp.clip(step / last, 0, 1)))],
            [max(decay_steps - last, 0)],
        ),
    }
    if name not in decays:
        raise UserError(f"config.optimizer.schedule: unknown '{name}'{nearest(name, decays)}")
    if warmup_steps == 0:
        return decays[name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decays[name]], [warmup_steps])


def _warmup_steps(warmup: int | float, num_steps: int) -> int:
    if warmup >= 1 and warmup != int(warmup):
        raise UserError(f"config.optimizer.warmup: {warmup} is neither a number of steps nor a share in [0, 1)")
    steps = int(warmup) if warmup >= 1 else math.ceil(warmup * num_steps)
    if not 0 <= steps <= num_steps:
        raise UserError(f"config.optimizer.warmup: {steps} steps do not fit a run of {num_steps}")
    return steps


def _check(
    name: str, end_factor: float, drop_at: float | None, decay_share: float | None, num_steps: int, warmup_steps: int
) -> None:
    if (drop_at is not None) != (name == "step") or not 0 <= (drop_at or 0) <= 1:
        raise UserError("config.optimizer.drop_at: schedule 'step' needs it, in [0, 1], and no other takes it")
    for key, value in {"end_factor": end_factor, "decay_share": decay_share}.items():
        if value and name not in TAKES[key]:
            raise UserError(f"config.optimizer.{key}: schedule '{name}' takes none; {', '.join(TAKES[key])} do")
    if decay_share is not None and not 0 < decay_share <= 1:
        raise UserError(f"config.optimizer.decay_share: {decay_share} does not lie in (0, 1]")
    share = DECAY_SHARE if decay_share is None else decay_share
    if name.startswith("wsd") and math.ceil(share * num_steps) + warmup_steps > max(num_steps, 1):
        raise UserError(
            f"config.optimizer.decay_share: {share} of {num_steps} steps do not fit behind {warmup_steps} of warm-up"
        )
