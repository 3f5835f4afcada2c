"""Schedules against their formulas, and samplers with models that know the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from research.errors import UserError
from research.generation.diffusion import Flow, Gaussian, Sampling, bound, sample

PROCESSES = {
    "linear, epsilon": Gaussian("linear", "epsilon"),
    "linear, v": Gaussian("linear", "v"),
    "cosine, epsilon": Gaussian("cosine", "epsilon"),
    "cosine, v": Gaussian("cosine", "v"),
    "flow": Flow(),
}
DISCRETE = {name: process for name, process in PROCESSES.items() if isinstance(process, Gaussian)}


def samplers(process, steps):
    if isinstance(process, Flow):
        return [Sampling("euler", steps)]
    return [Sampling("ddpm", steps), Sampling("ddim", steps), Sampling("ddim", steps, eta=0.5)]


def test_the_linear_schedule_is_that_of_ddpm():
    betas = np.linspace(1e-4, 0.02, 1000)
    table = Gaussian("linear").table
    np.testing.assert_allclose(table["large_variance"], betas, rtol=1e-9)
    np.testing.assert_allclose(table["signal"] ** 2, np.cumprod(1 - betas), rtol=1e-9)
    assert Gaussian("linear", num_steps=100).table["large_variance"][-1] == pytest.approx(0.2)


def test_the_cosine_schedule_is_its_formula():
    signal = Gaussian("cosine").table["signal"]

    def share(t):
        return np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2

    np.testing.assert_allclose(signal[:-1] ** 2, share(np.arange(1, 1000)), rtol=1e-9)
    assert Gaussian("cosine").table["large_variance"].max() == pytest.approx(0.999)


@pytest.mark.parametrize("name", DISCRETE)
def test_schedules_go_from_data_to_noise(name):
    table = DISCRETE[name].table
    assert (np.diff(table["signal"]) < 0).all()
    assert (np.diff(table["noise"]) > 0).all()
    np.testing.assert_allclose(table["signal"] ** 2 + table["noise"] ** 2, 1, rtol=1e-9)
    assert table["signal"][0] > 0.9999
    assert table["signal"][-1] < 0.007
    assert table["next_signal"][0] == 1
    np.testing.assert_array_equal(table["next_signal"][1:], table["signal"][:-1])
    assert (table["small_variance"] <= table["large_variance"]).all()
    assert table["small_variance"][0] == 0
    assert np.isfinite(table["log_small"]).all()


def test_a_flow_goes_straight():
    time = jnp.array([0.0, 250.0, 1000.0])
    signal, noise = Flow().at(time)
    np.testing.assert_allclose(signal, [1, 0.75, 0])
    np.testing.assert_allclose(noise, [0, 0.25, 1])


@pytest.mark.parametrize("name", PROCESSES)
def test_what_a_model_is_to_say_gives_the_pair_back(name):
    process = PROCESSES[name]
    data, noise = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    time = process.time(jnp.array([0.0, 0.1, 0.4, 0.6, 0.8, 0.9]))
    at = tuple(part[:, None] for part in process.at(time))
    mixture = at[0] * data + at[1] * noise
    seen, heard = process.pair(process.target(data, noise, at), mixture, at)
    # Where there is no noise, a flow's time 0, or hardly any data, one of both is hard to tell.
    np.testing.assert_allclose(seen, data, atol=1e-4)
    np.testing.assert_allclose(heard, noise, atol=1e-4)


def test_times_of_steps():
    np.testing.assert_array_equal(Gaussian(num_steps=10).time(jnp.array([0.0, 0.05, 0.1, 0.999])), [0, 0, 1, 9])
    np.testing.assert_allclose(Flow().time(jnp.array([0.0, 0.5])), [0, 500])


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_respaced_steps(steps):
    process = Gaussian("linear")
    grid = process.grid(Sampling("ddpm", steps))
    assert len(grid["time"]) == steps
    assert grid["time"][0] == 999
    assert steps == 1 or grid["time"][-1] == 0
    assert (np.diff(grid["time"]) < 0).all()
    np.testing.assert_allclose(grid["signal"], process.table["signal"][grid["time"]])
    np.testing.assert_allclose(grid["next_signal"], [*grid["signal"][1:], 1])
    assert grid["spread"][-1] == 0
    if steps == 1000:
        np.testing.assert_allclose(grid["spread"][::-1] ** 2, process.table["small_variance"], atol=1e-12)


# --- models that know what the data are -----------------------------------------------------------

MEAN, DEVIATION = np.array([0.5, -0.3], np.float32), np.array([0.4, 0.1], np.float32)


def knows(process, mean, deviation):
    """Returns the best model of data that are normal, numbers apart: it says what follows from E[x_0 | x_t]."""

    def predict(x, time):
        at = tuple(part[:, None] for part in process.at(time))
        gain = at[0] * deviation**2 / (at[0] ** 2 * deviation**2 + at[1] ** 2)
        data = mean + gain * (x - at[0] * mean)
        return process.target(data, (x - at[0] * data) / jnp.maximum(at[1], 1e-6), at), None

    return predict


def draw(process, sampling, count, predict=None, seed=0):
    predict = predict or knows(process, MEAN, DEVIATION)
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(lambda keys: sample(process, predict, keys, (2,), sampling))(keys))


@pytest.mark.parametrize("steps", [2, 20])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_point_is_found_in_few_steps(name, steps):
    process = PROCESSES[name]
    for sampling in samplers(process, steps):
        found = draw(process, sampling, 5, knows(process, MEAN, np.zeros(2, np.float32)))
        np.testing.assert_allclose(found, np.broadcast_to(MEAN, (5, 2)), atol=2e-3 if sampling.eta else 2e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_normal_distribution_is_drawn(name):
    """With 2,000 samples the mean is known to 0.02 deviations, the deviation to 1.6 %."""
    process = PROCESSES[name]
    for sampling in samplers(process, 1000)[:2]:
        found = draw(process, sampling, 2000)
        assert (np.abs(found.mean(axis=0) - MEAN) < 0.08 * DEVIATION).all(), sampling
        np.testing.assert_allclose(found.std(axis=0), DEVIATION, rtol=0.06, err_msg=str(sampling))
        assert abs(np.corrcoef(found.T)[0, 1]) < 0.08
        assert (np.abs(found - MEAN) > 2 * DEVIATION).mean() == pytest.approx(0.0455, abs=0.012)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_v_and_epsilon_draw_the_same(sampler):
    one, other = (draw(Gaussian("cosine", kind), Sampling(sampler, 30), 50) for kind in ("epsilon", "v"))
    np.testing.assert_allclose(one, other, atol=5e-3)


def test_ddpm_is_ddim_with_all_of_its_noise():
    process = Gaussian("cosine", "v")
    one, other = (draw(process, s, 50) for s in (Sampling("ddpm", 20), Sampling("ddim", 20, eta=1.0)))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_step_of_ddpm_has_the_mean_and_the_variance_of_ho():
    """One step of the whole 1,000, from a given mixture, against equations 7 and 11."""
    process = Gaussian("linear", "epsilon")
    grid, table = process.grid(Sampling("ddpm", 1000)), process.table
    for place in (0, 300, 998):
        t = int(grid["time"][place])
        beta, bar, below = table["large_variance"][t], table["signal"][t] ** 2, table["next_signal"][t] ** 2
        data, noise = 0.3, -1.1
        mixture = np.sqrt(bar) * data + np.sqrt(1 - bar) * noise
        mean = (mixture - beta / np.sqrt(1 - bar) * noise) / np.sqrt(1 - beta)
        assert grid["next_signal"][place] * data + grid["direction"][place] * noise == pytest.approx(mean, rel=1e-6)
        assert grid["spread"][place] ** 2 == pytest.approx((1 - below) / (1 - bar) * beta)


def test_learned_variances_are_used():
    """With all of the variance's upper bound a standard normal is exact in few steps; the lower bound is too narrow."""
    process = Gaussian("linear", "epsilon")
    exact = knows(process, np.zeros(2, np.float32), np.ones(2, np.float32))

    def deviation(share):
        said = exact if share is None else lambda x, time: (exact(x, time)[0], jnp.full_like(x, share))
        return draw(process, Sampling("ddpm", 10), 2000, said).std()

    assert deviation(1.0) == pytest.approx(1, abs=0.03)
    assert deviation(0.0) == pytest.approx(deviation(None), abs=0.01)
    assert deviation(0.0) < deviation(0.5) < deviation(1.0)
    assert deviation(0.0) < 0.9


