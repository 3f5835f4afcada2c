import numpy as np
import pytest

from research.analysis import attribution

RNG = np.random.default_rng(0)
WEIGHTS = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=5)}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=weight.shape) for name, weight in WEIGHTS.items()}


def linear(x):
    return sum((WEIGHTS[name] * x[name]).sum() for name in WEIGHTS)


def test_gradient_x_input_of_a_linear_function_is_its_terms():
    x = arrays(1)
    found = attribution.gradient_x_input(WEIGHTS, x)
    for name in x:
        np.testing.assert_array_equal(found[name], WEIGHTS[name] * x[name])
    assert sum(value.sum() for value in found.values()) == pytest.approx(linear(x))


def test_integrated_gradients_of_a_linear_function_are_its_differences():
    x, baseline = arrays(1), arrays(2)
    repeated = {name: np.repeat(weight[None], attribution.NODES, axis=0) for name, weight in WEIGHTS.items()}
    found, points = attribution.integrated_gradients(lambda _: repeated, x, baseline, linear(x) - linear(baseline))
    for name in x:
        np.testing.assert_allclose(found[name], WEIGHTS[name] * (x[name] - baseline[name]), rtol=1e-6)
    assert points == attribution.LEAST_NODES


def test_integrated_gradients_sum_to_the_difference_and_ignore_what_does_not_matter():
    """exp(x_0 x_1) + sin(x_2), whose parts interact; x_3 is not read, x_2 has its own share alone."""
    x, baseline = {"x": np.array([1.5, 0.7, 2.0, 9.0])}, {"x": np.array([0.2, -0.3, 0.5, 0.0])}

    def value(x):
        return np.exp(x[..., 0] * x[..., 1]) + np.sin(x[..., 2])

    def gradients(points):
        x = points["x"].astype(np.float64)
        both = np.exp(x[:, 0] * x[:, 1])
        return {"x": np.stack([both * x[:, 1], both * x[:, 0], np.cos(x[:, 2]), 0 * both], axis=1)}

    difference = value(x["x"]) - value(baseline["x"])
    found, _ = attribution.integrated_gradients(gradients, x, baseline, difference)
    assert found["x"].sum() == pytest.approx(difference, rel=1e-5)
    assert found["x"][3] == 0
    assert found["x"][2] == pytest.approx(np.sin(2.0) - np.sin(0.5), rel=1e-5)


def test_points_are_added_until_the_sum_is_right():
    """A step near the baseline, as norms make one of a grey image."""
    x, baseline = {"x": np.array([1.0])}, {"x": np.array([0.0])}

    def gradients(points):
        return {"x": (1 - np.tanh(points["x"].astype(np.float64) / 0.003) ** 2) / 0.003}

    found, points = attribution.integrated_gradients(gradients, x, baseline, 1.0)
    assert found["x"][0] == pytest.approx(1, abs=0.01)
    assert points > attribution.LEAST_NODES


def test_occlusion_is_what_the_output_falls_by():
    variants = np.arange(10.0)[:, None] * np.ones(3)
    seen = []

    def score(inputs):
        seen.append(inputs[:, 0].tolist())
        return inputs[:, 0] ** 2

    found = attribution.occlusion(score, np.full(3, 5.0), variants)
    np.testing.assert_array_equal(found, 25 - np.arange(10.0) ** 2)
    assert seen == [[5, 0, 1, 2, 3, 4, 5, 6], [5, 7, 8, 9, 7, 8, 9, 7]]
    assert attribution.occlusion(score, np.zeros(3), np.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize(("shape", "side"), [((8, 8), 4), ((7, 10), 4), ((3, 5), 9)])
def test_windows_cover_an_image_once(shape, side):
    counts = np.zeros(shape)
    for place in attribution.windows(shape, side):
        counts[place] += 1
    assert (counts == 1).all()
