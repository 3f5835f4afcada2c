"""Diffusion and flow processes: noise schedules, prediction targets and samplers.

At time t data x_0 have become x_t = signal_t x_0 + noise_t e, with e normal. The output of a model at x_t, whether the
noise, the v of Salimans 2022 or the velocity of rectified flow, gives the pair (x_0, e) that samplers need.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest

Pair = tuple[jax.Array, jax.Array]
Grid = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of a sampler.

    Attributes:
      sampler: "ddpm", ancestral (Ho 2020), with the learned variance where there is one; "ddim" (Song 2020); "euler",
        for flows.
      steps: the number of sampling steps.
      guidance: the scale of classifier-free guidance (Ho 2022): 1 is the conditional model, more trades diversity for
        fidelity.
      eta: the share of ancestral noise in "ddim".
      clip: whether to clip each estimate of the data to [-1, 1], for images; not for latents.
    """

    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.0
    eta: float = 0.0
    clip: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} must be at least 1")
        if self.guidance < 0:
            raise UserError(f"guidance: {self.guidance} must not be negative")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta: {self.eta} must lie in [0, 1]")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta: sampler '{self.sampler}' does not use it; leave it out")


def _linear(num_steps: int) -> np.ndarray:
    """Return the linear schedule: variances from 1e-4 to 0.02 at 1,000 steps (Ho 2020), scaled for fewer steps."""
    betas = np.linspace(1e-4, 0.02, num_steps) * 1000 / num_steps
    return np.cumprod(1 - np.minimum(betas, 0.999))


def _cosine(num_steps: int) -> np.ndarray:
    """Return the cosine schedule (Nichol 2021, equation 17), with variances clipped to 0.999."""
    bars = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(np.maximum(bars[1:] / bars[:-1], 0.001))


SCHEDULES = {"linear": _linear, "cosine": _cosine}
PREDICTIONS = ("epsilon", "v")


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The diffusion of DDPM (Ho 2020): T discrete variance-preserving steps.

    Attributes:
      schedule: "linear" or "cosine".
      prediction: the model's target: "epsilon", the noise, or "v" = signal_t e - noise_t x_0 (Salimans 2022).
      num_steps: T.
    """

    schedule: str = "linear"
    prediction: str = "epsilon"
    num_steps: int = 1000

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule: unknown '{self.schedule}'{nearest(self.schedule, SCHEDULES)}")
        if self.prediction not in PREDICTIONS:
            raise UserError(f"prediction: unknown '{self.prediction}'{nearest(self.prediction, PREDICTIONS)}")
        if self.num_steps < 2:
            raise UserError(f"num_steps: {self.num_steps} must be at least 2")

    @functools.cached_property
    def table(self) -> Grid:
        """The arrays of `_table` for all steps, float64 [T]."""
        return _table(SCHEDULES[self.schedule](self.num_steps))

    def time(self, shares_B: jax.Array) -> jax.Array:
        """Map numbers in [0, 1) to the times given to the model, the steps 0 to T - 1."""
        return jnp.floor(shares_B * self.num_steps)

    def at(self, time_B: jax.Array) -> Pair:
        """Return signal and noise at times, [B] each."""
        return self.look_up("signal", time_B), self.look_up("noise", time_B)

    def look_up(self, name: str, time_B: jax.Array) -> jax.Array:
        """Return the values at times of one of the arrays in `table`, float32 [B]."""
        return jnp.asarray(self.table[name], jnp.float32)[time_B.astype(jnp.int32)]

    def target(self, data: jax.Array, noise: jax.Array, at: Pair) -> jax.Array:
        """Return the model's target for the mixture of `data` and `noise`."""
        return noise if self.prediction == "epsilon" else at[0] * noise - at[1] * data

    def pair(self, prediction: jax.Array, mixture: jax.Array, at: Pair) -> Pair:
        """Return the estimates of the data and the noise from the model's output at a mixture."""
        if self.prediction == "epsilon":
            return (mixture - at[1] * prediction) / at[0], prediction
        return at[0] * mixture - at[1] * prediction, at[1] * mixture + at[0] * prediction

    def grid(self, sampling: Sampling) -> Grid:
        """Return the sampling steps, from noise to data; raise UserError if the settings do not fit."""
        _check_sampler(sampling, ("ddpm", "ddim"))
        if sampling.steps > self.num_steps:
            raise UserError(f"sampling.steps: {sampling.steps} exceeds the {self.num_steps} steps of training")
        # Evenly spaced, including the noisiest (Nichol 2021, section 4); skipped steps are merged.
        times = np.round(np.linspace(self.num_steps - 1, 0, sampling.steps)).astype(int)
        table = _table(self.table["signal"][times[::-1]] ** 2)
        eta = 1.0 if sampling.sampler == "ddpm" else sampling.eta
        spread = eta * np.sqrt(table["small_variance"])
        rows = {name: table[name] for name in ("signal", "noise", "next_signal", "log_large", "log_small")}
        rows |= {"direction": np.sqrt(np.maximum(table["next_noise"] ** 2 - spread**2, 0)), "spread": spread}
        return {name: row[::-1] for name, row in rows.items()} | {"time": times}


