"""Attribution: how much each part of an input matters to a number that is computed of it.

Arrays that belong together, such as the embeddings of two texts, come as {name: array}; all are float32. "N" counts
variants of one example.
"""

from collections.abc import Callable, Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]

NODES = 8  # points of the path that are computed at once
LEAST_NODES, MOST_NODES = 16, 256
POWER = 4  # of the substitution by which points are denser near the baseline
TOLERANCE = 0.01  # of the difference of the outputs, by which the attributions' sum may miss it


def gradient_x_input(gradient: Arrays, x: Arrays) -> dict[str, np.ndarray]:
    """Return the products of a gradient and the input (Shrikumar 2016), of each array's shape.

    For a linear function without a constant they sum to its value.
    """
    return {name: np.asarray(gradient[name], np.float64) * np.asarray(x[name], np.float64) for name in x}


def integrated_gradients(
    gradients: Callable[[Arrays], Arrays], x: Arrays, baseline: Arrays, difference: float
) -> tuple[dict[str, np.ndarray], int]:
    """Return the integrated gradients (Sundararajan 2017, equation 1) and the number of points on the path.

    The integral along the straight path is taken by Gauss-Legendre quadrature, at 16 points, then 64, then 256, until
    the sum of all attributions is within a hundredth of the difference of the outputs, which it equals in exact
    arithmetic (completeness, proposition 1).

    Args:
      gradients: maps inputs [N, ...] to the gradients of each, [N, ...]; N is always 8.
      x: the input, [...] each.
      baseline: where the path begins, of the same shapes.
      difference: the output for `x` less that for `baseline`.
    """
    nodes = LEAST_NODES
    while True:
        attributions = _quadrature(gradients, x, baseline, nodes)
        total = sum(float(values.sum()) for values in attributions.values())
        if nodes >= MOST_NODES or abs(total - difference) <= TOLERANCE * abs(difference) + 1e-6:
            return attributions, nodes
        nodes *= 4


def _quadrature(
    gradients: Callable[[Arrays], Arrays], x: Arrays, baseline: Arrays, nodes: int
) -> dict[str, np.ndarray]:
    places, weights = np.polynomial.legendre.leggauss(nodes)
    # From [-1, 1] to [0, 1], and near the baseline: where that is a grey image, norms make its neighbours differ most.
    halves = (places + 1) / 2
    places, weights = halves**POWER, weights / 2 * POWER * halves ** (POWER - 1)
    means = {name: np.zeros(np.shape(value), np.float64) for name, value in x.items()}
    for start in range(0, nodes, NODES):
        part = slice(start, start + NODES)
        along = {name: baseline[name] + _column(places[part], x[name]) * (x[name] - baseline[name]) for name in x}
        found = gradients({name: value.astype(np.float32) for name, value in along.items()})
        for name in x:
            means[name] += np.tensordot(weights[part], np.asarray(found[name], np.float64), axes=1)
    return {name: means[name] * (np.asarray(x[name], np.float64) - baseline[name]) for name in x}


def _column(values_N: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values_N.reshape(-1, *[1] * np.ndim(like))


def occlusion(score: Callable[[np.ndarray], np.ndarray], x: np.ndarray, variants: np.ndarray) -> np.ndarray:
    """Return by how much the output falls where parts of the input are hidden (Zeiler 2013, section 4.2), float64 [V].

    The input goes along with its variants, so that what does not matter is exactly 0 and not what rounding leaves.

    Args:
      score: maps inputs [N, ...] to outputs [N]; N is always 8.
      x: the input, [...].
      variants: the inputs in each of which another part is hidden, [V, ...].
    """
    falls = np.zeros(len(variants))
    for start in range(0, len(variants), NODES - 1):
        part = variants[start : start + NODES - 1]
        together = np.concatenate([x[None], np.resize(part, (NODES - 1, *part.shape[1:]))])
        outputs = np.asarray(score(together), np.float64)
        falls[start : start + len(part)] = outputs[0] - outputs[1 : len(part) + 1]
    return falls


def windows(shape: tuple[int, int], side: int) -> list[tuple[slice, slice]]:
    """Return the squares of `side` pixels that cover an image of a height and width, row by row, cut at its edges."""
    height, width = shape
    return [
        (slice(top, min(top + side, height)), slice(left, min(left + side, width)))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
