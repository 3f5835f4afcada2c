"""What an estimator predicts of a linear function's next point from those before it, and one step of gradient descent.

Shape letters: B functions, N points, D dimensions. The point that is to be predicted never counts.
"""

import numpy as np


def least_squares(inputs_BxNxD: np.ndarray, outputs_BxN: np.ndarray) -> np.ndarray:
    """Return what the least-squares solution of least norm predicts of each point from those before it, [B, N]."""
    predictions_BxN = np.zeros(outputs_BxN.shape)
    for i in range(1, outputs_BxN.shape[1]):
        inverse_BxDxi = np.linalg.pinv(inputs_BxNxD[:, :i].astype(np.float64))
        weights_BxD = (inverse_BxDxi @ outputs_BxN[:, :i, None])[..., 0]
        predictions_BxN[:, i] = (weights_BxD * inputs_BxNxD[:, i]).sum(axis=-1)
    return predictions_BxN


def averaging(inputs_BxNxD: np.ndarray, outputs_BxN: np.ndarray) -> np.ndarray:
    """Return what the mean of output times input, taken as weights, predicts of each point from those before, [B, N].

    Of standard normal inputs it is a consistent estimate of the weights (Garg 2022, section 3.1).
    """
    products_BxNxD = outputs_BxN[..., None] * inputs_BxNxD
    sums_BxNxD = np.cumsum(products_BxNxD, axis=1) - products_BxNxD
    before_N = np.maximum(np.arange(outputs_BxN.shape[1]), 1)
    return (sums_BxNxD * inputs_BxNxD).sum(axis=-1) / before_N


def gradient_step(inputs_BxNxD: np.ndarray, outputs_BxN: np.ndarray) -> np.ndarray:
    """Return weights [B, D] after a step of rate 1 from 0 on the first N - 1 points.

    It is the negative gradient of half their mean squared error (von Oswald 2023, section 2); what other rates predict
    is proportional to it.
    """
    return (outputs_BxN[:, :-1, None] * inputs_BxNxD[:, :-1]).mean(axis=1)


def best_rate(predictions_B: np.ndarray, targets_B: np.ndarray) -> float:
    """Return the factor of the predictions that has the least squared error."""
    return float((predictions_B * targets_B).sum() / np.square(predictions_B).sum())


def expected_rate(dimensions: int, examples: int) -> float:
    """Return the rate that makes one step on uniform inputs in [-1, 1) best in expectation.

    With A the mean of x x^T over the examples, and weights and query independent of it, the error is proportional to
    tr E[(I - rate A)^2], which is least at tr E[A] / tr E[A^2]; x has variance 1/3 and fourth moment 1/5.
    """
    fourth = dimensions / 5 + dimensions * (dimensions - 1) / 9  # E |x|^4
    square = (fourth + (examples - 1) * dimensions / 9) / examples  # tr E[A^2]
    return dimensions / 3 / square


def expected_error(dimensions: int, examples: int) -> float:
    """Return the expected squared error of one step at `expected_rate`; that of predicting 0 is dimensions / 3."""
    return (dimensions - expected_rate(dimensions, examples) * dimensions / 3) / 3
