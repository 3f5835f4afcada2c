"""Vision transformers: patches, positions, pooling, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import vit

ENCODER = vit.Encoder(image_size=12, patch_size=4, num_channels=2, hidden_size=16, num_layers=2, num_heads=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 12, 12, 2)).astype(np.float32)


def encoder(**fields):
    return dataclasses.replace(ENCODER, **{"intermediate_size": 24, "initializer_range": 0.3} | fields)


def run(model, images=IMAGES, **options):
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    return params, model.apply({"params": params}, images, **options)


def test_join_undoes_cut():
    images = RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
    squares = vit.cut(images, 4)
    assert squares.shape == (2, 6, 48)
    np.testing.assert_array_equal(squares[1, 4], images[1, 4:8, 4:8].ravel())
    np.testing.assert_array_equal(vit.join(squares, (8, 12), 4), images)


def test_patches_are_a_convolution_without_overlap():
    patches = vit.Patches(4, 5, kernel_init=jax.nn.initializers.normal(1.0))
    params = jax.jit(patches.init)(jax.random.key(0), IMAGES)["params"]
    params = {**params, "bias": jnp.arange(5.0)}
    expected = jax.lax.conv_general_dilated(
        IMAGES, params["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = patches.apply({"params": params}, IMAGES)
    np.testing.assert_allclose(found, expected.reshape(3, 9, 5) + np.arange(5), atol=1e-5)


def test_sinusoids_are_products_of_a_place_and_its_frequency():
    table = vit.sinusoids_2d(3, 5, 8).reshape(3, 5, 8)
    for row, column, frequency in [(0, 0, 0), (2, 3, 1), (1, 4, 0)]:
        omega = 10000.0 ** (-frequency / 2)
        found = table[row, column, frequency::2]
        expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_resampling_keeps_what_is_constant_and_halves_planes():
    row, column = np.mgrid[:8, :8]
    table = jnp.asarray(np.stack([2.0 * row - column, np.ones_like(row)], axis=-1).reshape(64, 2), jnp.float32)
    assert vit.resample(table, (8, 8), (8, 8)) is table
    found = np.asarray(vit.resample(table, (8, 8), (4, 4)).reshape(4, 4, 2))
    middle = 2 * np.arange(4) + 0.5  # half-way between two places, where cubic convolution is exact
    np.testing.assert_allclose(found[1:3, 1:3, 0], (2 * middle[:, None] - middle[None])[1:3, 1:3], atol=1e-5)
    np.testing.assert_allclose(vit.resample(table, (8, 8), (5, 19))[:, 1], 1, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_an_encoder_takes_images_of_other_sizes(positions):
    model = encoder(positions=positions)
    params, _ = run(model)
    assert ("position" in params) == (positions == "learned")
    images = RNG.normal(size=(2, 8, 20, 2)).astype(np.float32)
    assert model.apply({"params": params}, images).shape == (2, 1 + 10, 16)
    prefix, patches = model.apply({"params": params}, IMAGES, method="embed")
    assert (prefix.shape, patches.shape) == ((3, 1, 16), (3, 9, 16))


def test_pooling():
    params, both = run(vit.ImageClassifier(encoder(), 5, "token_and_mean"))
    hidden = encoder().apply({"params": params["encoder"]}, IMAGES)
    token, mean = hidden[:, 0], hidden[:, 1:].mean(axis=1)
    head = params["head_output"]
    np.testing.assert_allclose(both, np.concatenate([token, mean], axis=1) @ head["kernel"] + head["bias"], atol=1e-5)
    for pooling, pooled, rows in (("token", token, slice(16)), ("mean", mean, slice(16, None))):
        own = {**params, "head_output": {**head, "kernel": head["kernel"][rows]}}
        logits = vit.ImageClassifier(encoder(), 5, pooling).apply({"params": own}, IMAGES)
        np.testing.assert_allclose(logits, pooled @ head["kernel"][rows] + head["bias"], atol=1e-5)


def test_two_heads_and_their_mean():
    model = vit.DistilledClassifier(encoder(prefix_tokens=2), 5)
    params, logits = run(model)
    label, teacher = model.apply({"params": params}, IMAGES, method="heads")
    np.testing.assert_allclose(logits, (label + teacher) / 2, atol=1e-6)
    assert np.abs(label - teacher).max() > 1e-3
    hidden = model.encoder.apply({"params": params["encoder"]}, IMAGES)
    head = params["head_distillation"]
    np.testing.assert_allclose(teacher, hidden[:, 1] @ head["kernel"] + head["bias"], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (encoder(positions="lerned"), "positions: unknown 'lerned'; did you mean 'learned'"),
        (encoder(positions="sinusoidal", hidden_size=18), "hidden_size 18 must be a multiple of 4"),
        (encoder(patch_size=5), "images of 12 x 12 pixels cannot be cut into patches of 5"),
        (encoder(num_channels=3), "images of 2 channels; config.task.model's num_channels is 3"),
        (vit.ImageClassifier(encoder(), 2, "tokn"), "pooling: unknown 'tokn'; did you mean 'token'"),
        (vit.ImageClassifier(encoder(prefix_tokens=0), 2), "pooling: 'token' needs an encoder with prefix_tokens"),
        (vit.DistilledClassifier(encoder(), 2), "are 2 prefix_tokens, not 1"),
    ],
)
def test_what_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def test_the_layout_of_the_scan_changes_nothing():
    params, scanned = run(encoder(layer_scale=0.1))
    for fields in ({"unroll": 2}, {"remat": "full"}):
        other = encoder(layer_scale=0.1, **fields).apply({"params": params}, IMAGES)
        np.testing.assert_allclose(other, scanned, atol=1e-5)
