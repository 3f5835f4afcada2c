"""Bases of fewer bits: what they hold, what they compute, and that they stay as they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import bert, layers
from research.optimizer import make_optimizer
from research.pretrained import rounded
from research.pretrained.pending import Pending, Piece
from research.step import init_state, train_step
from research.tasks import packed
from research.tasks.adapters import flat, tree
from research.tasks.classification import Classification
from research.tasks.ia3 import IA3
from research.tasks.lora import LoRA

ENCODER = bert.Encoder(
    vocab_size=50, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, max_positions=8,
    dropout=0.0, attention_dropout=0.0, initializer_range=0.2,
)  # fmt: skip
BASE = Classification(bert.SequenceClassifier(ENCODER, num_outputs=3, head_dropout=0.0))
BATCH = {
    "input_ids": np.arange(32, dtype=np.int32).reshape(4, 8),
    "attention_mask": np.ones((4, 8), np.int32),
    "label": np.arange(4, dtype=np.int32) % 3,
    "mask": np.ones(4, np.float32),
}
SPEC = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in BATCH.items()}
RNG = jax.random.key(0)
FORMATS = ("bfloat16", "int8", "nf4", "fp4", "int4")
KINDS = {
    "lora": lambda **more: LoRA(BASE, ("layers/.*/kernel$",), rank=4, whole=("^head_",), **more),
    "dora": lambda **more: LoRA(BASE, ("layers/.*/kernel$",), rank=4, dora=True, whole=("^head_",), **more),
    "ia3": lambda **more: IA3(BASE, ("(key|value|up)/kernel$",), ("mlp/down/kernel$",), whole=("^head_",), **more),
}


def stacked(params):
    return [name for name in params if "layers/" in name and name.endswith("kernel")]


def kernels(*shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[0, :, 1] = 0.0  # an output, and so all its blocks
    return values


def in_file(values):
    """Returns what is still to be read, a tensor a layer, turned."""

    def piece(layer):
        return Piece(layer, lambda indices: [values[layer][index] for index in indices])

    return Pending(values.shape, [piece(layer) for layer in range(len(values))])


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "bfloat16"])
def test_packed_is_rounded_and_takes_its_bits(format):
    exact, name = kernels(3, 128, 5), "layers/up/kernel"
    made = packed.pack({name: exact}, format)
    codes, scales = made["layers/up/kernel_codes"], made["layers/up/kernel_scales"]
    assert codes.nbytes == exact.size // (1 if format == "int8" else 2)
    assert scales.size == 3 * 5 * (1 if format == "int8" else 2)
    unpacked = packed.unpack(made, format)
    assert list(unpacked) == [name]
    np.testing.assert_allclose(unpacked[name], rounded.FORMATS[format](exact, packed.BLOCK), rtol=1e-6, atol=1e-7)
    again = packed.pack({name: np.asarray(unpacked[name])}, format)
    np.testing.assert_array_equal(again["layers/up/kernel_codes"], codes)  # rounding twice is rounding once


@pytest.mark.parametrize("format", FORMATS)
def test_files_arrays_compiled_ones_and_shapes_are_packed_alike(format):
    exact = {"layers/up/kernel": kernels(2, 64, 6), "embeddings/kernel": np.ones((4, 4), np.float32)}
    of_arrays = packed.pack(exact, format)
    of_files = packed.pack(exact | {"layers/up/kernel": in_file(exact["layers/up/kernel"])}, format)
    compiled = jax.jit(lambda params: packed.pack(params, format))(exact)
    shapes = packed.pack({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in exact.items()}, format)
    assert of_arrays.keys() == of_files.keys() == compiled.keys() == shapes.keys()
    for name, x in of_arrays.items():
        np.testing.assert_array_equal(x, of_files[name])
        assert x.dtype == compiled[name].dtype == shapes[name].dtype
        assert x.shape == shapes[name].shape
        if "scales" not in name:
            np.testing.assert_array_equal(x, compiled[name])
    wanted = jax.eval_shape(lambda: packed.unpack(compiled, format))
    assert packed.unpack(shapes, format) == wanted
    assert of_arrays["embeddings/kernel"] is exact["embeddings/kernel"]  # no stack of linear layers


@pytest.mark.parametrize(
    ("format", "dtype"), [("int8", "float32"), ("nf4", "float32"), ("nf4", "bfloat16"), ("bfloat16", "float32")]
)
def test_layers_and_their_gradients_are_those_of_the_unpacked_kernel(format, dtype):
    layer, x = layers.Dense(6, dtype=dtype), jax.random.normal(RNG, (5, 64))
    made = packed.pack({"layers/kernel": kernels(1, 64, 6)}, format)
    plain = {"kernel": packed.unpack(made, format)["layers/kernel"][0], "bias": jnp.linspace(-1, 1, 6)}
    params = {name.removeprefix("layers/"): value[0] for name, value in made.items()} | {"bias": plain["bias"]}

    def loss(x, bias, params):
        outputs = layer.apply({"params": params | {"bias": bias}}, x, jnp.tanh)
        return (outputs.astype(jnp.float32) * jnp.arange(6)).sum(), outputs

    wanted = jax.grad(loss, (0, 1), has_aux=True)(x, plain["bias"], plain)
    with nn.intercept_methods(lambda *args: packed.intercept(format, *args)):
        found = jax.grad(loss, (0, 1), has_aux=True)(x, plain["bias"], params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "format"), [("lora", "nf4"), ("lora", "int8"), ("dora", "nf4"), ("ia3", "bfloat16")])
def test_training_is_that_of_the_rounded_base_which_stays(kind, format):
    optimizer = make_optimizer(10, 1e-2, freeze=("^base/",), weight_decay=0.1, microbatches=2)

    def trained(task, loaded):
        start = jax.jit(lambda: init_state(task, optimizer, SPEC, 0, loaded))()
        step, state = jax.jit(lambda state, batch: train_step(task, optimizer, state, batch)), start
        for _ in range(3):
            state, metrics = step(state, BATCH)
        return start.params, state, metrics

    small, plain = KINDS[kind](base_format=format), KINDS[kind]()
    before, after, metrics = trained(small, None)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before["base"], after.params["base"])))
    base, whole = flat(small.join(before)), flat(before["whole"])
    loaded = {
        "base": tree({name: x for name, x in base.items() if name not in whole}),
        "whole": before["whole"],
        small.part: before[small.part],
    }
    _, wanted, expected = trained(plain, loaded)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(
            metrics[name].total / metrics[name].count, expected[name].total / expected[name].count, rtol=1e-4
        )
    for a, b in zip(jax.tree.leaves(after.params[small.part]), jax.tree.leaves(wanted.params[small.part])):
        np.testing.assert_allclose(a, b, atol=3e-3)  # of steps of 1e-2
    merged = BASE.loss(small.plain(after.params), BATCH, RNG)[0].total
    np.testing.assert_allclose(merged, small.loss(after.params, BATCH, RNG)[0].total, rtol=1e-4)
    evaluated = small.evaluated.metrics(small.merge(after.params), BATCH)["loss"].total
    np.testing.assert_allclose(evaluated, merged, rtol=1e-4)
    kept = {name: x for name, x in flat(small.merge(after.params)).items() if "layers/" in name and "kernel" in name}
    assert {x.dtype.name for x in kept.values()} <= {"bfloat16", "int8", "uint8", "float32"}
    assert sum(x.nbytes for x in kept.values()) < 0.6 * sum(4 * x.size for n, x in base.items() if n in stacked(base))


def test_the_base_takes_an_eighth_and_no_copy_of_it_is_kept():
    task, optimizer = KINDS["lora"](base_format="nf4"), make_optimizer(10, 1e-2, freeze=("^base/",))
    state = jax.jit(lambda: init_state(task, optimizer, SPEC, 0))()
    stacked = {name: x for name, x in flat(state.params["base"]).items() if "kernel" in name and "layers" in name}
    plain = {name: x for name, x in flat(task.join(state.params)).items() if "kernel" in name and "layers" in name}
    share = sum(x.nbytes for x in stacked.values()) / sum(x.nbytes for x in plain.values())
    assert share == 0.5 / 4 + 1 / 64
    trains = sum(x.nbytes for part in ("lora", "whole") for x in jax.tree.leaves(state.params[part]))
    assert sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) == 2 * trains + 8


def test_what_cannot_be_packed_is_an_error():
    with pytest.raises(UserError, match=r"base_format: there is no 'nf5'; did you mean 'nf4'"):
        KINDS["lora"](base_format="nf5")
    with pytest.raises(UserError, match="layers/up/kernel has 65; take int8"):
        packed.pack({"layers/up/kernel": kernels(2, 65, 4)}, "nf4")
