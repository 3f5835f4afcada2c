"""DETR against formulas written out in numpy, and what must and what must not change its result."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models.detr import Detr, sinusoids
from research.models.resnet import ResNet

BACKBONE = ResNet((1,), (8,), "basic", stem_width=8, stem_kernel=3, stem_stride=4, stem_pool=False, norm="group")
FIELDS = {
    "num_outputs": 3,
    "num_queries": 6,
    "hidden_size": 12,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "num_decoder_heads": 2,
    "intermediate_size": 16,
    "decoder_intermediate_size": 20,
    "dropout": 0.0,
}
MODEL = Detr(BACKBONE, **FIELDS)


def images(height=16, width=20):
    return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


@functools.cache
def params(model=MODEL):
    shapes = jax.eval_shape(lambda key: model.init(key, images())["params"], jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def outputs(model, params, *inputs):
    found = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))(params, *inputs)
    return [np.asarray(array) for array in found]


def assert_same(found, expected, tolerance=2e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def test_sinusoids_are_the_formula():
    mask = np.zeros((2, 4, 5), np.float32)
    mask[0, :3, :4], mask[1] = 1, 1
    found = np.asarray(sinusoids(mask, 8))
    for b, (rows, columns) in enumerate([(3, 4), (4, 5)]):
        for row in range(rows):
            for column in range(columns):
                expected = []
                for share in ((row + 1) / (rows + 1e-6), (column + 1) / (columns + 1e-6)):
                    for pair in range(2):
                        angle = 2 * math.pi * share / 10000 ** (2 * pair / 4)
                        expected += [math.sin(angle), math.cos(angle)]
                np.testing.assert_allclose(found[b, row, column], expected, atol=1e-5)
    with pytest.raises(UserError, match="hidden_size 10 must be a multiple of 4"):
        sinusoids(mask, 10)


def test_shapes_and_ranges():
    logits, boxes = outputs(MODEL, params(), images())
    assert logits.shape == (3, 2, 6, 4)
    assert boxes.shape == (3, 2, 6, 4)
    assert boxes.min() > 0
    assert boxes.max() < 1
    assert np.abs(logits[:, 0] - logits[:, 1]).max() > 0.01  # images differ, and their objects do


def test_a_larger_canvas_changes_nothing():
    image, mask = images(), np.ones((2, 16, 20), np.float32)
    padded, padded_mask = np.pad(image, ((0, 0), (0, 16), (0, 4), (0, 0))), np.pad(mask, ((0, 0), (0, 16), (0, 4)))
    expected = outputs(MODEL, params(), image, None)
    assert_same(outputs(MODEL, params(), image, mask), expected)
    assert_same(outputs(MODEL, params(), padded, padded_mask), expected)
    unmasked = outputs(MODEL, params(), padded, np.ones_like(padded_mask))
    assert np.abs(unmasked[1] - expected[1]).max() > 0.001


def test_queries_are_a_set():
    order = np.array([3, 1, 5, 0, 2, 4])
    logits, boxes = outputs(MODEL, params(), images())
    turned = dict(params()) | {"queries": params()["queries"][order]}
    assert_same(outputs(MODEL, turned, images()), [logits[:, :, order], boxes[:, :, order]])


def test_every_layer_gives_what_a_decoder_that_ends_there_would():
    whole = outputs(MODEL, params(), images())
    for layers in (1, 2):
        first = jax.tree.map(lambda leaf, layers=layers: leaf[:layers], params()["decoder"]["layers"])
        less = dict(params()) | {"decoder": params()["decoder"] | {"layers": first}}
        shorter = Detr(BACKBONE, **FIELDS | {"num_decoder_layers": layers})
        assert_same(outputs(shorter, less, images()), [array[:layers] for array in whole])


def test_unrolling_and_recomputing_change_nothing():
    def gradients(model):
        def loss(params):
            logits, boxes = model.apply({"params": params}, images())
            return (jnp.sin(logits) * boxes).sum()

        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params()))])

    other = Detr(BACKBONE, **FIELDS, unroll=2, remat="full")
    assert_same([gradients(other)], [gradients(MODEL)])


def test_in_bfloat16_the_results_are_float32_and_near():
    coarse = outputs(Detr(BACKBONE, **FIELDS, dtype="bfloat16"), params(), images())
    assert all(array.dtype == np.float32 for array in coarse)
    assert_same(coarse, outputs(MODEL, params(), images()), 0.1)


def test_only_input_positions_tell_where_a_featureless_place_is():
    """Attention to features that are the same everywhere gives the same, wherever a query looks."""
    featureless = {**params(), "projection": jax.tree.map(np.zeros_like, params()["projection"])}
    logits, boxes = outputs(MODEL, featureless, images())
    assert_same([logits, boxes], [np.broadcast_to(x[:, :, :1], x.shape) for x in (logits, boxes)])
    _, boxes = outputs(MODEL.copy(input_positions=True), featureless, images())
    assert np.ptp(boxes[-1], axis=1).max() > 1e-4  # 20 times what rounding might do
