import flax.traverse_util
import jax
import numpy as np
import pytest

from research.errors import UserError
from research.models import gpt
from research.pretrained import huggingface, rounded

# Dettmers 2023, appendix E, to four digits.
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0910, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def kernel(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_the_levels_of_nf4_are_those_of_the_paper():
    levels = np.unique(rounded.FORMATS["nf4"](np.linspace(-1, 1, 4001)[:, None], 4001))
    np.testing.assert_allclose(levels, NF4, atol=6e-5)


@pytest.mark.parametrize("name", rounded.FORMATS)
def test_rounding_twice_is_rounding_once_and_no_value_moves_by_more_than_half_a_step(name):
    exact = kernel(2, 130, 5)  # the last block is a short one
    once = rounded.FORMATS[name](exact, 64)
    np.testing.assert_allclose(rounded.FORMATS[name](once, 64), once, rtol=1e-6)
    blocks = [exact[:, i : i + 64] for i in (0, 64, 128)] if name != "int8" else [exact]
    ends = [np.abs(block).max(axis=1, keepdims=True) for block in blocks]
    widest = {"int8": 1 / 127, "nf4": 1 - 0.6962, "fp4": 1 / 3, "int4": 1 / 7}[name]
    bound = np.concatenate([np.broadcast_to(end, block.shape) for end, block in zip(ends, blocks)], axis=1)
    assert (np.abs(once - exact) <= 0.5001 * widest * bound).all()


def test_normal_weights_lose_least_in_nf4_and_a_block_is_its_own():
    exact = kernel(256, 64)
    error = {name: np.square(function(exact, 64) - exact).mean() for name, function in rounded.FORMATS.items()}
    assert error["int8"] < error["nf4"] < error["fp4"] < error["int4"]
    other = exact.copy()
    other[64:] *= 100
    np.testing.assert_array_equal(rounded.FORMATS["nf4"](other, 64)[:64], rounded.FORMATS["nf4"](exact, 64)[:64])


def test_only_the_named_kernels_of_published_weights_are_rounded(tmp_path):
    model = gpt.Decoder(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    huggingface.save(tmp_path / "model", model, params)
    shapes = jax.eval_shape(lambda: params)
    load = rounded.load_params
    loaded, _ = load(str(tmp_path / "model"), model, shapes, "int4", (r"layers/1/mlp/.*kernel$",), block_size=8)
    before, after = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (params, loaded))
    for name, value in before.items():
        first, second = (np.asarray(value)[i] == after[name][i] for i in (0, 1)) if "layers" in name else (True, True)
        assert np.all(first)
        assert np.all(value == after[name]) or (name.startswith("layers/mlp") and name.endswith("kernel"))
        if name == "layers/mlp/in/kernel":
            assert not np.all(second)
    for arguments, message in (
        ({"format": "nf5"}, "there is no 'nf5'"),
        ({"targets": ("kernal$",)}, "'kernal.' finds no kernel"),
        ({"targets": ("embedding$", "norm.*scale$")}, "no kernels"),
        ({"block_size": 0}, "block_size: 0"),
    ):
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / "model"), model, shapes, **arguments)
