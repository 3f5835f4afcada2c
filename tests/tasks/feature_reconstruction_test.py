import jax
import numpy as np
import pytest

from research.errors import UserError
from research.models.feature_autoencoder import FeatureAutoencoder
from research.tasks.feature_reconstruction import FeatureReconstruction

RNG = np.random.default_rng(0)
FEATURES = RNG.random((5, 4)).astype(np.float32)
PARAMS = {"kernel": RNG.normal(size=(4, 2)).astype(np.float32), "bias": RNG.normal(size=4).astype(np.float32)}


def batch(mask=(1, 1, 1, 1, 1)):
    return {"features": FEATURES, "mask": np.array(mask, np.float32)}


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_the_loss_is_the_papers(activation):
    task = FeatureReconstruction(FeatureAutoencoder(2, activation), importance=0.7)
    loss, _ = task.loss(PARAMS, batch((1, 1, 0, 1, 0)), jax.random.key(0))
    errors = []
    for x in FEATURES[[0, 1, 3]]:
        w = PARAMS["kernel"].T.astype(np.float64)
        reconstruction = w.T @ w @ x + PARAMS["bias"]
        if activation == "relu":
            reconstruction = np.maximum(reconstruction, 0)
        errors.append([0.7**i * (x[i] - reconstruction[i]) ** 2 for i in range(4)])
    assert float(loss.compute()) == pytest.approx(np.mean(errors), rel=1e-5)
    assert float(loss.count) == 12
    assert float(task.metrics(PARAMS, batch())["loss"].compute()) > 0


def test_its_parameters_and_mistakes():
    task = FeatureReconstruction(FeatureAutoencoder(2))
    spec = {"features": jax.ShapeDtypeStruct((8, 4), np.float32)}
    params = task.init(jax.random.key(0), spec)
    assert {name: x.shape for name, x in params.items()} == {"kernel": (4, 2), "bias": (4,)}
    with pytest.raises(UserError, match="'features' is missing"):
        task.init(jax.random.key(0), {"feature": spec["features"]})
    for importance in (0, 1.1):
        with pytest.raises(UserError, match=r"importance: .* must lie in \(0, 1\]"):
            FeatureReconstruction(FeatureAutoencoder(2), importance)
