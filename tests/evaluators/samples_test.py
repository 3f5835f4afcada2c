"""Grids of what is drawn beside what is real."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.data.image import Decode, Normalize
from research.data.shapes import shapes
from research.errors import UserError
from research.evaluators import samples
from research.evaluators.samples import Drawing, Samples, draw
from research.generation.diffusion import Flow, Sampling
from research.models.dit import DiT
from research.reporting import pictures
from research.sharding import AXES
from research.tasks.diffusion import Diffusion


class Paints(DiT):
    """Says that the data are a picture as bright as its class says; drawn in one step, but for the noise's share."""

    @nn.compact
    def __call__(self, image, time, label):
        level = self.param("level", nn.initializers.zeros, (self.num_classes + 1,))[label][:, None, None, None]
        return 0.9 * (image - level)  # at time 1: a tenth of the noise stays


SIZES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_classes": 3, "hidden_size": 32, "num_layers": 1}
TASK = Diffusion(
    Paints(**SIZES, learned_variance=False), Flow(), 0.1, Sampling("euler", 1), ("disc", "square", "cross")
)
PARAMS = {"level": np.array([-1.0, 0.0, 1.0, 0.0], np.float32)}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def data(batch_size=4):
    ops = (Decode(channels=1), Normalize())
    return Dataset(shapes(12, size=8, channels=1), ("image", "label"), ops, batch_size=batch_size)


def test_images_are_those_of_their_classes_and_functions_of_their_numbers(mesh):
    labels = [2, 0, 1, 1, 2]
    drawing = Drawing(TASK, TASK.sampling, seed=3)
    found = draw(drawing, PARAMS, labels, 2, mesh)
    assert found.shape == (5, 8, 8, 1)
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 0.9 * PARAMS["level"][labels], atol=0.1)
    np.testing.assert_allclose(found, draw(drawing, PARAMS, labels, 64, mesh), rtol=1e-5)
    np.testing.assert_allclose(found[:2], draw(drawing, PARAMS, labels[:2], 2, mesh), rtol=1e-5)
    assert np.abs(found[2] - found[3]).max() > 1e-2
    assert np.abs(found - draw(Drawing(TASK, TASK.sampling, 4), PARAMS, labels, 2, mesh)).max() > 1e-2


def test_the_picture(mesh, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        pictures, "by_class", lambda *arguments: seen.update(zip(("rows", "names", "title"), arguments))
    )
    Samples(TASK, mesh, data(), columns=3, real=2)(PARAMS)
    assert seen["names"] == ["disc", "square", "cross"]
    assert seen["title"] == "samples: Euler, 1 step; the last columns: real"
    assert [row.shape for row in seen["rows"]] == [(6, 8, 8, 1)] * 3
    for i, row in enumerate(seen["rows"]):
        np.testing.assert_allclose(row[:3].mean(), np.clip(0.5 + 0.45 * PARAMS["level"][i], 0, 1), atol=0.1)
        assert (row[3] == 1).all()
        source = data().source
        for j in (0, 1):
            np.testing.assert_allclose(row[4 + j], source[i + 3 * j]["image"] / 255, atol=1e-6)


def test_it_is_drawn(mesh):
    picture = Samples(TASK, mesh, data(), columns=2, real=0, classes=2)(PARAMS)["images"]
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    again = Samples(TASK, mesh, data(), columns=2, real=0, classes=2)(PARAMS)["images"]
    np.testing.assert_array_equal(picture, again)


def test_rows_of_classes():
    rows = [np.zeros((3, 8, 8, 3)), np.ones((1, 8, 8, 3)), np.full((2, 8, 8, 3), 0.5)]
    picture = pictures.by_class(rows, ["nothing", "all", "half"], "title")
    assert (picture == 0).all(axis=-1).sum() > 3 * 50 * 50  # three black images, legibly large
    assert (np.abs(picture.astype(int) - 128) < 2).all(axis=-1).sum() > 2 * 50 * 50


def test_pixels_undo_what_was_normalised():
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    op = Normalize([0.1, 0.5, 0.7], [0.3, 0.2, 0.9])
    for convert in (np.asarray, jnp.asarray):
        normal = convert(op({"image": image})["image"])
        np.testing.assert_allclose(pictures.pixels(normal, (Decode(), op)), image / 255, atol=1e-6)


def test_how_it_was_drawn_in_words():
    assert samples.describe(Sampling("ddim", 50, 2.5)) == "DDIM, 50 steps, guidance 2.5"
    assert samples.describe(Sampling("ddpm", 250)) == "DDPM, 250 steps"


def test_mistakes(mesh):
    with pytest.raises(UserError, match="columns: 0 must be at least 1"):
        Samples(TASK, mesh, data(), columns=0)
    with pytest.raises(UserError, match="4 channels are latents, not images"):
        Samples(Diffusion(Paints(**SIZES | {"num_channels": 4}, learned_variance=False)), mesh, data())