def _table(bars: np.ndarray) -> Grid:
    """Return arrays [T] for steps that, taken together down to the data, keep the shares `bars` of their variance.

    Returns:
      signal, noise: of the data and of the noise after the step; next_signal, next_noise: one step nearer to the data.
      large_variance, small_variance: the bounds of the variance of the way back (Ho 2020, section 3.2).
      log_large, log_small: their logarithms; where the smaller is 0, at the last step, that of the step before (Nichol
        2021).
    """
    below = np.concatenate([[1.0], bars[:-1]])
    large = 1 - bars / below
    small = large * (1 - below) / (1 - bars)
    log_small = np.log(np.concatenate([small[1:2] if len(small) > 1 else large, small[1:]]))
    return {
        "signal": np.sqrt(bars),
        "noise": np.sqrt(1 - bars),
        "next_signal": np.sqrt(below),
        "next_noise": np.sqrt(1 - below),
        "large_variance": large,
        "small_variance": small,
        "log_large": np.log(large),
        "log_small": log_small,
    }


@dataclasses.dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu 2022; Lipman 2022): straight lines from data at time 0 to noise at time 1.

    The model predicts the velocity e - x_0 and is given the time in thousandths.
    """

    def time(self, shares_B: jax.Array) -> jax.Array:
        """Map numbers in [0, 1) to the times given to the model."""
        return 1000 * shares_B

    def at(self, time_B: jax.Array) -> Pair:
        """Return signal and noise at times, [B] each."""
        return 1 - time_B / 1000, time_B / 1000

    def target(self, data: jax.Array, noise: jax.Array, at: Pair) -> jax.Array:
        """Return the model's target for the mixture of `data` and `noise`."""
        del at  # the velocity is constant along the path
        return noise - data

    def pair(self, prediction: jax.Array, mixture: jax.Array, at: Pair) -> Pair:
        """Return the estimates of the data and the noise from the model's output at a mixture."""
        return mixture - at[1] * prediction, mixture + at[0] * prediction

    def grid(self, sampling: Sampling) -> Grid:
        """Return the sampling steps, from noise to data; raise UserError if the settings do not fit."""
        _check_sampler(sampling, ("euler",))
        times = np.linspace(1, 0, sampling.steps + 1)
        now, after, none = times[:-1], times[1:], np.zeros(sampling.steps)
        ends = {"signal": 1 - now, "noise": now, "next_signal": 1 - after, "direction": after}
        return ends | {"time": 1000 * now, "spread": none, "log_large": none, "log_small": none}


def _check_sampler(sampling: Sampling, known: tuple[str, ...]) -> None:
    if sampling.sampler not in known:
        hint = nearest(sampling.sampler, known)
        raise UserError(f"sampling.sampler: '{sampling.sampler}' does not fit config.task.process{hint}")


def expand(numbers_B: jax.Array, like: jax.Array) -> jax.Array:
    """Reshape [B] to broadcast against `like`."""
    return numbers_B.reshape(-1, *[1] * (like.ndim - 1))


