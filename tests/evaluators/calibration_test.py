import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from research import sharding
from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators.calibration import Calibration, calibration_error
from research.tasks.image_classification import ImageClassification


def test_confidence_that_is_the_accuracy_has_no_error_and_certainty_that_is_wrong_has_all():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1.0, 200_000)
    right = rng.random(confidence.size) < confidence
    assert calibration_error(confidence, right, 15)[0] < 0.01
    assert calibration_error(np.ones(10), np.zeros(10, bool), 15)[0] == 1.0
    assert calibration_error(np.full(8, 0.75), np.arange(8) % 4 > 0, 15)[0] == pytest.approx(0)


def test_the_error_weighs_bins_by_their_examples():
    confidence, right = np.array([0.3, 0.9, 0.9, 0.9]), np.array([True, True, False, True])
    error, table = calibration_error(confidence, right, 2)
    assert error == pytest.approx(0.25 * 0.7 + 0.75 * (0.9 - 2 / 3))
    np.testing.assert_allclose(table, [[0.25, 0.3, 1.0], [0.75, 0.9, 2 / 3]])


class Constant(nn.Module):
    """Finds class 0 of two as likely as the image's one pixel says."""

    num_outputs: int = 2

    inputs = ("image",)

    @nn.compact
    def __call__(self, image):
        first = image[:, 0, 0, 0] * self.param("factor", nn.initializers.ones, ())
        return jax.numpy.log(jax.numpy.stack([first, 1 - first], axis=-1))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Three images of probability 0.8, two of them of class 0, and four of 0.6, all of class 1."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"image": np.full((1, 1, 1), 0.8 if index < 3 else 0.6, np.float32), "label": int(index > 1)}


def test_every_example_counts_once_through_batches_with_padding():
    task = ImageClassification(Constant())
    data = Dataset(Rows(), ("image", "label"), (), batch_size=4)
    result = Calibration(task, sharding.make_mesh(), data)({"factor": np.ones(())})
    assert result["calibration_error"] == pytest.approx(3 / 7 * (0.8 - 2 / 3) + 4 / 7 * 0.6)
    assert result["confidence"] == pytest.approx((3 * 0.8 + 4 * 0.6) / 7)
    assert result["accuracy"] == pytest.approx(2 / 7)
    assert result["reliability"].ndim == 3


def test_what_has_no_confidence_is_refused():
    data = Dataset(Rows(), ("image", "label"), (), batch_size=4)
    with pytest.raises(UserError, match="'sigmoid' does not have"):
        Calibration(ImageClassification(Constant(), "sigmoid"), sharding.make_mesh(), data)
    with pytest.raises(UserError, match="bins"):
        Calibration(ImageClassification(Constant()), sharding.make_mesh(), data, bins=0)
