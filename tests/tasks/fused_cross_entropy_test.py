"""The vocabulary's loss on GPUs: against that which every platform has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.tasks import cross_entropy, fused_cross_entropy


def operands(dtype, vocab_size=200):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 5, vocab_size)) * 3, dtype)
    targets = jnp.asarray(rng.integers(0, vocab_size, (3, 5)))
    return logits, targets, jnp.asarray(rng.integers(0, 3, (3, 5)), jnp.float32)


def sums_and_gradient(compute, logits, targets, weights, *options):
    def total(logits):
        sums = compute(logits, targets, weights, *options)
        return 3 * sums[0], sums

    gradient, sums = jax.jit(jax.grad(total, has_aux=True))(logits)
    return [*sums, gradient]


@pytest.mark.parametrize("block", [64, 256])  # the last one is not whole
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_equals_the_plain_loss(dtype, smoothing, z_loss, block, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "BLOCK", block)
    inputs = operands(dtype)
    expected = sums_and_gradient(cross_entropy._plain_sums, *inputs, smoothing, z_loss)
    found = sums_and_gradient(cross_entropy._fused_sums, *inputs, smoothing, z_loss, True)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, theirs)), rtol=tolerance, atol=1e-6)


def test_logits_may_be_infinite_and_rows_of_no_weight_anything(monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "BLOCK", 64)
    logits, targets, weights = operands("float32")
    logits = logits.at[0, 0, :70].set(-jnp.inf).at[1, 1].set(jnp.nan)
    targets, weights = targets.at[0, 0].set(150), weights.at[0, 0].set(1).at[1, 1].set(0)
    expected = sums_and_gradient(cross_entropy._plain_sums, logits.at[1, 1].set(0), targets, weights, 0.0, 0.0)
    found = sums_and_gradient(cross_entropy._fused_sums, logits, targets, weights, 0.0, 0.0, True)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("platform", "dtype", "count"), [("gpu", "bfloat16", 1), ("gpu", "float32", 0), ("cpu", "bfloat16", 0)]
)
def test_a_gpu_has_it_where_there_is_a_gradient_to_make(platform, dtype, count):
    inputs = operands(dtype, 50304)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", None, platform))

    def total(logits):
        return cross_entropy.sums(logits, *inputs[1:])[0]

    def programs(function):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.jit(function).trace(inputs[0]).lower(lowering_platforms=("cuda",)).as_text().count("gpu.triton")

    assert programs(jax.grad(total)) == count
    assert programs(total) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [200, 32000, 50304])
def test_the_kernel_of_a_gpu_equals_the_plain_loss(vocab_size):
    inputs = operands("bfloat16", vocab_size)
    expected = sums_and_gradient(cross_entropy._plain_sums, inputs[0].astype(jnp.float32), *inputs[1:], 0.1, 1e-3)
    found = sums_and_gradient(cross_entropy._fused_sums, *inputs, 0.1, 1e-3, False)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=2e-3, rtol=1e-2)
