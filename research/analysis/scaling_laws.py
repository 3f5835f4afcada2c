"""Compute-optimal scaling: the parametric law of losses (Hoffmann 2022, section 3.3), fitted and evaluated.

The law is L(N, D) = E + A / N**alpha + B / D**beta, of N parameters and D tokens; C = 6 N D is the compute.
"""

import dataclasses
import itertools
import math

import numpy as np
import scipy.optimize
import scipy.special

from research.errors import UserError

DELTA = 1e-3  # of the Huber loss on logarithms (Hoffmann 2022, equation 3)
# Where the optimiser begins (Hoffmann 2022, appendix D.3): log A, log B, log E, alpha, beta.
STARTS = ((0.0, 10.0, 20.0), (0.0, 10.0, 20.0), (-0.5, 0.5), (0.0, 0.5, 1.0), (0.0, 0.5, 1.0))


@dataclasses.dataclass(frozen=True)
class Law:
    """A parametric law of losses in nats a token.

    Attributes:
      irreducible: E.
      size_factor: A.
      data_factor: B.
      size_exponent: alpha.
      data_exponent: beta.
    """

    irreducible: float
    size_factor: float
    data_factor: float
    size_exponent: float
    data_exponent: float

    def loss(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the losses of models of N parameters after D tokens."""
        by_size = self.size_factor / np.asarray(parameters, np.float64) ** self.size_exponent
        return self.irreducible + by_size + self.data_factor / np.asarray(tokens, np.float64) ** self.data_exponent

    @property
    def optimal_exponent(self) -> float:
        """The exponent a of the compute-optimal size, N proportional to C**a (Hoffmann 2022, equation 4)."""
        return self.data_exponent / (self.size_exponent + self.data_exponent)

    def optimal(self, compute: float) -> tuple[float, float]:
        """Return the parameters and tokens of the least loss at C = 6 N D (Hoffmann 2022, equation 4)."""
        total = self.size_exponent + self.data_exponent
        ratio = self.size_exponent * self.size_factor / (self.data_exponent * self.data_factor)
        parameters = ratio ** (1 / total) * (compute / 6) ** self.optimal_exponent
        return parameters, compute / 6 / parameters


HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann 2022, equation 10
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # Besiroglu 2024, table 1, a refit of the same runs


def fit(parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> Law:
    """Fit a law to runs by the Huber loss of the logarithm, from many starts (Hoffmann 2022, equation 3).

    The sum over runs is minimised, to convergence: the mean, whose small gradients ended the search early, is what
    Besiroglu (2024, section 3) found wrong with the constants published first.

    Args:
      parameters: [runs].
      tokens: [runs].
      losses: [runs], in nats a token.

    Raises:
      UserError: fewer runs than constants, or a value that is not positive.
    """
    columns = [np.asarray(x, np.float64) for x in (parameters, tokens, losses)]
    if len({x.shape for x in columns}) != 1 or columns[0].ndim != 1 or columns[0].size < len(STARTS):
        raise UserError(f"a scaling law has {len(STARTS)} constants; it needs at least as many runs to fit")
    if not all((x > 0).all() and np.isfinite(x).all() for x in columns):
        raise UserError("a scaling law is fitted to positive, finite parameters, tokens and losses")
    logarithms = [np.log(x) for x in columns]
    found = [
        scipy.optimize.minimize(_objective, start, args=tuple(logarithms), jac=True, method="L-BFGS-B", options=OPTIONS)
        for start in itertools.product(*STARTS)
    ]
    log_a, log_b, log_e, alpha, beta = map(float, min(found, key=lambda result: result.fun).x)
    return Law(math.exp(log_e), math.exp(log_a), math.exp(log_b), alpha, beta)


OPTIONS = {"maxiter": 5000, "maxfun": 50000, "ftol": 1e-14, "gtol": 1e-9}


def _objective(x: np.ndarray, size: np.ndarray, data: np.ndarray, loss: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the sum of Huber losses, scaled up for the optimiser's tolerances, and its gradient, of logarithms."""
    log_a, log_b, log_e, alpha, beta = x
    terms = np.stack([log_a - alpha * size, log_b - beta * data, np.full_like(size, log_e)])
    predicted = scipy.special.logsumexp(terms, axis=0)
    error = predicted - loss
    small = np.abs(error) <= DELTA
    value = np.where(small, 0.5 * error**2, DELTA * (np.abs(error) - 0.5 * DELTA)).sum()
    slope = np.where(small, error, DELTA * np.sign(error)) * np.exp(terms - predicted)  # [3, runs]
    by_a, by_b, by_e = slope.sum(axis=1)
    gradient = np.array([by_a, by_b, by_e, -(slope[0] * size).sum(), -(slope[1] * data).sum()])
    return value / DELTA**2, gradient / DELTA**2


def best_size(parameters: np.ndarray, losses: np.ndarray) -> float:
    """Return the size of the least loss among runs of one compute (Hoffmann 2022, section 3.2).

    It is the minimum of the parabola in log N through the best run and those of the next smaller and larger size.

    Args:
      parameters: [runs], all different.
      losses: [runs].

    Raises:
      UserError: the best run is the smallest or the largest.
    """
    order = np.argsort(parameters)
    best = int(np.argmin(losses[order]))
    if not 0 < best < len(order) - 1:
        raise UserError("the losses of one compute have no minimum over the sizes; add smaller or larger models")
    near = order[best - 1 : best + 2]
    quadratic, linear, _ = np.polyfit(np.log(parameters[near]), losses[near], 2)
    return float(np.exp(-linear / (2 * quadratic)))
