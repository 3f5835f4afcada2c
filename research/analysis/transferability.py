"""Scores that estimate, from a pretrained model's features alone, how well it will do on a task after fine-tuning.

Each score comes with the influence of every example on it, from which a bootstrap interval costs a matrix product: a
resample changes the weights of the examples, and to first order the score by the influences (the infinitesimal
jackknife, Efron 1982, chapter 6). Duplicates, which make features look more telling than they are, are so avoided.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import scipy.linalg
import sklearn.covariance
import sklearn.linear_model
import sklearn.model_selection
import sklearn.neighbors
import sklearn.pipeline
import sklearn.preprocessing

FOLDS = 5
NEIGHBOURS = 10
ROUNDS, TOLERANCE = 100, 1e-6  # of LogME's fixed-point iteration
TITLES = {"logme": "LogME", "h_score": "H-score", "linear_probe": "linear probe", "nearest": "nearest neighbours"}


@dataclasses.dataclass(frozen=True)
class Score:
    """A score and what every example adds to it.

    Attributes:
      value: higher is better.
      influence: float64 [N], with a mean of zero: N times the score's derivative by the example's weight, at weights of
        1 / N that sum to one.
    """

    value: float
    influence: np.ndarray

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """Return the scores [R] at weights [R, N], each row of which sums to one."""
        return self.value + weights @ self.influence


def resample(count: int, times: int, seed: int) -> np.ndarray:
    """Return the weights float64 [times, count] of bootstrap resamples, the same for all models: pairs compare."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), times) / count


def scores(features: np.ndarray, labels: np.ndarray, classes: bool, seed: int) -> dict[str, Score]:
    """Return every score that is defined.

    Args:
      features: [N, D].
      labels: class numbers [N], or numbers [N] to predict.
      classes: whether labels are classes; of numbers there is no H-score.
      seed: of the folds of the cross-validation.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if not classes:
        functions: Mapping[str, Callable[[], Score]] = {
            "logme": lambda: logme(features, labels),
            "linear_probe": lambda: linear_probe(features, labels, False, seed),
            "nearest": lambda: nearest_neighbours(features, labels, False, seed),
        }
    else:
        functions = {
            "logme": lambda: logme(features, one_hot(labels)),
            "h_score": lambda: h_score(features, labels),
            "linear_probe": lambda: linear_probe(features, labels, True, seed),
            "nearest": lambda: nearest_neighbours(features, labels, True, seed),
        }
    return {name: function() for name, function in functions.items()}


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Return float64 [N, C] for the C classes that occur in labels [N]."""
    return (labels[:, None] == np.unique(labels)).astype(np.float64)


def logme(features: np.ndarray, targets: np.ndarray) -> Score:
    """Return the logarithm of the maximum evidence of a Bayesian linear model, per example (You 2021, algorithm 1).

    Args:
      features: [N, D].
      targets: [N], or [N, C], over which the mean is taken: of classes, one column each.
    """
    left, spectrum = _decompose(features)
    columns = targets.reshape(len(features), -1).T
    values, influences = zip(*(_evidence(left, spectrum, column) for column in columns))
    influence = np.mean(influences, axis=0)
    return Score(float(np.mean(values)), influence - influence.mean())


