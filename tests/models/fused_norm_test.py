"""The norms of GPUs: against those that every platform has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import fused_norm, layers

REFERENCES = {
    True: lambda x, scale, bias: layers.layer_norm(x, scale, bias, 1e-5),
    False: lambda x, scale, bias: layers.rms_norm(x, scale, 1e-5) + 0 * bias,
}


def operands(width, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 7, width)) * 2 + 5, dtype)
    return x, *(jnp.asarray(rng.normal(size=width), jnp.float32) for _ in range(2))


def value_and_gradients(function, inputs):
    weights = np.random.default_rng(1).normal(size=inputs[0].shape)

    def total(inputs):
        outputs = function(*inputs).astype(jnp.float32)
        return (outputs * weights).sum(), outputs

    gradients, outputs = jax.jit(jax.grad(total, has_aux=True))(inputs)
    return [outputs, *gradients]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("width", "dtype"), [(768, "float32"), (1000, "float32"), (256, "bfloat16")])
def test_norms_of_a_gpu_equal_the_others(width, dtype, centred, monkeypatch):
    monkeypatch.setattr(fused_norm, "PROGRAMS", 3)  # two of which have two blocks, the last of them not whole
    options = fused_norm.Options(centred, 1e-5, jnp.dtype(dtype), interpret=True)
    inputs = operands(width, dtype)
    expected = value_and_gradients(lambda *inputs: REFERENCES[centred](*inputs).astype(dtype), inputs)
    found = value_and_gradients(functools.partial(fused_norm.norm, options=options), inputs)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("module", [layers.LayerNorm, layers.RMSNorm])
def test_modules_choose_them_for_16_bits_on_a_gpu(module):
    def programs(dtype, platform):
        x = operands(768, dtype)[0]
        norm = module(dtype=x.dtype)
        params = jax.eval_shape(norm.init, jax.random.key(0), x)
        device = jax.sharding.AbstractDevice("NVIDIA H100", None, platform)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            traced = jax.jit(jax.grad(lambda p: norm.apply(p, x).astype(jnp.float32).sum())).trace(params)
            return traced.lower(lowering_platforms=("cuda",)).as_text().count("xla.gpu.triton")

    assert programs("bfloat16", "gpu") == 2
    assert programs("float32", "gpu") == programs("bfloat16", "cpu") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [768, 1152, 2048])
def test_the_kernels_of_a_gpu_equal_the_reference(width, centred):
    options = fused_norm.Options(centred, 1e-5, jnp.dtype("bfloat16"))
    inputs = operands(width, "bfloat16")
    expected = value_and_gradients(REFERENCES[centred], (inputs[0].astype(jnp.float32), *inputs[1:]))
    found = value_and_gradients(functools.partial(fused_norm.norm, options=options), inputs)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=5e-2, rtol=2e-2)
