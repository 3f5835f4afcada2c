import jax
import numpy as np

from research.models.linear_attention import LinearSelfAttention

RNG = np.random.default_rng(0)
MODEL = LinearSelfAttention(initializer_range=0.5)
X, Y = RNG.normal(size=(5, 7, 3)).astype(np.float32), RNG.normal(size=(5, 7)).astype(np.float32)
PARAMS = MODEL.init(jax.random.key(0), X, Y)["params"]


def predict(x, y):
    return np.asarray(MODEL.apply({"params": PARAMS}, x, y))


def test_it_is_the_papers_sum_over_the_context():
    query, key, value, out = (np.asarray(PARAMS[name]["kernel"]) for name in ("query", "key", "value", "out"))
    for x, y, prediction in zip(X, Y, predict(X, Y)):
        last = np.append(x[-1], 0)
        tokens = [np.append(x[i], y[i]) for i in range(6)]
        added = sum((token @ value) * ((token @ key) @ (last @ query)) for token in tokens) / 6 @ out
        np.testing.assert_allclose(prediction, -(last + added)[-1:], rtol=1e-4, atol=1e-5)


def test_what_is_to_be_predicted_is_not_read_and_the_order_does_not_matter():
    assert predict(X, Y).shape == (5, 1)
    changed = Y.copy()
    changed[:, -1] += 1
    np.testing.assert_array_equal(predict(X, Y), predict(X, changed))
    order = [3, 0, 5, 1, 4, 2, 6]
    np.testing.assert_allclose(predict(X, Y), predict(X[:, order], Y[:, order]), rtol=1e-4, atol=1e-5)