def test_samples_are_functions_of_their_own_keys():
    for process, sampling in ((Gaussian(), Sampling("ddpm", 5)), (Flow(), Sampling("euler", 5))):
        run = jax.jit(lambda keys: sample(process, knows(process, MEAN, DEVIATION), keys, (2,), sampling))  # noqa: B023
        keys = jax.random.split(jax.random.key(0), 6)
        many = run(keys)
        np.testing.assert_array_equal(many, run(keys))
        np.testing.assert_allclose(run(keys[2:3])[0], many[2], rtol=1e-5)
        assert np.abs(many - run(jax.random.split(jax.random.key(1), 6))).min() > 1e-6


def test_clipped_samples_stay_inside():
    wild = lambda process: knows(process, np.full(2, 3.0, np.float32), np.ones(2, np.float32))  # noqa: E731
    for process, name in ((Gaussian(), "ddpm"), (Flow(), "euler")):
        assert draw(process, Sampling(name, 20), 50, wild(process)).max() > 2
        inside = draw(process, Sampling(name, 20, clip=True), 50, wild(process))
        assert np.abs(inside).max() <= 1 + 1e-5


# --- the bound ------------------------------------------------------------------------------------


def terms(process, *arrays):
    return jax.jit(lambda *a: bound(process, *a))(*(np.asarray(array, np.float32) for array in arrays))


