import jax
import numpy as np
import pytest

from research.errors import UserError
from research.models.in_context_decoder import InContextDecoder
from research.models.linear_attention import LinearSelfAttention
from research.tasks.in_context_regression import InContextRegression

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(4, 5, 3)).astype(np.float32), RNG.normal(size=(4, 5)).astype(np.float32)
BATCH = {"inputs": X, "outputs": Y, "mask": np.array([1, 1, 0, 1], np.float32)}
SPEC = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in BATCH.items()}


@pytest.mark.parametrize(("model", "predicted"), [(LinearSelfAttention(), 1), (InContextDecoder(5, 8, 1, 2, 16), 5)])
def test_the_loss_is_over_what_the_model_predicts_of_the_rows_that_count(model, predicted):
    task = InContextRegression(model)
    params = task.init(jax.random.key(0), SPEC)
    predictions = np.asarray(task.predict(params, BATCH, jax.random.key(0))["predictions"])
    assert predictions.shape == (4, predicted)
    loss, _ = task.loss(params, BATCH, jax.random.key(0))
    errors = np.square(predictions - Y[:, -predicted:])[[0, 1, 3]]
    assert float(loss.compute()) == pytest.approx(errors.mean(), rel=1e-5)
    assert float(loss.count) == 3 * predicted
    assert task.describe({"predictions": predictions[0]}) == {"predictions": predictions[0].tolist()}


def test_mistakes():
    task = InContextRegression(InContextDecoder(4, 8, 1, 2, 16))
    with pytest.raises(UserError, match="5 points are more than max_points, 4"):
        task.init(jax.random.key(0), SPEC)
    with pytest.raises(UserError, match="'outputs' is missing"):
        task.init(jax.random.key(0), {"inputs": SPEC["inputs"]})
