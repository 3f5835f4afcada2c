"""The transformer core against formulas written out in numpy, and what must not change its result."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import layers
from research.models.attention import Attention, xla
from research.models.blocks import Block, stack
from research.models.structure import Structure


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("mutable", "capture_intermediates"))
def apply(module, params, *arguments, **options):
    """Applies a module compiled, as a scan that is not would be compiled again in every call."""
    return module.apply({"params": params}, *arguments, **options)


def random_params(module, *arguments):
    shapes = jax.eval_shape(lambda key: module.init(key, *arguments)["params"], jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.3 * normal(leaf.size, *leaf.shape), shapes)


def block(dropout=0.0, name=None, drop_path=0.0, **shared):
    return Block(
        attention=functools.partial(Attention, 3, dropout=dropout, **shared),
        mlp=functools.partial(layers.MLP, 20, **shared),
        norm=functools.partial(layers.LayerNorm, 1e-3, dtype=shared.get("dtype", jnp.float32)),
        norms="sum",
        dropout=dropout,
        drop_path=drop_path,
        name=name,
    )


class Stack(nn.Module):
    """A stack by itself."""

    num_layers: int = 4
    unroll: int | None = None
    remat: str = "none"
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, **context):
        options = {"kernel_init": nn.initializers.normal(0.3), "dtype": jnp.dtype(self.dtype)}
        inner = block(self.dropout, "layers", self.drop_path, **options)
        return stack(inner, self.num_layers, x, unroll=self.unroll, remat=self.remat, **context)


FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_fast": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "linear": lambda x: x,
}


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_follow_their_formulas(name):
    x = np.linspace(-6, 6, 97)
    ours = layers.activation(name)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, [FORMULAS[name](value) for value in x], rtol=1e-5, atol=2e-6)


def test_an_unknown_activation_is_named_with_the_nearest():
    with pytest.raises(UserError, match="unknown activation 'gelo'; did you mean 'gelu'"):
        layers.activation("gelo")


def test_attention_follows_its_formula():
    query, key, value = normal(0, 2, 5, 3, 4), normal(1, 2, 7, 3, 4), normal(2, 2, 7, 3, 4)
    mask = np.random.default_rng(3).random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    outputs, weights = xla(query, key, value, mask)
    for b in range(2):
        for h in range(3):
            scores = query[b, :, h] @ key[b, :, h].T / math.sqrt(4)
            exponentials = np.exp(scores) * mask[b, 0]
            expected = exponentials / exponentials.sum(-1, keepdims=True)
            np.testing.assert_allclose(weights[b, h], expected, atol=1e-6)
            np.testing.assert_allclose(outputs[b, :, h], expected @ value[b, :, h], atol=1e-5)
    assert (np.asarray(weights)[~np.broadcast_to(mask, weights.shape)] == 0).all()


def test_attention_to_nothing_is_finite():
    outputs, _ = xla(*(normal(i, 1, 2, 1, 4) for i in range(3)), np.zeros((1, 1, 2, 2), bool))
    assert np.isfinite(outputs).all()


def test_attention_weights_are_float32_in_bfloat16():
    outputs, weights = xla(*(jnp.asarray(normal(i, 1, 6, 2, 4), jnp.bfloat16) for i in range(3)))
    assert outputs.dtype == jnp.bfloat16
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_layer_norm_follows_its_formula():
    x = 3 + 2 * normal(0, 4, 10)
    params = {"scale": normal(1, 10), "bias": normal(2, 10)}
    ours = layers.LayerNorm(epsilon=0.1).apply({"params": params}, x)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(ours, expected * params["scale"] + params["bias"], atol=1e-5)


def test_layer_norm_is_computed_in_float32():
    x = jnp.asarray(300 + normal(0, 4, 10), jnp.bfloat16)
    module = layers.LayerNorm(dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)
    expected = layers.LayerNorm().apply(params, x.astype(jnp.float32))
    np.testing.assert_array_equal(module.apply(params, x), expected.astype(jnp.bfloat16))


def test_dense_is_a_product_on_the_last_axis():
    x, params = normal(0, 2, 3, 5), {"kernel": normal(1, 5, 4), "bias": normal(2, 4)}
    expected = np.einsum("bti,io->bto", x, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(layers.Dense(4).apply({"params": params}, x), expected, atol=1e-5)


def test_an_id_beyond_the_table_is_nan():
    module = layers.Embedding(5, 2)
    params = {"params": {"embedding": normal(0, 5, 2)}}
    ours = np.asarray(module.apply(params, np.array([[0, 4], [5, 2]])))
    np.testing.assert_array_equal(ours[0], params["params"]["embedding"][[0, 4]])
    assert np.isnan(ours[1, 0]).all()
    assert np.isfinite(ours[1, 1]).all()


def test_a_width_that_heads_do_not_divide_is_named():
    with pytest.raises(UserError, match="hidden_size 16 is not a multiple of num_heads 3"):
        block().init(jax.random.key(0), np.zeros((1, 2, 16)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    ones = jnp.ones((400, 500))
    dropped = np.asarray(layers.Dropout(rate).apply({}, ones, rngs={"dropout": jax.random.key(0)}))
    spread = math.sqrt(rate * (1 - rate) / ones.size)
    assert abs((dropped == 0).mean() - rate) < 5 * spread
    assert abs(dropped.mean() - 1) < 5 * spread / (1 - rate)
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=1e-3)


def test_dropout_is_the_identity_without_a_key_or_a_rate():
    x = normal(0, 3, 4)
    np.testing.assert_array_equal(layers.Dropout(0.5).apply({}, x), x)
    np.testing.assert_array_equal(layers.Dropout(0.0).apply({}, x, rngs={"dropout": jax.random.key(0)}), x)


def test_dropout_masks_are_unrelated_between_keys_and_positions():
    keys = jax.random.split(jax.random.key(7), 24)
    kept = jax.vmap(lambda key: layers.Dropout(0.3).apply({}, jnp.ones((64, 96)), rngs={"dropout": key}))(keys) > 0
    kept = np.asarray(kept, np.float64)
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / kept.size) ** 0.5
    centred = kept - 0.7
    pairs = {
        "rows": (centred[:, 1:] * centred[:, :-1]),
        "columns": (centred[:, :, 1:] * centred[:, :, :-1]),
        "keys": (centred[1:] * centred[:-1]),
        "far rows": (centred[:, 32:] * centred[:, :-32]),
    }
    for name, products in pairs.items():
        assert abs(products.mean()) / 0.21 < 5 / products.size**0.5, name
    counts = kept.reshape(24, -1).sum(axis=1)
    expected = 0.7 * 64 * 96
    assert (abs(counts - expected) < 5 * (0.21 * 64 * 96) ** 0.5).all()


def test_dropout_rates_of_one_or_more_are_refused():
    with pytest.raises(UserError, match="dropout rate must lie in"):
        layers.Dropout(1.0).apply({}, jnp.ones(3), rngs={"dropout": jax.random.key(0)})


def test_dropout_is_a_function_of_its_key():
    def draw(key):
        return np.asarray(layers.Dropout(0.5).apply({}, jnp.ones((64,)), rngs={"dropout": jax.random.key(key)}))

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


def test_layers_of_a_stack_drop_independently():
    x, stack = normal(0, 1, 6, 12), Stack(num_layers=3, dropout=0.5)
    # The layers have the same parameters and, as nothing is added to their input, almost the same input.
    params = jax.tree.map(jnp.zeros_like, random_params(stack, x))
    params["layers"]["attention"]["out"]["bias"] += 1.0
    _, state = apply(
        stack,
        params,
        x,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda module, _: module.name == "attention_out_dropout",
        mutable="intermediates",
    )
    outputs = np.asarray(state["intermediates"]["layers"]["attention_out_dropout"]["__call__"][0])
    assert outputs.shape == (3, 1, 6, 12)
    assert set(np.unique(outputs)) == {0.0, 2.0}
    assert all((outputs[i] != outputs[j]).any() for i in range(3) for j in range(i))


def test_a_stack_is_its_layers_in_turn():
    x, causal = normal(0, 2, 6, 12), Structure(causal=True)
    params = random_params(Stack(), x)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params)} == {4}
    y = x
    for layer in range(4):
        y = apply(block(), jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"]), y, structure=causal)
    np.testing.assert_allclose(apply(Stack(), params, x, structure=causal), y, atol=1e-5)


def test_a_stack_initialises_its_layers_differently():
    x = normal(0, 2, 6, 12)
    kernel = jax.jit(Stack().init)(jax.random.key(0), x)["params"]["layers"]["mlp"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(stack, params, x):
    def loss(params):
        return jnp.square(stack.apply({"params": params}, x, rngs={"dropout": jax.random.key(1)})).mean()

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("options", [{"unroll": 9}, {"remat": "full"}])
def test_unroll_and_remat_change_neither_values_nor_gradients(options):
    x, plain, other = normal(0, 2, 6, 12), Stack(2, dropout=0.3), Stack(2, dropout=0.3, **options)
    params = random_params(plain, x)
    expected, expected_gradients = loss_and_gradients(plain, params, x)
    value, gradients = loss_and_gradients(other, params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, expected_gradients)


def test_attention_weights_of_every_layer_can_be_read():
    x = normal(0, 2, 6, 12)
    _, state = apply(Stack(), random_params(Stack(), x), x, mutable="intermediates")
    weights = state["intermediates"]["layers"]["attention"]["weights"][0]
    assert weights.shape == (4, 2, 3, 6, 6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_drop_path_skips_whole_examples_more_often_the_deeper():
    x = jnp.ones((4000, 2, 3))
    for depth, share in ((0.0, 0.0), (0.5, 0.2), (1.0, 0.4)):
        y = np.asarray(layers.DropPath(0.4).apply({}, x, jnp.asarray(depth), rngs={"dropout": jax.random.key(1)}))
        assert set(np.unique(y.round(4))) <= {0.0, np.float32(round(1 / (1 - share), 4))}
        assert (y == y[:, :1, :1]).all()
        np.testing.assert_allclose((y[:, 0, 0] == 0).mean(), share, atol=0.03)
        np.testing.assert_allclose(y.mean(), 1, atol=0.05)
    assert layers.DropPath(0.4).apply({}, x, jnp.asarray(1.0)) is x


def test_a_stack_drops_paths_with_a_key_and_is_whole_without():
    module, plain, x = Stack(drop_path=0.9), Stack(), normal(0, 64, 3, 12)
    params = random_params(module, x)
    np.testing.assert_allclose(apply(module, params, x), apply(plain, params, x), rtol=1e-5, atol=1e-5)
    dropped = apply(module, params, x, rngs={"dropout": jax.random.key(0)})
    same = np.isclose(dropped, apply(plain, params, x), rtol=1e-4, atol=1e-4).all(axis=(1, 2))
    assert same.mean() < 0.3


def test_layer_scale_multiplies_what_a_part_adds():
    x, scaled = normal(0, 2, 3, 12), block().clone(norms="before", layer_scale=0.5)
    params = random_params(scaled, x)
    assert params["attention_scale"].shape == params["mlp_scale"].shape == (12,)
    zero = params | {name: jnp.zeros(12) for name in ("attention_scale", "mlp_scale")}
    np.testing.assert_array_equal(apply(scaled, zero, x), x)
    ones = params | {name: jnp.ones(12) for name in ("attention_scale", "mlp_scale")}
    plain = {name: leaf for name, leaf in params.items() if not name.endswith("_scale")}
    expected = apply(block().clone(norms="before"), plain, x)
    np.testing.assert_allclose(apply(scaled, ones, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(10,), (4, 1, 10)])
def test_norms_have_the_gradients_of_their_formulas(shape):
    x, scale, bias, weights = 3 + 2 * normal(0, 4, 5, 10), 1 + normal(1, *shape), normal(2, *shape), normal(3, 4, 5, 10)

    def layer(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 0.1) * scale + bias

    def rms(x, scale):
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 0.1) * scale

    def gradients(function, *arguments):
        total = lambda *arguments: (function(*arguments) * weights).sum()  # noqa: E731
        return jax.jit(jax.grad(total, tuple(range(len(arguments)))))(*arguments)

    for ours, formula, arguments in [
        (lambda *a: layers.layer_norm(*a, 0.1), layer, (x, scale, bias)),
        (lambda *a: layers.rms_norm(*a, 0.1), rms, (x, scale)),
    ]:
        for mine, expected in zip(gradients(ours, *arguments), gradients(formula, *arguments)):
            np.testing.assert_allclose(mine, expected, atol=2e-5)


def test_norms_keep_their_bfloat16_input_and_no_float32_copies():
    x, scale = jnp.ones((64, 512), jnp.bfloat16), jnp.ones(512)
    for norm in (lambda x: layers.layer_norm(x, scale, scale, 1e-6), lambda x: layers.rms_norm(x, scale, 1e-6)):
        kept = jax.tree.leaves(jax.vjp(norm, x)[1])
        assert [leaf.dtype for leaf in kept if leaf.size == x.size] == [jnp.bfloat16]
