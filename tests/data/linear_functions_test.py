import numpy as np
import pytest

from research.data.linear_functions import linear_functions
from research.errors import UserError


def arrays(count, **arguments):
    source = linear_functions(count=count, **arguments)
    examples = [source[i] for i in range(count)]
    return tuple(np.stack([example[name] for example in examples]) for name in ("inputs", "outputs"))


@pytest.mark.parametrize(("inputs", "variance"), [("normal", 1.0), ("uniform", 1 / 3)])
def test_outputs_are_linear_in_inputs_of_the_distribution(inputs, variance):
    x, y = arrays(2000, dimensions=3, points=8, inputs=inputs)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((2000, 8, 3), (2000, 8), np.float32, np.float32)
    weights = np.linalg.solve(x[:, :3].astype(np.float64), y[:, :3, None])[..., 0]
    determined = np.abs(np.linalg.det(x[:, :3])) > 0.1
    fitted = np.einsum("bnd,bd->bn", x, weights)
    np.testing.assert_allclose(fitted[determined], y[determined], atol=1e-3)
    assert weights[determined].var() == pytest.approx(1.0, abs=0.05)
    assert x.var() == pytest.approx(variance, rel=0.03)
    assert x.mean() == pytest.approx(0.0, abs=0.02)
    assert np.square(y).mean() == pytest.approx(3 * variance, rel=0.1)


def test_a_function_is_a_function_of_seed_and_position():
    first, again, other = (arrays(4, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
        assert (a[0] != a[1]).any()
    with pytest.raises(IndexError):
        linear_functions(count=4)[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": "unifrom"}, "inputs: unknown 'unifrom'; did you mean 'uniform'"),
        ({"points": 0}, "points: .* must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        linear_functions(**arguments)
