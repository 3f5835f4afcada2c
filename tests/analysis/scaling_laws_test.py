import numpy as np
import pytest

from research.analysis import scaling_laws
from research.analysis.scaling_laws import BESIROGLU, HOFFMANN
from research.errors import UserError


def runs(law, noise=0.0, seed=0, count=60):
    rng = np.random.default_rng(seed)
    compute, parameters = 10 ** rng.uniform(18.8, 21.5, count), 10 ** rng.uniform(7.8, 10.2, count)
    tokens = compute / 6 / parameters
    return parameters, tokens, law.loss(parameters, tokens) * np.exp(rng.normal(0, noise, count))


def test_a_fit_recovers_the_law_that_made_the_losses(monkeypatch):
    starts = ((0.0, 10.0), (0.0, 10.0), (0.5,), (0.5,), (0.5,))  # enough where there is no noise
    monkeypatch.setattr(scaling_laws, "STARTS", starts)
    for law in (BESIROGLU, HOFFMANN):
        fitted = scaling_laws.fit(*runs(law))
        assert fitted.optimal_exponent == pytest.approx(law.optimal_exponent, abs=1e-3)
        assert fitted.irreducible == pytest.approx(law.irreducible, rel=1e-2)
        compute = 5.76e23  # Gopher's
        assert fitted.optimal(compute)[0] == pytest.approx(law.optimal(compute)[0], rel=0.05)


def test_the_optimum_has_the_least_loss_of_its_compute():
    parameters, tokens = BESIROGLU.optimal(1e21)
    assert 6 * parameters * tokens == pytest.approx(1e21)
    best = BESIROGLU.loss(parameters, tokens)
    for factor in (0.9, 1.1):
        assert BESIROGLU.loss(parameters * factor, tokens / factor) > best


def test_the_refit_trains_on_some_20_tokens_a_parameter_and_the_published_constants_on_more():
    """Besiroglu 2024, section 4: the refit agrees with the ratio that Chinchilla was trained at, 70 B and 1.4 T."""
    for law, low, high in ((BESIROGLU, 15, 25), (HOFFMANN, 70, 110)):
        parameters, tokens = law.optimal(5.76e23)
        assert low < tokens / parameters < high


def test_the_best_size_of_a_compute_is_the_minimum_of_a_parabola():
    sizes = np.array([1e5, 2e5, 4e5, 8e5])
    losses = 2 + 0.1 * (np.log(sizes) - np.log(3e5)) ** 2
    assert scaling_laws.best_size(sizes, losses) == pytest.approx(3e5)
    with pytest.raises(UserError, match="no minimum"):
        scaling_laws.best_size(sizes[:2], losses[:2])
    far = np.append(sizes, 1e9)  # what is far away does not matter
    assert scaling_laws.best_size(far[::-1], np.append(losses, 9.0)[::-1]) == pytest.approx(3e5)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(UserError, match="at least as many runs"):
        scaling_laws.fit(np.ones(4), np.ones(4), np.ones(4))
    with pytest.raises(UserError, match="positive"):
        scaling_laws.fit(np.ones(6), np.ones(6), np.zeros(6))
