"""What compilers cannot split, on several devices: the same as on one, values and gradients, each with its own rows."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.models import fused_norm, kernels, layers
from research.models.attention import DropWeights
from research.models.structure import Structure
from research.tasks import cross_entropy


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def norm(x, scale, bias):
    return jnp.sin(fused_norm.norm(x, scale, bias, fused_norm.Options(True, 1e-5, jnp.float32, interpret=True)))


def loss(logits, weights):
    return cross_entropy._fused_sums(logits, jnp.ones(weights.shape, jnp.int32), weights, 0.1, 1e-3, True)[0]


def attention(query, key, value, bias):
    structure = Structure(jnp.ones(query.shape[:2], jnp.int32), jnp.ones(key.shape[:2], jnp.int32))
    dropout = DropWeights(0.3, jax.random.key(1))
    return jnp.sin(kernels.flash(query, key, value, structure, bias, 0.3, dropout, interpret=True))


def positions(rows, factors):
    return jnp.sin(layers.for_each(rows, len(factors)) * factors)


ROWS = jax.sharding.PartitionSpec(("data", "fsdp"))
WHOLE = jax.sharding.PartitionSpec()
HEADS = [draw(4, 20, 2, 16, seed=seed) for seed in range(3)]
CASES = {
    "norm": (norm, [draw(4, 6, 256), draw(256), draw(256)], [ROWS, WHOLE, WHOLE]),
    "loss": (loss, [draw(4, 6, 100), jnp.abs(draw(4, 6))], [ROWS, ROWS]),
    "attention": (attention, [*HEADS, draw(2, 39)], [ROWS, ROWS, ROWS, WHOLE]),
    "positions": (positions, [draw(6, 8), draw(4, 6, 8)], [WHOLE, ROWS]),
}


def gradients(name):
    function, inputs, _ = CASES[name]
    return jax.value_and_grad(lambda inputs: function(*inputs).sum())(inputs)


@pytest.mark.parametrize("name", CASES)
def test_four_devices_compute_what_one_does(name, tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, __file__, name, str(tmp_path / "found.npz")]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    for ours, theirs in zip(found.values(), jax.tree.leaves(jax.jit(functools.partial(gradients, name))())):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    layers.platform = lambda: "gpu"
    function, inputs, specs = CASES[sys.argv[1]]
    mesh = sharding.make_mesh(data=2, fsdp=2)
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs)]
    compute = jax.value_and_grad(lambda inputs: function(*inputs).sum())
    compiled = jax.jit(sharding.over(mesh, compute)).lower(placed).compile()
    assert "all-gather" not in compiled.as_text()
    np.savez(sys.argv[2], *jax.tree.leaves(compiled(placed)))