def bound(
    process: Gaussian, data: jax.Array, mixture: jax.Array, time_B: jax.Array, seen: jax.Array, share: jax.Array
) -> jax.Array:
    """Return the variational bound's term at each time, in bits per dimension, float32 [B] (Nichol 2021, section 3.1).

    Args:
      process: T times the mean of the terms over all times bounds the bits that images of 256 levels in [-1, 1] need.
      data: x_0, [B, ...].
      mixture: x_t.
      time_B: t.
      seen: the data as estimated by the model.
      share: where the logarithm of the variance lies between its bounds, 0 to 1.
    """
    look_up = {name: expand(process.look_up(name, time_B), data) for name in process.table}
    log_variance = share * look_up["log_large"] + (1 - share) * look_up["log_small"]
    mean = _posterior_mean(look_up, seen, mixture)
    error = _posterior_mean(look_up, data, mixture) - mean
    # The KL divergence between the true and the model's reverse step, both normal.
    excess = look_up["log_small"] - log_variance
    divergence = 0.5 * (jnp.exp(excess) - 1 - excess + jnp.square(error) * jnp.exp(-log_variance))
    terms = jnp.where(expand(time_B, data) == 0, -_log_likelihood(data, mean, 0.5 * log_variance), divergence)
    return terms.mean(axis=tuple(range(1, data.ndim))) / math.log(2)


def _posterior_mean(look_up: dict[str, jax.Array], data: jax.Array, mixture: jax.Array) -> jax.Array:
    """Return the mean of the step below `mixture` where the data are known (Ho 2020, equation 7)."""
    kept = 1 - look_up["large_variance"]
    weights = look_up["next_signal"] * look_up["large_variance"], jnp.sqrt(kept) * look_up["next_noise"] ** 2
    return (weights[0] * data + weights[1] * mixture) / look_up["noise"] ** 2


def _log_likelihood(data: jax.Array, mean: jax.Array, log_deviation: jax.Array) -> jax.Array:
    """Return the log-likelihood of 256-level data in [-1, 1] under a discretised normal distribution."""
    half = 1 / 255

    def below(edge: jax.Array) -> jax.Array:
        return jax.scipy.stats.norm.cdf((edge - mean) * jnp.exp(-log_deviation))

    upper = jnp.where(data > 0.999, 1.0, below(data + half))
    lower = jnp.where(data < -0.999, 0.0, below(data - half))
    return jnp.log(jnp.maximum(upper - lower, 1e-12))


def sample(
    process: Gaussian | Flow,
    predict: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]],
    keys_B: jax.Array,
    shape: tuple[int, ...],
    sampling: Sampling,
) -> jax.Array:
    """Draw samples by iterative denoising, in one compiled loop.

    Args:
      process: the process that the model was trained on.
      predict: (x_t, times [B]) -> the model's output, and the learned variance's position between its bounds or None.
      keys_B: a key per sample, which determines it whatever the rest of the batch.
      shape: the shape of one sample.
      sampling: the settings.

    Returns:
      float32 [B, *shape].
    """
    grid = process.grid(sampling)
    count = len(grid["time"])

    def draw(place: jax.Array | int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, place), shape))(keys_B)

    def step(x: jax.Array, row: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        prediction, share = predict(x, jnp.full(x.shape[:1], row["time"]))
        data, noise = process.pair(prediction, x, (row["signal"], row["noise"]))
        if sampling.clip:
            data = jnp.clip(data, -1, 1)
            noise = (x - row["signal"] * data) / row["noise"]
        following = row["next_signal"] * data + row["direction"] * noise
        if sampling.sampler == "ddpm" or sampling.eta:
            spread = row["spread"]
            if sampling.sampler == "ddpm" and share is not None:
                log_variance = share * row["log_large"] + (1 - share) * row["log_small"]
                spread = jnp.where(row["place"] < count - 1, jnp.exp(0.5 * log_variance), 0.0)
            following += spread * draw(row["place"])
        return following, None

    rows = {name: jnp.asarray(row, jnp.float32) for name, row in grid.items()} | {"place": jnp.arange(count)}
    return jax.lax.scan(step, draw(count), rows)[0]