@pytest.mark.parametrize("name", DISCRETE)
def test_the_bound_is_the_divergence_of_two_normals(name):
    process = DISCRETE[name]
    rng = np.random.default_rng(0)
    data, noise, seen = rng.uniform(-1, 1, (3, 3, 5))
    share, time = rng.uniform(0, 1, (3, 5)), np.array([1, 300, 999])
    table = {key: row[time, None] for key, row in process.table.items()}
    mixture = table["signal"] * data + table["noise"] * noise
    beta, bar, below = table["large_variance"], table["signal"] ** 2, table["next_signal"] ** 2

    def posterior(x):
        first = np.sqrt(below) * beta / (1 - bar) * x
        return first + np.sqrt(1 - beta) * (1 - below) / (1 - bar) * mixture

    true, ours = table["small_variance"], np.exp(share * np.log(beta) + (1 - share) * np.log(table["small_variance"]))
    error = posterior(data) - posterior(seen)
    wanted = np.log(np.sqrt(ours / true)) + (true + error**2) / (2 * ours) - 0.5
    found = terms(process, data, mixture, time, seen, share)
    np.testing.assert_allclose(found, wanted.mean(axis=1) / np.log(2), rtol=2e-4, atol=1e-7)


def test_the_last_step_is_the_likelihood_of_the_level():
    process = Gaussian("linear")
    data = np.array([[-1.0, -0.2, 1.0]])
    mixture = data + 0.01
    levels = np.linspace(-1, 1, 256)
    data[0, 1] = levels[100]
    share = np.full((1, 3), 0.7)
    found = terms(process, data, mixture, np.zeros(1), data, share)
    table = process.table
    deviation = np.exp(0.5 * (0.7 * table["log_large"][0] + 0.3 * table["log_small"][0]))
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    # At the last step the mean is what the model sees, whatever the mixture.
    shares = [np.diff(scipy.stats.norm(x, deviation).cdf(edges))[i] for x, i in zip(data[0], (0, 100, 255))]
    assert float(found[0]) == pytest.approx(-np.log2(shares).mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian("cosin"), "schedule: unknown 'cosin'; did you mean 'cosine'"),
        (lambda: Gaussian(prediction="x"), "prediction: unknown 'x'; there are: epsilon, v"),
        (lambda: Gaussian(num_steps=1), "num_steps: 1 must be at least 2"),
        (lambda: Sampling(steps=0), "steps: 0 must be at least 1"),
        (lambda: Sampling(guidance=-1), "guidance: -1 must not be negative"),
        (lambda: Sampling(eta=2), "eta: 2 must lie in"),
        (lambda: Sampling("ddpm", eta=0.5), "eta: sampler 'ddpm' does not use it"),
        (lambda: Gaussian().grid(Sampling("dim")), "sampling.sampler: 'dim' does not fit .*; did you mean 'ddim'"),
        (lambda: Gaussian().grid(Sampling("euler")), "'euler' does not fit config.task.process; there are: ddim, ddpm"),
        (lambda: Flow().grid(Sampling("ddim")), "'ddim' does not fit config.task.process; there are: euler"),
        (lambda: Gaussian(num_steps=9).grid(Sampling(steps=10)), "sampling.steps: 10 exceeds the 9"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
