"""Pictures of reconstructions: the images in their own brightness, what is hidden, and what is painted there."""

import jax
import numpy as np
import pytest

from research import sharding
from research.data.dataset import Dataset
from research.data.image import Decode, Normalize
from research.data.shapes import shapes
from research.errors import UserError
from research.evaluators.reconstructions import Reconstructions
from research.models import vit
from research.models.mae import MaskedAutoencoder
from research.reporting import pictures
from research.tasks.reconstruction import Reconstruction

ENCODER = vit.Encoder(
    image_size=16,
    patch_size=4,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    intermediate_size=8,
    positions="sinusoidal",
)
SOURCE = shapes(9, size=16)


def evaluator(count=5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3), model=None):
    data = Dataset(SOURCE, ("image",), (Decode(), Normalize(mean, std)), batch_size=4)
    task = Reconstruction(model or MaskedAutoencoder(ENCODER, 8, 1, 2, 8))
    return Reconstructions(task, sharding.make_mesh(), data, count)


@pytest.fixture
def drawn(monkeypatch):
    """What is to be drawn, at each call."""
    calls, draw = [], pictures.reconstructions

    def spy(*arguments):
        calls.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(pictures, "reconstructions", spy)
    return calls


def start(evaluator):
    return jax.jit(lambda: evaluator.task.init(jax.random.key(0), evaluator.data.spec))()


def test_the_picture_shows_the_first_images(drawn):
    found = evaluator()
    params = start(found)
    result = found(params)
    assert list(result) == ["images"]
    assert (result["images"].dtype, result["images"].ndim) == (np.uint8, 3)
    np.testing.assert_array_equal(found(params)["images"], result["images"])
    true, predicted, hidden, title = drawn[0]
    assert len(true) == len(predicted) == len(hidden) == 5
    for i in range(5):
        np.testing.assert_allclose(true[i], SOURCE[i]["image"] / 255, atol=1e-6)
        np.testing.assert_allclose(predicted[i][~hidden[i]], true[i][~hidden[i]], atol=1e-6)
        squares = hidden[i].reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)
        assert squares.any(axis=1).sum() == squares.all(axis=1).sum() == 12
    assert (
        title
        == "75% of the patches are masked (blue); predictions are rescaled to the true mean and deviation of each patch"
    )


def test_plain_pixels_are_predicted_without_help(drawn):
    model = MaskedAutoencoder(ENCODER, 8, 1, 2, 8, 0.5, normalize_targets=False)
    found = evaluator(mean=(0.0,), std=(1.0,), model=model)
    found(start(found))
    np.testing.assert_allclose(drawn[0][0][0], SOURCE[0]["image"] / 255, atol=1e-6)
    assert drawn[0][3] == "50% of the patches are masked (blue)"


def test_no_image_is_no_picture():
    with pytest.raises(UserError, match="count: 0 must be at least 1"):
        evaluator(count=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_parts_are_blue(channels):
    image = np.full((8, 8, channels), 0.5, np.float32)
    hidden = np.zeros((8, 8), bool)
    none = pictures.reconstructions([image], [image], [hidden], "")
    some = pictures.reconstructions([image], [image], [hidden | True], "")
    assert not (none.astype(int).max(axis=-1) - none.min(axis=-1) > 40).any()
    blue = some[..., 2].astype(int) - some[..., 0] > 40
    _, columns = np.nonzero(blue)
    assert blue.any()
    assert columns.max() < some.shape[1] / 3
