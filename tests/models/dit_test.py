"""What a DiT must be before and while it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import vit
from research.models.dit import DiT, normalize, time_waves

SIZES = {"image_size": 12, "patch_size": 4, "num_channels": 1, "num_classes": 3}
SIZES |= {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "intermediate_size": 48}
MODEL = DiT(**SIZES)
LABEL = np.array([0, 3], np.int32)
TIME = np.array([7.0, 900.0], np.float32)


def image(seed=0, shape=(2, 12, 12, 1)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGE = image()


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(MODEL.init)(jax.random.key(0), image(), TIME, LABEL)["params"]


@pytest.fixture(scope="module")
def trained(fresh):
    """Parameters none of which is 0 any more."""
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh)))
    keys = jax.tree.unflatten(jax.tree.structure(fresh), list(keys))
    return jax.tree.map(lambda x, key: x + 0.1 * jax.random.normal(key, x.shape), fresh, keys)


def apply(params, model=MODEL, image=IMAGE, time=TIME, label=LABEL, **options):
    return jax.jit(lambda p: model.apply({"params": p}, image, time, label, **options))(params)


def test_a_new_model_says_nothing_and_its_blocks_are_the_identity(fresh):
    assert not apply(fresh).any()
    _, state = apply(fresh, capture_intermediates=lambda module, _: module.name in ("patches", "layers"))
    found = state["intermediates"]
    patches = found["patches"]["__call__"][0] + vit.sinusoids_2d(3, 3, 32)
    every = np.asarray(found["layers"]["__call__"][0])
    assert every.shape == (3, 2, 9, 32)
    for layer in every:
        np.testing.assert_allclose(layer, patches, rtol=1e-6)


def test_it_begins_as_published(fresh):
    for name in ("modulation", "output"):
        assert not any(leaf.any() for leaf in jax.tree.leaves(fresh[name]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(fresh["layers"]["modulation"]))
    for kernel, fans in (
        (fresh["layers"]["attention"]["query"]["kernel"], 32 + 3 * 32),  # one layer makes all three
        (fresh["layers"]["attention"]["out"]["kernel"], 32 + 32),
        (fresh["layers"]["mlp"]["up"]["kernel"], 32 + 48),
        (fresh["patches"]["kernel"], 16 + 32),
    ):
        limit = np.sqrt(6 / fans)
        assert 0.9 * limit < np.abs(kernel).max() <= limit
    assert np.std(fresh["label"]["embedding"]) == pytest.approx(0.02, rel=0.3)
    assert np.std(fresh["time"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.1)


def test_the_time_and_the_class_matter(trained):
    usual = apply(trained)
    assert usual.shape == (2, 12, 12, 2)
    assert usual.dtype == jnp.float32
    for other in (apply(trained, time=TIME + 1), apply(trained, label=LABEL[::-1]), apply(trained, image=image(1))):
        assert (np.abs(other - usual).max(axis=(1, 2, 3)) > 1e-3).all()


def test_unrolled_rematerialised_and_half_precision_agree(trained):
    usual = apply(trained)
    for options in ({"unroll": 3}, {"remat": "full"}):
        np.testing.assert_allclose(apply(trained, MODEL.clone(**options)), usual, atol=1e-5)
    half = apply(trained, MODEL.clone(dtype="bfloat16"))
    assert half.dtype == jnp.float32
    assert np.abs(half - usual).max() < 0.05 * np.abs(usual).max()


def test_fixed_variance_has_no_more_outputs_than_channels():
    model = MODEL.clone(learned_variance=False)
    shape = jax.eval_shape(model.init_with_output, jax.random.key(0), image(), TIME, LABEL)[0]
    assert shape.shape == (2, 12, 12, 1)


def test_dropout_acts_where_a_key_is_given(trained):
    model = MODEL.clone(dropout=0.5)
    np.testing.assert_allclose(apply(trained, model), apply(trained), rtol=1e-6)
    assert np.abs(apply(trained, model, rngs={"dropout": jax.random.key(0)}) - apply(trained)).max() > 1e-3


def test_adaptive_norm_is_its_formula():
    rng = np.random.default_rng(0)
    x, shift, scale = rng.normal(3, 2, (2, 5, 8)), rng.normal(size=(2, 8)), rng.normal(size=(2, 8))
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    wanted = normal * (1 + scale[:, None]) + shift[:, None]
    found = normalize(*(jnp.asarray(a, jnp.float32) for a in (x, shift, scale)), 0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_waves_of_the_time():
    waves = np.asarray(time_waves(np.array([0.0, 250.0], np.float32)))
    np.testing.assert_array_equal(waves[0], [1.0] * 128 + [0.0] * 128)
    frequencies = np.geomspace(1, 1e-4, 128)
    np.testing.assert_allclose(waves[1], [*np.cos(250 * frequencies), *np.sin(250 * frequencies)], atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 16, 16, 1), (1, 12, 8, 1), (1, 12, 12, 3)])
def test_images_of_another_shape(shape):
    with pytest.raises(UserError, match="it is for images of 12 x 12 x 1; the data's are "):
        MODEL.init(jax.random.key(0), image(shape=shape), TIME[:1], LABEL[:1])
