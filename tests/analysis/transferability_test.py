"""Scores of transferability: against direct computation, and what they must not depend on."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from research.analysis import transferability

N, D, C = 60, 8, 3


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] of which two tell something of the labels [N]."""
    rng = np.random.default_rng(0)
    labels = np.arange(N) % C
    features = rng.normal(size=(N, D)) + 1.0
    features[:, 0] += 2 * labels
    features[:, 1] -= 2 * (labels == 1)
    return features, labels


@pytest.mark.parametrize("width", [D, 2 * N])
def test_logme_is_the_maximum_of_the_evidence(data, width):
    features, _ = data
    rng = np.random.default_rng(1)
    features = np.concatenate([features, 0.3 * rng.normal(size=(N, width - D))], axis=1)
    target = features[:, 0] + rng.normal(size=N)

    def loss(logs: np.ndarray) -> float:
        alpha, beta = np.exp(np.clip(logs, -20, 20))
        covariance = features @ features.T / alpha + np.eye(N) / beta
        return -scipy.stats.multivariate_normal(np.zeros(N), covariance).logpdf(target) / N

    best = min(scipy.optimize.minimize(loss, start, method="Nelder-Mead").fun for start in ([0, 0], [2, 0], [0, 2]))
    assert transferability.logme(features, target).value == pytest.approx(-best, abs=1e-4)


def test_logme_depends_on_neither_scale_nor_rotation(data):
    features, labels = data
    targets = transferability.one_hot(labels)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))
    expected = transferability.logme(features, targets).value
    assert transferability.logme(7 * features @ rotation, targets).value == pytest.approx(expected, abs=1e-5)
    doubled = np.concatenate([features, np.zeros((N, 5))], axis=1)
    assert transferability.logme(doubled, targets).value == pytest.approx(expected, abs=1e-5)


def test_h_score_without_shrinkage_is_the_trace(data, monkeypatch):
    monkeypatch.setattr("sklearn.covariance.ledoit_wolf_shrinkage", lambda *_, **__: 0.0)
    features, labels = data
    centred = features - features.mean(axis=0)
    means = np.stack([centred[labels == c].mean(axis=0) for c in labels])
    expected = np.trace(np.linalg.inv(np.cov(centred.T, bias=True)) @ np.cov(means.T, bias=True))
    found = transferability.h_score(features, labels).value
    assert found == pytest.approx(expected)
    mixed = features @ np.random.default_rng(3).normal(size=(D, D))
    assert transferability.h_score(mixed, labels).value == pytest.approx(found)


@pytest.mark.parametrize("name", ["logme", "h_score"])
def test_influences_are_what_more_of_an_example_changes(data, monkeypatch, name):
    """A copy of one example among k of all: its weight rises from 1/N by about 1 / (k N)."""
    monkeypatch.setattr("sklearn.covariance.ledoit_wolf_shrinkage", lambda *_, **__: 0.1)
    features, labels = data
    score = {
        "logme": lambda x, y: transferability.logme(x, transferability.one_hot(y)),
        "h_score": transferability.h_score,
    }[name]
    copies = 20
    many = np.tile(np.arange(N), copies)
    if name == "logme":  # evidence is not a mean over examples: a prior counts once, whatever their number
        base = score(features[many], labels[many])
        influence = base.influence[:N]
    else:
        base = score(features, labels)
        influence = base.influence
    for i in (0, 7, 20):
        one_more = np.append(many, i)
        change = score(features[one_more], labels[one_more]).value - base.value
        assert change == pytest.approx(influence[i] / len(one_more), rel=0.1, abs=2e-5)


def test_informative_features_score_higher_than_noise(data):
    features, labels = data
    noise = np.random.default_rng(4).normal(size=features.shape)
    ours, theirs = (transferability.scores(x, labels, True, seed=0) for x in (features, noise))
    assert set(ours) == {"logme", "h_score", "linear_probe", "nearest"}
    assert all(ours[name].value > theirs[name].value for name in ours)
    numbers = features[:, 0] * 2 - 1
    ours, theirs = (transferability.scores(x, numbers, False, seed=0) for x in (features, noise))
    assert set(ours) == {"logme", "linear_probe", "nearest"}
    assert all(ours[name].value > theirs[name].value for name in ours)
    assert ours["linear_probe"].value > 0.9


def test_intervals_have_the_error_of_a_mean(data):
    features, labels = data
    found = transferability.linear_probe(features, labels, True, seed=0)
    weights = transferability.resample(N, 2000, seed=0)
    assert weights.sum(axis=1) == pytest.approx(np.ones(2000))
    error = np.sqrt(found.value * (1 - found.value) / N)
    assert found.resampled(weights).std() == pytest.approx(error, rel=0.1)
    assert found.resampled(weights).mean() == pytest.approx(found.value, abs=error / 10)