def _decompose(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the left singular vectors [N, K] and the squared singular values [K], without those that are zero."""
    count, width = features.shape
    if count <= width:
        spectrum, left = np.linalg.eigh(features @ features.T)
    else:
        spectrum, right = np.linalg.eigh(features.T @ features)
    kept = spectrum > spectrum.max(initial=0) * 1e-10
    spectrum = spectrum[kept]
    return (left[:, kept] if count <= width else features @ right[:, kept] / np.sqrt(spectrum)), spectrum


def _evidence(left: np.ndarray, spectrum: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the maximum evidence of a target [N] per example, and its derivatives [N] by the examples' weights."""
    count, projected = len(target), left.T @ target
    outside = max(target @ target - projected @ projected, 0.0)  # what no weights explain
    alpha, beta = 1.0, 1.0  # the precisions of the weights and of the noise
    for _ in range(ROUNDS):
        shrunk = alpha / (alpha + beta * spectrum)
        effective = (1 - shrunk).sum()  # the number of parameters that the data determine
        size = ((1 - shrunk) ** 2 * projected**2 / spectrum).sum()
        error = outside + (shrunk**2 * projected**2).sum()
        before = alpha / beta
        alpha, beta = effective / max(size, 1e-300), (count - effective) / max(error, 1e-300)
        if abs(alpha / beta - before) <= TOLERANCE * before:
            break
    shrunk = alpha / (alpha + beta * spectrum)
    errors = left @ ((1 - shrunk) * projected) - target
    size = ((1 - shrunk) ** 2 * projected**2 / spectrum).sum()
    variances = left**2 @ (spectrum / (alpha + beta * spectrum))  # of the predictions, but for the noise
    # At the maximum the derivatives by alpha, beta and the weights vanish: what is left is that of the likelihood.
    derivatives = 0.5 * (np.log(beta / (2 * np.pi)) - beta * (errors**2 + variances))
    evidence = 0.5 * (count * np.log(beta / (2 * np.pi)) - beta * errors @ errors - alpha * size + np.log(shrunk).sum())
    return evidence / count, derivatives


def h_score(features: np.ndarray, labels: np.ndarray) -> Score:
    """Return the H-score (Bao 2019), with a covariance that is shrunk (Ibrahim 2021, section 4).

    It is the trace of the inverse covariance of the features times the covariance of their means by class, both shrunk
    by the share of Ledoit and Wolf (2004), which counts as fixed in the influences.

    Args:
      features: [N, D].
      labels: class numbers [N].
    """
    count, width = features.shape
    members = one_hot(labels)
    shares = members.mean(axis=0)
    centred = features - features.mean(axis=0)
    means = members.T @ centred / (shares[:, None] * count)
    shrinkage = sklearn.covariance.ledoit_wolf_shrinkage(centred, assume_centered=True)
    covariance = centred.T @ centred / count
    scale = np.trace(covariance) / width
    shrunk = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(width)
    solved = scipy.linalg.solve(shrunk, means.T, assume_a="pos")  # [D, C]
    distances = (means * solved.T).sum(axis=1)  # of each class from the middle
    value = float(shares @ distances)
    inside = centred @ solved  # [N, C]
    between = 2 * (members * inside).sum(axis=1) - members @ distances
    squares = (centred**2).sum(axis=1) / width
    within = (1 - shrinkage) * (inside**2 @ shares) + shrinkage * squares * (shares @ (solved**2).sum(axis=0))
    influence = (1 - shrinkage) * (between - within)
    return Score(float((1 - shrinkage) * value), influence - influence.mean())


def linear_probe(features: np.ndarray, labels: np.ndarray, classes: bool, seed: int) -> Score:
    """Return how well a linear layer predicts in cross-validation: the accuracy, or of numbers the share explained."""
    model = (
        sklearn.linear_model.LogisticRegression(C=0.1, max_iter=300) if classes else sklearn.linear_model.Ridge(10.0)
    )
    scaled = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), model)
    return _cross_validated(scaled, features, labels, classes, seed)


def nearest_neighbours(features: np.ndarray, labels: np.ndarray, classes: bool, seed: int) -> Score:
    """Return how well the nearest neighbours by cosine predict in cross-validation; see `linear_probe`."""
    kind = sklearn.neighbors.KNeighborsClassifier if classes else sklearn.neighbors.KNeighborsRegressor
    neighbours = min(NEIGHBOURS, len(features) * (FOLDS - 1) // FOLDS)
    return _cross_validated(kind(neighbours, metric="cosine"), features, labels, classes, seed)


def _cross_validated(model: object, features: np.ndarray, labels: np.ndarray, classes: bool, seed: int) -> Score:
    kind = sklearn.model_selection.StratifiedKFold if classes else sklearn.model_selection.KFold
    folds = kind(FOLDS, shuffle=True, random_state=seed)
    predicted = sklearn.model_selection.cross_val_predict(model, features, labels, cv=folds)
    each = (predicted == labels).astype(np.float64) if classes else 1 - (predicted - labels) ** 2 / labels.var()
    return Score(float(each.mean()), each - each.mean())
