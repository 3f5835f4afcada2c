"""Masked reconstruction: what its loss counts, what it hides, and that it learns."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import evaluate, train
from research.configuration import overrides
from research.data.shapes import shapes
from research.errors import UserError
from research.experiment import Experiment
from research.metrics import merge
from research.models import vit
from research.models.mae import MaskedAutoencoder
from research.tasks.reconstruction import Reconstruction

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "mae_fashion_mnist.py"
ENCODER = vit.Encoder(
    image_size=12,
    patch_size=4,
    num_channels=2,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=32,
    positions="sinusoidal",
    initializer_range=0.2,
)
MODEL = MaskedAutoencoder(ENCODER, 16, 1, 2, 32)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(1.0, 2.0, (5, 12, 12, 2)).astype(np.float32)
NOISE = RNG.random((5, 9)).astype(np.float32)


class Given(nn.Module):
    """A model whose predictions are its parameters; it hides the two patches of the greatest noise in each image."""

    normalize_targets: bool = True
    encoder: vit.Encoder = dataclasses.field(default_factory=lambda: ENCODER)

    @nn.compact
    def __call__(self, image, noise):
        predictions = self.param("predictions", nn.initializers.zeros, (len(IMAGES), 9, 32))
        return predictions, noise >= jnp.sort(noise, axis=1)[:, -2:-1]


def batch(images=IMAGES, mask=None, **features):
    mask = np.ones(len(images), np.float32) if mask is None else np.asarray(mask, np.float32)
    return {"image": jnp.asarray(images), "mask": jnp.asarray(mask), **features}


def spec(images=IMAGES):
    return {"image": jax.ShapeDtypeStruct(images.shape, images.dtype)}


def start(task):
    return jax.jit(lambda: task.init(jax.random.key(0), spec()))()


def by_hand(normalize, predictions, masked, counted):
    """Returns the mean over all hidden patches of the images that count, one by one."""
    errors = []
    for i in np.flatnonzero(counted):
        for patch in np.flatnonzero(masked[i]):
            row, column = divmod(patch, 3)
            pixels = IMAGES[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].astype(np.float64)
            if normalize:
                pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            errors.append(np.square(predictions[i, patch] - pixels.reshape(-1)).mean())
    return np.mean(errors)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_error_over_hidden_patches_of_real_images(normalize):
    task, counted = Reconstruction(Given(normalize)), [1, 0, 1, 1, 1]
    predictions = RNG.normal(size=(5, 9, 32)).astype(np.float32)
    masked = np.asarray(task.predict({"predictions": predictions}, batch(), jax.random.key(0))["masked"])
    found = task.metrics({"predictions": predictions}, batch(mask=counted))["loss"]
    assert found.count == 2 * 4
    np.testing.assert_allclose(found.compute(), by_hand(normalize, predictions, masked, counted), rtol=1e-5)
    elsewhere = np.where(masked[..., None], predictions, 1e3).astype(np.float32)
    assert task.metrics({"predictions": elsewhere}, batch(mask=counted))["loss"].total == found.total
    broken = IMAGES.copy()
    broken[1] = np.nan
    assert task.metrics({"predictions": predictions}, batch(broken, mask=counted))["loss"].total == found.total


@pytest.mark.parametrize("normalize", [True, False])
def test_right_predictions_paint_the_image_itself(normalize):
    task = Reconstruction(Given(normalize))
    squares = np.asarray(vit.cut(jnp.asarray(IMAGES), 4))
    mean, deviation = squares.mean(-1, keepdims=True), np.sqrt(squares.var(-1, ddof=1, keepdims=True) + 1e-6)
    right = (squares - mean) / deviation if normalize else squares
    found = task.predict({"predictions": right}, batch(), jax.random.key(0))
    np.testing.assert_allclose(found["reconstruction"], IMAGES, atol=1e-5)
    np.testing.assert_allclose(found["loss"], 0, atol=1e-9)
    wrong = task.predict({"predictions": right + 1}, batch(), jax.random.key(0))
    differ = np.abs(vit.cut(wrong["reconstruction"] - IMAGES, 4)).min(axis=-1) > 1e-3
    np.testing.assert_array_equal(differ, found["masked"])
    np.testing.assert_allclose(wrong["loss"], 1, rtol=1e-4)


def test_prediction_hides_what_the_noise_or_the_key_says():
    task = Reconstruction(MODEL)
    params = start(task)
    predict = jax.jit(task.predict)
    given = predict(params, batch(noise=NOISE), jax.random.key(0))
    for row, masked in zip(NOISE, given["masked"]):
        assert sorted(np.flatnonzero(~masked)) == sorted(np.argsort(row)[:2])
    first, again, other = (predict(params, batch(), jax.random.key(i)) for i in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["masked"] != other["masked"]).any()
    assert len({tuple(row) for row in first["masked"].tolist()}) > 1
    assert (first["masked"].sum(axis=1) == 7).all()
    one = jax.tree.map(lambda x: np.asarray(x[0]), first)
    described = json.loads(json.dumps(task.describe(one)))
    assert described == {"loss": float(one["loss"]), "masked": np.flatnonzero(one["masked"]).tolist()}


def test_evaluation_does_not_depend_on_the_batches():
    task = Reconstruction(MODEL)
    params = start(task)
    metrics = jax.jit(task.metrics)
    whole = metrics(params, batch())["loss"]
    turned = metrics(params, batch(IMAGES[::-1]))["loss"]
    alone = merge([metrics(params, batch(IMAGES[i : i + 1])) for i in range(5)])["loss"]
    for other in (turned, alone):
        np.testing.assert_allclose(other.total, whole.total, rtol=1e-5)
        assert other.count == whole.count


def test_training_hides_other_patches_at_every_step():
    task, seen = Reconstruction(MODEL), []

    class Spy(MaskedAutoencoder):
        def __call__(self, image, noise):
            jax.debug.callback(lambda noise: seen.append(np.asarray(noise)), noise)
            return super().__call__(image, noise)

    spy = Reconstruction(Spy(ENCODER, 16, 1, 2, 32))
    params = start(task)
    losses = [float(spy.loss(params, batch(), jax.random.key(i))[0].compute()) for i in (0, 0, 1)]
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], seen[1])
    assert (seen[0] != seen[2]).all()
    assert len(np.unique(seen[0])) == 5 * 9
    assert losses[0] == losses[1] != losses[2]


def test_training_drops_and_evaluation_does_not():
    task = Reconstruction(MODEL.clone(encoder=ENCODER.clone(dropout=0.5)))
    params = start(task)
    plain = Reconstruction(MODEL)
    key = jax.random.key(0)
    assert task.loss(params, batch(), key)[0].total != plain.loss(params, batch(), key)[0].total
    assert task.metrics(params, batch())["loss"].total == plain.metrics(params, batch())["loss"].total


def test_the_loss_falls_on_drawn_shapes():
    source = shapes(48, size=12, channels=2)
    images = np.stack([source[i]["image"] for i in range(48)]).astype(np.float32) / 128 - 1
    task, adam = Reconstruction(MODEL), optax.adam(1e-2)
    params = start(task)
    state = adam.init(params)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            return task.loss(params, batch(images), key)[0].compute()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = adam.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    before = task.metrics(params, batch(images))["loss"].compute()
    for i in range(60):
        params, state, _ = step(params, state, jax.random.key(i))
    after = task.metrics(params, batch(images))["loss"].compute()
    assert after < 0.75 * before


def test_what_cannot_be_masked_is_refused():
    task = Reconstruction(MODEL)
    with pytest.raises(UserError, match="'image' is missing; did you mean 'images'"):
        task.init(jax.random.key(0), {"images": spec()["image"]})
    with pytest.raises(UserError, match="images of 10 x 10 pixels cannot be cut into patches of 4"):
        task.init(jax.random.key(0), spec(np.zeros((1, 10, 10, 2), np.float32)))
    with pytest.raises(UserError, match=r"mask_ratio: 0\.95 keeps 0 of 9"):
        Reconstruction(MODEL.clone(mask_ratio=0.95)).init(jax.random.key(0), spec())


def test_a_pretrained_encoder_is_what_a_classifier_begins_with(tmp_path):
    pretraining = overrides.load(f"{CONFIG}:tiny")
    pretraining.num_steps, pretraining.evals = 1, {}
    train.run(pretraining, tmp_path)
    _, params = evaluate.restore_params(Experiment(pretraining, workdir=tmp_path), tmp_path, "")
    trained = flax.traverse_util.flatten_dict({"encoder": params["encoder"]}, sep="/")
    for variant in ("finetune-tiny", "probe-tiny"):
        config = overrides.load(f"{CONFIG}:{variant}")
        config.init = {"call": "research.configuration.transfer.load_params", "path": str(tmp_path)}
        loaded = flax.traverse_util.flatten_dict(Experiment(config).pretrained(), sep="/")
        assert {name for name, leaf in loaded.items() if leaf is None} == {"head_output/kernel", "head_output/bias"}
        assert len(trained) == len(loaded) - 2
        for name, leaf in trained.items():
            np.testing.assert_array_equal(loaded[name], leaf)
    config.init.path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.init.path: there is no run in '.*nowhere'; train it first"):
        Experiment(config).pretrained()
