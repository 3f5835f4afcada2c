import jax
import numpy as np

from research.models.in_context_decoder import InContextDecoder

RNG = np.random.default_rng(0)
MODEL = InContextDecoder(
    max_points=6, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, initializer_range=0.5
)
X, Y = RNG.normal(size=(3, 6, 4)).astype(np.float32), RNG.normal(size=(3, 6)).astype(np.float32)
PARAMS = MODEL.init(jax.random.key(0), X, Y)["params"]


def predict(x, y):
    return np.asarray(MODEL.apply({"params": PARAMS}, x, y))


def test_a_prediction_sees_the_points_before_it_and_its_own_input_alone():
    first = predict(X, Y)
    assert first.shape == (3, 6)
    y = Y.copy()
    y[:, 3] += 1
    changed = predict(X, y) != first
    assert not changed[:, :4].any()
    assert changed[:, 4:].all()
    x = X.copy()
    x[:, 3] += 1
    changed = predict(x, Y) != first
    assert not changed[:, :3].any()
    assert changed[:, 3:].all()


def test_fewer_points_are_predicted_as_the_first_of_more():
    np.testing.assert_allclose(predict(X[:, :4], Y[:, :4]), predict(X, Y)[:, :4], rtol=1e-5, atol=1e-5)
