"""The Frechet distance against its closed form, and what the evaluator shows to which network."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.data.image import Decode, Normalize
from research.data.source import examples
from research.errors import UserError
from research.evaluators.frechet import Frechet, Pixels, _moments, frechet_distance
from research.generation.diffusion import Flow, Sampling
from research.models.dit import DiT
from research.sharding import AXES
from research.tasks.diffusion import Diffusion


class Paints(DiT):
    """Says that the data are a picture whose first half is as bright as its class says."""

    @nn.compact
    def __call__(self, image, time, label):
        bright = self.param("bright", nn.initializers.zeros, (self.num_classes + 1,))[label]
        data = jnp.broadcast_to(bright[:, None, None, None], image.shape).at[:, 4:].set(-1.0)
        # Of a velocity e - x_0 with time in thousandths.
        return (image - data) / jnp.maximum(time / 1000, 1e-6)[:, None, None, None]


@dataclasses.dataclass(frozen=True)
class Sees:
    """A classifier by brightness of the first row; its features are two pixels."""

    metric = "frechet_two_pixels"

    @property
    def params(self):
        return {"levels": np.array([0.2, 0.6, 0.8], np.float32)}

    def check(self, shape, label_names):
        if shape[2] != 1:
            raise UserError("network: grey images only")

    def __call__(self, params, pixels):
        distances = jnp.abs(pixels[:, 0, 0] - params["levels"])
        return {"features": jnp.stack([pixels[:, 0, 0, 0], pixels[:, 7, 7, 0]], axis=1), "logits": -distances}


SIZES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_classes": 3, "hidden_size": 32, "num_layers": 1}
TASK = Diffusion(Paints(**SIZES, learned_variance=False), Flow(), sampling=Sampling("euler", 3))
BRIGHT = {"bright": np.array([-0.6, 0.2, 0.6, 0.0], np.float32)}  # 51, 153 and 204 of 255


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def real(levels, count=8, batch_size=3):
    images = np.zeros((count, 8, 8), np.uint8)
    for i in range(count):
        images[i, :4] = levels[i % len(levels)]
    records = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    ops = (Decode(channels=1), Normalize())
    return Dataset(examples(records), ("image", "label"), ops, batch_size=batch_size)


def normals(seed=0, width=5):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(2, width, width))
    return [(rng.normal(size=width), root @ root.T) for root in roots]


def test_the_distance_is_its_closed_form():
    one, other = normals()
    root = scipy.linalg.sqrtm(one[1] @ other[1]).real
    wanted = np.square(one[0] - other[0]).sum() + np.trace(one[1] + other[1] - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(wanted, rel=1e-9)


def test_what_it_is_of_simple_distributions():
    zero, unit = np.zeros(3), np.eye(3)
    assert frechet_distance((zero, unit), (zero + 2, unit)) == pytest.approx(12)
    assert frechet_distance((zero, unit), (zero, 9 * unit)) == pytest.approx(3 * (3 - 1) ** 2)
    assert frechet_distance((zero, 0 * unit), (zero, 4 * unit)) == pytest.approx(12)
    turned = np.diag([1.0, 4.0, 9.0])
    assert frechet_distance((zero, turned), (zero, turned[::-1, ::-1])) == pytest.approx(2 * (1 - 3) ** 2)


def test_equal_sets_are_at_no_distance_even_if_they_are_few():
    features = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    moments = _moments(features)
    assert np.linalg.matrix_rank(moments[1]) == 5
    assert frechet_distance(moments, moments) < 1e-5
    assert frechet_distance(moments, _moments(features[:3])) > 1


def test_it_compares_what_is_drawn_with_what_is_real(mesh):
    """Brightness 51, 153 and 204 of 255 on one side, 0 and 255 on the other: the closed form for one number."""
    evaluator = Frechet(TASK, mesh, real([0, 255]), Sees(), num_samples=12)
    found = evaluator(BRIGHT)
    assert set(found) == {"frechet_two_pixels", "real_frechet_two_pixels", "accuracy"}
    drawn = np.tile(np.array([51, 153, 204]) / 255, 4)
    wanted = (drawn.mean() - 0.5) ** 2 + (drawn.std(ddof=1) - np.tile([0, 1], 4).std(ddof=1)) ** 2
    assert found["frechet_two_pixels"] == pytest.approx(wanted, rel=1e-4)
    assert found["accuracy"] == 1
    assert found["real_frechet_two_pixels"] == pytest.approx(1)  # the halves are all dark and all bright
    wrong = {"bright": BRIGHT["bright"][[1, 0, 2, 3]]}
    assert evaluator(wrong)["accuracy"] == pytest.approx(1 / 3)
    assert evaluator(wrong)["frechet_two_pixels"] == pytest.approx(wanted, rel=1e-4)


def test_every_sample_counts_once_whatever_the_batches(mesh):
    found = [
        Frechet(TASK, mesh, real([10, 100, 220], batch_size=size), Pixels(4), num_samples=10)(BRIGHT)
        for size in (1, 4, 64)
    ]
    assert set(found[0]) == {"frechet_pixels", "real_frechet_pixels"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_pixels_are_means_of_squares():
    image = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    features = Pixels(2)({}, jnp.asarray(image))["features"]
    np.testing.assert_allclose(features[1, 3:6], image[1, :4, 4:].mean(axis=(0, 1)), rtol=1e-5)


def test_mistakes(mesh):
    latents = Diffusion(Paints(**SIZES | {"num_channels": 4}, learned_variance=False))
    with pytest.raises(UserError, match="4 channels are latents, not images"):
        Frechet(latents, mesh, real([0]), Pixels(4))
    with pytest.raises(UserError, match=r"network.size: images of 8 pixels cannot be divided into 3 squares"):
        Frechet(TASK, mesh, real([0]), Pixels(3))
    with pytest.raises(UserError, match="num_samples: 1 must be at least 2"):
        Frechet(TASK, mesh, real([0]), Pixels(4), num_samples=1)
    with pytest.raises(UserError, match=r"sampling.sampler: 'ddpm' does not fit"):
        Frechet(TASK, mesh, real([0]), Pixels(4), sampling=Sampling("ddpm"))
