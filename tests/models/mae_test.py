"""Masked autoencoders: what is hidden, that it is not seen, and that all comes back to its place."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import vit
from research.models.mae import MaskedAutoencoder

SIZES = {
    "image_size": 20,
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 20,
    "positions": "sinusoidal",
}
DECODER = {
    "decoder_hidden_size": 8,
    "decoder_num_layers": 2,
    "decoder_num_heads": 2,
    "decoder_intermediate_size": 16,
}
PATCHES = 25


def autoencoder(mask_ratio=0.75, **options):
    return MaskedAutoencoder(vit.Encoder(**SIZES | options), **DECODER, mask_ratio=mask_ratio)


def shapes(model, size=20):
    rows = size // 4
    inputs = np.zeros((1, size, size, 2), np.float32), np.zeros((1, rows * rows), np.float32)
    return jax.eval_shape(lambda key: model.init(key, *inputs)["params"], jax.random.key(0))


def random_params(model):
    """Returns parameters that are all far from zero, so that everything counts."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.4, size=leaf.shape).astype(np.float32), shapes(model))


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, params, *arguments, method="__call__"):
    return model.apply({"params": params}, *arguments, method=method)


def inputs(size=3, side=20):
    rng = np.random.default_rng(1)
    images = rng.normal(size=(size, side, side, 2)).astype(np.float32)
    return images, rng.random((size, (side // 4) ** 2)).astype(np.float32)


def changed(images, where):
    """Returns images with other pixels in the patches `where`, bool [B, N]."""
    squares = np.asarray(vit.cut(jnp.asarray(images), 4))
    squares = np.where(where[..., None], 10 * np.sin(squares) - 3, squares)
    return np.asarray(vit.join(jnp.asarray(squares), images.shape[1:3], 4))


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
def test_hidden_pixels_change_nothing_and_seen_ones_all(prefix_tokens):
    model = autoencoder(prefix_tokens=prefix_tokens)
    params, (images, noise) = random_params(model), inputs()
    predictions, masked = apply(model, params, images, noise)
    assert predictions.shape == (3, PATCHES, 4 * 4 * 2)
    other = apply(model, params, changed(images, masked), noise)[0]
    np.testing.assert_array_equal(other, predictions)
    seen = np.zeros_like(masked)
    seen[:, np.argmin(noise, axis=1)[0]] = ~np.asarray(masked)[:, np.argmin(noise, axis=1)[0]]
    other = apply(model, params, changed(images, seen), noise)[0]
    assert (np.abs(other - predictions)[0].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.75, 6), (0.5, 12), (0.9, 2), (0.04, 24), (0.96, 1)])
def test_exactly_the_ratio_is_hidden(mask_ratio, kept):
    model = autoencoder(mask_ratio)
    images, noise = inputs(size=7)
    _, masked = apply(model, random_params(model), images, noise)
    assert (masked.sum(axis=1) == PATCHES - kept).all()
    for row, hidden in zip(noise, masked):
        assert row[~hidden].max() < row[hidden].min()


@pytest.mark.parametrize("mask_ratio", [0.0, 0.97, 1.0])
def test_something_must_be_kept_and_something_hidden(mask_ratio):
    with pytest.raises(UserError, match=rf"mask_ratio: {mask_ratio} keeps (0|25) of 25 patches; 0.75 is usual"):
        shapes(autoencoder(mask_ratio))


def test_the_encoder_sees_what_is_kept_at_its_place():
    model = autoencoder()
    params, (images, noise) = random_params(model), inputs()
    tokens, rank = apply(model, params, images, noise, method="encode")
    encoder = vit.Encoder(**SIZES)
    prefix, patches = apply(encoder, params["encoder"], images, method="embed")
    for i in range(3):
        kept = np.argsort(noise[i])[:6]
        np.testing.assert_array_equal(rank[i][kept], np.arange(6))
        alone = np.concatenate([prefix[i], patches[i][kept]])[None]
        np.testing.assert_allclose(tokens[i], apply(encoder, params["encoder"], alone, method="encode")[0], atol=1e-5)


def test_without_attention_every_patch_comes_back_to_its_own_place():
    model = autoencoder()
    flat = flax.traverse_util.flatten_dict(random_params(model), sep="/")
    still = {name: 0 * leaf if "/out/" in name or "/down/" in name else leaf for name, leaf in flat.items()}
    params, (images, noise) = flax.traverse_util.unflatten_dict(still, sep="/"), inputs()
    predictions, masked = apply(model, params, images, noise)
    for patch in range(PATCHES):
        where = np.zeros((3, PATCHES), bool)
        where[:, patch] = True
        moved = np.abs(apply(model, params, changed(images, where), noise)[0] - predictions).max(axis=-1)
        np.testing.assert_array_equal(moved > 1e-4, where & ~masked)


def test_hidden_patches_are_told_apart_by_their_positions():
    model = autoencoder()
    predictions, masked = apply(model, random_params(model), *inputs())
    hidden = predictions[0][masked[0]]
    distances = np.abs(hidden[:, None] - hidden[None]).max(axis=-1) + np.eye(len(hidden))
    assert distances.min() > 1e-4


def test_the_encoder_is_that_of_a_classifier():
    options = {"prefix_tokens": 1, "drop_path": 0.1}
    classifier = vit.ImageClassifier(vit.Encoder(**SIZES | options), num_outputs=3, pooling="mean")
    image = np.zeros((1, 20, 20, 2), np.float32)
    own = jax.eval_shape(lambda key: classifier.init(key, image)["params"], jax.random.key(0))
    assert shapes(autoencoder())["encoder"] == own["encoder"]


def test_images_of_another_size_have_the_same_parameters():
    model = autoencoder()
    assert shapes(model, size=28) == shapes(model)
    predictions, masked = apply(model, random_params(model), *inputs(side=28))
    assert (predictions.shape, masked.sum(axis=1).tolist()) == ((3, 49, 32), [37] * 3)


def test_precision_and_recomputation():
    images, noise = inputs()
    params = random_params(autoencoder())
    plain, masked = apply(autoencoder(), params, images, noise)
    for options, tolerance in (({"remat": "full"}, 1e-5), ({"unroll": 2}, 1e-5), ({"dtype": "bfloat16"}, 0.3)):
        other, same = apply(autoencoder(**options), params, images, noise)
        assert other.dtype == jnp.float32
        np.testing.assert_array_equal(same, masked)
        np.testing.assert_allclose(other, plain, atol=tolerance)
