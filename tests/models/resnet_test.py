"""Residual networks against what is known of the published ones, and what padding must not change."""

import functools
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import resnet

SMALL = {"depths": (1, 2), "widths": (8, 12), "block": "basic", "stem_width": 4}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(module, *inputs):
    """Returns parameters away from their initial values; variances are positive."""
    shapes = jax.eval_shape(lambda key: module.init(key, *inputs)["params"], jax.random.key(0))
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    params = {name: 0.3 * normal(i, *leaf.shape) for i, (name, leaf) in enumerate(flat.items())}
    params = {name: np.abs(x) + 0.5 if re.search("variance|scale", name) else x for name, x in params.items()}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def apply(module, params, *inputs):
    return np.asarray(jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))(params, *inputs))


@pytest.mark.parametrize(
    ("block", "depths", "count"),
    # as published, without the classifiers of 1,000 outputs
    [
        ("basic", (2, 2, 2, 2), 11_689_512 - 513_000),
        ("basic", (3, 4, 6, 3), 21_797_672 - 513_000),
        ("bottleneck", (3, 4, 6, 3), 25_557_032 - 2_049_000),
        ("bottleneck", (3, 4, 23, 3), 44_549_160 - 2_049_000),
    ],
)
def test_sizes_of_the_published_networks(block, depths, count):
    widths = tuple(64 * 2**i * (4 if block == "bottleneck" else 1) for i in range(4))
    model, image = resnet.ResNet(depths, widths, block), jax.ShapeDtypeStruct((2, 224, 161, 3), jnp.float32)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert out.shape == (2, 7, 6, widths[-1])
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    learned = {name: leaf for name, leaf in flat.items() if not name.endswith(("mean", "variance"))}
    assert sum(leaf.size for leaf in learned.values()) == count


def test_frozen_batch_norm_is_its_formula_and_takes_no_gradient():
    x, model = normal(0, 2, 3, 4, 5), resnet.FrozenBatchNorm(1e-2)
    params = random_params(model, x)
    expected = (x - params["mean"]) / np.sqrt(params["variance"] + 1e-2) * params["scale"] + params["bias"]
    np.testing.assert_allclose(apply(model, params, x), expected, rtol=1e-5, atol=1e-6)
    gradients, on_input = jax.grad(lambda p, x: jnp.square(model.apply({"params": p}, x)).sum(), (0, 1))(params, x)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))
    assert on_input.any()


@pytest.mark.parametrize(("num_groups", "taken"), [(3, 3), (32, 2), (6, 6)])
def test_group_norm_is_that_of_the_library(num_groups, taken):
    x, model = 3 + normal(0, 2, 3, 4, 6), resnet.GroupNorm(num_groups)
    params = random_params(model, x)
    np.testing.assert_allclose(apply(model, params, x), apply(nn.GroupNorm(taken, epsilon=1e-5), params, x), atol=1e-5)


def test_group_norm_does_not_look_at_padding():
    x, mask = normal(0, 2, 5, 4, 6), np.zeros((2, 5, 4), np.float32)
    mask[:, :3, :2] = 1
    model = resnet.GroupNorm(2)
    params = random_params(model, x)
    found = apply(model, params, np.where(mask[..., None] == 0, 100, x), mask)
    np.testing.assert_allclose(found[:, :3, :2], apply(model, params, x[:, :3, :2]), atol=1e-4)
    assert not found[mask == 0].any()


STEMS = {
    "seven, pooled": {},
    "three": {"stem_kernel": 3, "stem_stride": 1, "stem_pool": False},
    "patches": {"stem_kernel": 4, "stem_stride": 4, "stem_pool": False},
}


@pytest.mark.parametrize("block", resnet.BLOCKS)
@pytest.mark.parametrize("stem", STEMS)
def test_padding_changes_nothing_under_group_norm(stem, block):
    model = resnet.ResNet(**SMALL | STEMS[stem] | {"block": block}, norm="group", norm_groups=2)
    image = normal(0, 2, 24, 20, 3)
    wide = np.pad(image, ((0, 0), (0, 8), (0, 20), (0, 0)))
    mask = np.pad(np.ones((2, 24, 20), np.float32), ((0, 0), (0, 8), (0, 20)))
    params = random_params(model, image)
    expected = apply(model, params, image, np.ones((2, 24, 20), np.float32))
    found = apply(model, params, wide, mask)
    height, width = expected.shape[1:3]
    assert found.shape[1] > height
    assert found.shape[2] > width
    np.testing.assert_allclose(found[:, :height, :width], expected, atol=1e-4 * np.abs(expected).max())
    assert not found[:, height:].any()
    assert not found[:, :, width:].any()


@pytest.mark.parametrize("block", resnet.BLOCKS)
def test_a_dilated_stage_computes_the_strided_one_and_what_lies_between(block):
    fields = SMALL | {"depths": (1, 3), "block": block}
    image = normal(0, 2, 40, 36, 3)
    strided, dilated = (resnet.ResNet(**fields, dilation=dilation) for dilation in (False, True))
    params = random_params(strided, image)
    few, many = apply(strided, params, image), apply(dilated, params, image)
    assert many.shape[1:3] == (10, 9)
    np.testing.assert_allclose(many[:, ::2, ::2], few, atol=1e-5 * np.abs(few).max())


def test_a_bottleneck_strides_in_its_second_convolution():
    block = resnet.Residual(8, True, 2, (1, 1), functools.partial(resnet.FrozenBatchNorm))
    x = normal(0, 1, 6, 6, 4)
    params = random_params(block, x, None)
    moved = x + np.where(np.indices(x.shape)[1] == 1, 1.0, 0.0).astype(np.float32)  # a row that the shortcut skips
    assert np.abs(apply(block, params, x, None) - apply(block, params, moved, None)).max() > 0.01


def test_masks_are_shrunk_to_the_nearest_pixel():
    mask = np.arange(35).reshape(1, 5, 7)
    np.testing.assert_array_equal(resnet.shrink(mask, (3, 2)), mask[:, [0, 1, 3]][:, :, [0, 3]])
    assert resnet.shrink(None, (3, 2)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "grup"}, "norm: unknown 'grup'; did you mean 'group'"),
        ({"block": "botleneck"}, "block: unknown 'botleneck'; did you mean 'bottleneck'"),
        ({"depths": (1, 2, 3)}, "depths: 3 stages, but 2 widths"),
        ({"num_channels": 1}, "images of 3 channels; the backbone's num_channels is 1"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    model = resnet.ResNet(**SMALL | fields)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
