"""What the backward pass computes and keeps.

Models that compute in bfloat16 do so in the backward pass too: float32 products are several times as slow.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from research.models import bert, gpt, vit
from research.models.detr import Detr
from research.models.dit import DiT
from research.models.encoder_decoder import EncoderDecoder
from research.models.layers import product
from research.models.mae import MaskedAutoencoder
from research.models.resnet import ResNet

IDS = np.arange(16, dtype=np.int32).reshape(2, 8) % 11
IMAGE = np.ones((2, 8, 8, 3), np.float32)
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 32, "dtype": "bfloat16"}
CASES = {
    "decoder": (gpt.Decoder(64, **SIZES), (IDS,)),
    "grouped heads, untied head": (gpt.Decoder(64, num_kv_heads=2, tie_embeddings=False, **SIZES), (IDS,)),
    "encoder": (bert.Encoder(64, **SIZES), (IDS,)),
    "encoder-decoder": (EncoderDecoder(64, **SIZES), (IDS, IDS)),
    "image encoder": (vit.Encoder(8, 4, **SIZES), (IMAGE,)),
    "masked autoencoder": (
        MaskedAutoencoder(vit.Encoder(8, 4, **SIZES), 16, 2, 4, 32),
        (IMAGE, np.ones((2, 4), np.float32)),
    ),
    "diffusion": (DiT(8, 2, 3, **SIZES), (IMAGE, np.ones(2), np.zeros(2, np.int32))),
    "detector": (Detr(ResNet((1,), (8,), "basic"), 3, 6, **SIZES), (np.ones((2, 96, 96, 3)),)),
}
FLOAT32 = {"detector": 12}  # products of the heads of classes, one layer, and of boxes, three


def products(jaxpr):
    """Yields the dtypes of the operands of every product, in loops and functions too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(str(variable.aval.dtype) for variable in equation.invars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from products(inner if hasattr(inner, "eqns") else inner.jaxpr)


def gradient(name, **changes):
    """Returns the gradient of a loss, and the parameters' shapes."""
    model, inputs = CASES[name]
    if isinstance(model, MaskedAutoencoder):
        model = model.clone(encoder=model.encoder.clone(**changes))
    else:
        model = model.clone(**changes)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        return sum(
            jnp.square(x.astype(jnp.float32)).sum()
            for x in jax.tree.leaves(model.apply({"params": params}, *inputs, rngs=rngs))
        )

    return loss, params


@pytest.mark.parametrize("name", CASES)
def test_no_product_is_in_float32_in_either_direction(name):
    loss, params = gradient(name)
    found = list(products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert len(found) > 20
    others = [dtypes for dtypes in found if dtypes != ("bfloat16", "bfloat16")]
    assert len(others) == FLOAT32.get(name, 0)


def test_a_product_in_half_precision_is_accumulated_in_float32():
    a, b = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2))

    def loss(a, b):
        return jnp.sin(product("ij,kj->ik", a, b)).sum()

    half = (a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    assert product("ij,kj->ik", *half).dtype == jnp.float32
    rounded = [x.astype(jnp.float32) for x in half]
    np.testing.assert_allclose(product("ij,kj->ik", *half), product("ij,kj->ik", *rounded), rtol=1e-5, atol=1e-5)
    for found, expected in zip(jax.grad(loss, (0, 1))(*half), jax.grad(loss, (0, 1))(*rounded)):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.05, atol=0.15)


def scores(name, remat):
    """Returns the shapes of what the backward pass keeps of pairs of queries and keys, [..., heads, queries, keys]."""
    loss, params = gradient(name, remat=remat, attention="xla")
    shapes = [value.shape for value, _ in saved_residuals(loss, params)]
    return [shape for shape in shapes if len(shape) > 3 and shape[-3] == SIZES["num_heads"] != shape[-1]]


@pytest.mark.parametrize("name", CASES)
def test_attention_can_be_computed_again_alone(name):
    assert scores(name, "none")
    assert not scores(name, "attention")
