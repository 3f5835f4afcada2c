"""Operations counted from jaxprs, against arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import flops
from research.models import gpt
from research.tasks.causal_lm import CausalLM


def test_products_convolutions_and_scans_are_counted_as_often_as_they_run():
    assert flops.count(lambda a, b: a @ b, np.ones((2, 3)), np.ones((3, 5))) == 2 * 2 * 3 * 5
    batched = flops.count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), np.ones((7, 2, 3)), np.ones((7, 3, 5)))
    assert batched == 7 * 60
    image, kernel = np.ones((1, 8, 8, 3), np.float32), np.ones((3, 3, 3, 4), np.float32)

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops.count(convolve, image, kernel) == 2 * 8 * 8 * 4 * (3 * 3 * 3)

    def loop(a):
        return jax.lax.scan(lambda carry, _: (jax.checkpoint(jnp.matmul)(carry, a), None), a, None, length=5)[0]

    assert flops.count(jax.jit(loop), np.ones((4, 4))) == 5 * 2 * 4**3


@pytest.mark.parametrize("options", [{}, {"remat": "full"}, {"attention": "chunked"}, {"unroll": 2}])
def test_a_training_step_has_the_operations_of_the_usual_formula(options):
    layers, width, length, rows = 2, 32, 16, 3
    model = gpt.Decoder(100, width, layers, 2, intermediate_size=4 * width, max_positions=length, **options)
    task = CausalLM(model)
    shapes = {"input_ids": "int32", "targets": "int32", "target_mask": "float32"}
    spec = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in shapes.items()}
    spec["mask"] = jax.ShapeDtypeStruct((rows,), "float32")
    params = jax.eval_shape(lambda: task.init(jax.random.key(0), spec))
    multiplied = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1) - length * width
    multiplied -= sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 2)  # stacked biases and norms
    expected = rows * length * (6 * multiplied + 12 * layers * width * length)
    assert flops.of_training(task, params, spec) == expected


def test_devices_are_known_by_what_jax_calls_them():
    kinds = {"TPU v5 lite": "v5e", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100"}
    kinds |= {"NVIDIA H200": "h200", "TPU v4": "v4", "NVIDIA A100-SXM4-80GB": "a100", "cpu": None}
    for kind, name in kinds.items():
        device = type("Device", (), {"device_kind": kind})
        assert flops.chip_of(device) == (flops.CHIPS[name] if name else None)
