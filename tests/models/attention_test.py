"""Every implementation of attention against the reference: values and gradients, over what may attend to what."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.errors import UserError
from research.models import attention, kernels
from research.models import flash as flash_kernel
from research.models.attention import DropWeights, attend
from research.models.positions import by_distance
from research.models.structure import Structure

LENGTH = 256
GPU = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")


def numbers(*documents: int, first: int = 0, length: int = LENGTH) -> np.ndarray:
    """Return one row of document numbers: `first` places of padding, documents of these lengths, and padding."""
    row = np.zeros(length, np.int32)
    for number, size in enumerate(documents, 1):
        row[first : first + size], first = number, first + size
    return row


PADDED = np.stack([numbers(256), numbers(131)])
PACKED = np.stack([numbers(100, 30, 90), numbers(1, 127, 128)])
ONES = np.ones_like(PADDED)
STRUCTURES = {
    "everything": Structure(),
    "causal": Structure(causal=True),
    "window": Structure(causal=True, window=50),
    "padding": Structure(PADDED, PADDED),
    "causal padding": Structure(PADDED, PADDED, causal=True),
    "documents": Structure(PACKED, PACKED, packed=True),
    "causal documents": Structure(PACKED, PACKED, causal=True, packed=True),
    "causal documents in a window": Structure(PACKED, PACKED, causal=True, window=20, packed=True),
    "padding first": Structure(*[np.stack([numbers(200, first=56), numbers(256)])] * 2, causal=True, packed=True),
    "another sequence": Structure(ONES, np.stack([numbers(140, length=384), numbers(384, length=384)])),
    "an image's padding": Structure(ONES, np.stack([np.tile(numbers(20, length=32), 8)] * 2), packed=True),
}


def operands(structure: Structure, groups: int = 4, width: int = 64, dtype=jnp.float32, length: int = LENGTH):
    size = length if structure.keys_BxS is None else structure.keys_BxS.shape[1]
    shapes = (2, length, 4, width), (2, size, groups, width), (2, size, groups, width)
    return [jnp.asarray(np.random.default_rng(i).normal(size=shape), dtype) for i, shape in enumerate(shapes)]


def real(structure: Structure, length: int = LENGTH) -> np.ndarray:
    return np.ones((2, length), bool) if structure.queries_BxT is None else np.asarray(structure.queries_BxT) != 0


def value_and_gradients(compute, inputs, structure):
    """Return outputs of real queries, and the gradients of a sum of them that weighs each differently."""
    shape = inputs[0].shape
    weights = np.random.default_rng(9).normal(size=shape) * real(structure, shape[1])[..., None, None]

    def total(inputs):
        outputs = compute(*inputs).astype(jnp.float32)
        return (outputs * weights).sum(), outputs

    gradients, outputs = jax.jit(jax.grad(total, has_aux=True))(inputs)
    return [np.asarray(outputs)[real(structure, shape[1])], *gradients]


def chunked(structure, *inputs, **options):
    return attend(*inputs, structure, implementation="chunked", **options)


def splash(structure, query, key, value, softcap=None):
    scale = query.shape[-1] ** -0.5
    return kernels.splash(query, key, value, structure, None, scale, softcap=softcap, interpret=True)


def flash(structure, query, key, value, bias=None, dropout=None):
    return kernels.flash(query, key, value, structure, bias, query.shape[-1] ** -0.5, dropout, interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 60 * LENGTH)  # five blocks of queries, the last one not whole
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", 128)
    monkeypatch.setattr(flash_kernel, "WIDE", 64)
    monkeypatch.setattr(flash_kernel, "NARROW", 32)


@pytest.mark.parametrize("compute", [chunked, flash, splash])
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("groups", [2, 4])
def test_every_implementation_equals_the_reference(name, compute, groups, small_blocks):
    structure = STRUCTURES[name]
    inputs = operands(structure, groups, width=16)
    expected = value_and_gradients(
        functools.partial(attend, structure=structure, implementation="xla"), inputs, structure
    )
    found = value_and_gradients(functools.partial(compute, structure), inputs, structure)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("compute", "name"), [(chunked, "causal padding"), (splash, "causal documents in a window")])
def test_scores_are_capped_alike(name, compute, small_blocks):
    structure, inputs = STRUCTURES[name], operands(STRUCTURES[name], 2, width=16)
    reference = functools.partial(attend, structure=structure, implementation="xla", softcap=0.7)
    expected = value_and_gradients(reference, inputs, structure)
    found = value_and_gradients(functools.partial(compute, structure, softcap=0.7), inputs, structure)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)
    free = attend(*inputs, structure, implementation="xla")
    assert np.abs(np.asarray(free)[real(structure)] - expected[0]).max() > 1e-2


def test_scores_are_capped_by_their_formula():
    query, key, value = operands(Structure(), length=8)
    scores = np.einsum("bthk,bshk->bhts", query, key) * 0.3
    weights = jax.nn.softmax(2.0 * np.tanh(scores / 2.0), axis=-1)
    want = np.einsum("bhts,bshk->bthk", weights, value)
    np.testing.assert_allclose(attend(query, key, value, scale=0.3, softcap=2.0), want, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "local"),
    [("xla", True), ("xla", False), ("chunked", True), ("flash", True), ("splash", False)],
)
def test_a_window_may_hold_in_some_layers_of_a_program(implementation, local, small_blocks, monkeypatch):
    kernel = {"flash": kernels.flash, "splash": kernels.splash}.get(implementation)
    if kernel:
        monkeypatch.setitem(attention.IMPLEMENTATIONS, implementation, functools.partial(kernel, interpret=True))
        monkeypatch.setattr(attention, "obstacle", lambda *_: None)
    structure = STRUCTURES["causal documents in a window"]
    inputs = operands(structure, 2, width=16)
    fixed = dataclasses.replace(structure, window=20 if local else None)
    expected = value_and_gradients(functools.partial(attend, structure=fixed, implementation="xla"), inputs, structure)

    def compute(local, *inputs):
        chosen = dataclasses.replace(structure, local=local)
        return attend(*inputs, chosen, implementation=implementation)

    found = value_and_gradients(functools.partial(compute, jnp.asarray(local)), inputs, structure)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("compute", [chunked, flash])
@pytest.mark.parametrize(("name", "length"), [("causal padding", LENGTH), ("another sequence", LENGTH), ("causal", 70)])
def test_every_implementation_has_the_bias_and_the_dropout_of_the_reference(name, length, compute, small_blocks):
    structure, drop = STRUCTURES[name], DropWeights(0.3, jax.random.key(1))
    inputs = operands(structure, 2, width=16, length=length)
    shape = (4, length + inputs[1].shape[1] - 1)
    inputs.append(jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32))

    def reference(query, key, value, bias):
        return attend(query, key, value, structure, bias=bias, dropout=drop, implementation="xla")

    def other(query, key, value, bias):
        return compute(structure, query, key, value, bias=bias, dropout=drop)

    for theirs, ours in zip(*(value_and_gradients(f, inputs, structure) for f in (reference, other))):
        np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-4)


def test_a_bias_by_distance_stands_where_it_belongs():
    bias = np.random.default_rng(0).normal(size=(2, 5 + 7 - 1)).astype(np.float32)
    expected = [[[bias[h, j - i + 5 - 1] for j in range(7)] for i in range(5)] for h in range(2)]
    np.testing.assert_array_equal(by_distance(jnp.asarray(bias), 5), expected)


@pytest.mark.parametrize("name", ["causal documents", "another sequence"])
def test_flash_drops_what_the_reference_drops(name, small_blocks):
    structure, drop = STRUCTURES[name], DropWeights(0.3, jax.random.key(1))
    inputs = operands(structure, 2, width=16)
    reference = functools.partial(attend, structure=structure, implementation="xla", dropout=drop)
    expected = value_and_gradients(reference, inputs, structure)
    found = value_and_gradients(functools.partial(flash, structure, dropout=drop), inputs, structure)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4)


def test_flash_goes_through_no_block_between_documents():
    rows = jnp.asarray(np.stack([numbers(64, 64, 128), numbers(70, 186)]))
    options = flash_kernel.Options(True, None, 1.0, 0.0, False, 4, (LENGTH, LENGTH))
    begin, end = flash_kernel._extents(rows, rows, 64, options, of_queries=True)
    np.testing.assert_array_equal(begin, [[0, 64, 128, 128], [0, 0, 70, 70]])
    np.testing.assert_array_equal(end, [[64, 128, 192, 256], [64, 128, 192, 256]])


@pytest.mark.parametrize(("biased", "programs"), [(False, 3), (True, 4)])
@pytest.mark.parametrize("dropout", [None, DropWeights(0.1, jax.random.key(0))])
def test_flash_is_lowered_for_a_gpu(dropout, biased, programs, monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    structure = STRUCTURES["causal documents"]

    def total(*inputs, bias):
        return attend(*inputs, structure, bias=bias, dropout=dropout).astype(jnp.float32).sum()

    inputs = operands(structure, dtype=jnp.bfloat16)
    bias = jnp.zeros((4, 2 * LENGTH - 1)) if biased else None

    def gradients(inputs, bias):
        return jax.grad(lambda inputs, bias: total(*inputs, bias=bias), (0, 1) if biased else 0)(inputs, bias)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=GPU)):
        lowered = jax.jit(gradients).trace(inputs, bias).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == programs


def test_blocks_continue_a_cache(small_blocks):
    held = jnp.asarray(np.stack([numbers(400, length=512), numbers(380, first=20, length=512)]))
    structure = Structure.within(held, LENGTH, causal=True, index=jnp.asarray(140), packed=True)
    inputs = operands(structure)
    whole, blocks = (attend(*inputs, structure, implementation=name) for name in ("xla", "chunked"))
    np.testing.assert_allclose(blocks, whole, atol=2e-6)


def test_blocks_hold_no_square_of_the_length():
    inputs = operands(Structure(), length=8192, width=8)

    def peak(implementation):
        def total(inputs):
            return attend(*inputs, Structure(causal=True), implementation=implementation).sum()

        return jax.jit(jax.grad(total)).lower(inputs).compile().memory_analysis().temp_size_in_bytes

    square = 2 * 4 * 8192**2 * 4  # bytes of all scores
    assert peak("xla") > square
    assert peak("chunked") < square / 8


def test_long_rows_are_computed_in_blocks_and_short_ones_at_once():
    for length, expected in {512: "xla", 1024: "xla", 4096: "chunked"}.items():
        shapes = [jax.ShapeDtypeStruct((2, length, 4, 8), jnp.float32)] * 3
        assert attention.choose(tuple(shapes), Structure(causal=True), None, None) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("on", "kernel"), [("gpu", "cudnn"), ("tpu", "splash"), ("cpu", "xla")])
def test_auto_chooses_the_platforms_kernel_and_another_where_that_cannot(on, kernel, dtype, monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: on)
    inputs = tuple(operands(STRUCTURES["causal padding"], dtype=dtype))
    chosen = functools.partial(attention.choose, inputs)
    assert chosen(STRUCTURES["causal padding"], None, None) == ("xla" if (on, dtype) == ("gpu", "float32") else kernel)
    on_gpu = (on, dtype) == ("gpu", "bfloat16")
    drop = DropWeights(0.1, jax.random.key(0))
    assert chosen(STRUCTURES["causal padding"], None, drop) == ("flash" if on_gpu else "xla")
    if on == "gpu":
        assert chosen(STRUCTURES["causal documents"], None, None) == ("flash" if on_gpu else "xla")
    bias = jnp.zeros((4, 2 * LENGTH - 1))
    assert chosen(Structure(), bias, None) == ("flash" if on_gpu else "xla")
    assert chosen(STRUCTURES["causal padding"], None, None, 50.0) == ("splash" if on == "tpu" else "xla")


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("cudn", "unknown implementation 'cudn'; did you mean 'cudnn'?"),
        ("cudnn", "'cudnn' needs a GPU; this is compiled for a CPU"),
        ("splash", "'splash' needs a TPU; this is compiled for a CPU; 'auto' chooses one that can"),
    ],
)
def test_an_implementation_that_cannot_serve_says_why(implementation, message):
    with pytest.raises(UserError, match=re.escape(message)):
        attend(*operands(Structure()), implementation=implementation)
    monkeyed = "has no dropout of attention weights"
    assert attention.obstacle("splash", (), Structure(), None, DropWeights(0.1, None)) == monkeyed
    for kernel in ("cudnn", "flash"):
        assert attention.obstacle(kernel, (), Structure(), None, None, 50.0) == "has no soft cap of scores"


def test_a_kernel_that_knows_lengths_alone_makes_other_rows_nan():
    rows = np.stack([numbers(256), numbers(131), numbers(256, first=1)[:256], numbers(100, 30, 90)])
    refused = kernels._refused(jnp.ones((4, LENGTH, 1, 1)), [jnp.asarray(rows)])
    assert np.isnan(refused).any(axis=(1, 2, 3)).tolist() == [False, False, True, True]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra tpu")
@pytest.mark.parametrize("topology", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", ["causal", "causal documents", "another sequence"])
def test_attention_is_compiled_for_slices_that_are_not_here(name, topology, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    structure = STRUCTURES[name]
    inputs = [jnp.repeat(x, 4, axis=0) for x in operands(structure, dtype=jnp.bfloat16)]
    rows = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), structure)
    mesh = sharding.make_mesh(devices=list(devices))

    def total(inputs):
        return attend(*inputs, rows).astype(jnp.float32).sum()

    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in inputs]
    compiled = jax.jit(sharding.over(mesh, jax.grad(total))).lower(shapes).compile()
    if topology != "v3:2x2":  # whose kernels have no bfloat16
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * LENGTH**2 * 4  # no scores of all


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("implementation", ["cudnn", "flash"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_kernels_of_a_gpu_equal_the_reference(name, implementation, groups):
    structure = STRUCTURES[name]
    if implementation == "cudnn" and structure.packed:
        pytest.skip("cuDNN has no rows of several documents")
    inputs = operands(structure, groups, dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in inputs]
    expected = value_and_gradients(
        functools.partial(attend, structure=structure, implementation="xla"), exact, structure
    )
    found = value_and_gradients(
        functools.partial(attend, structure=structure, implementation=implementation), inputs, structure
    )
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal padding", "another sequence"])
def test_the_flash_of_a_gpu_has_the_bias_and_the_dropout_of_the_reference(name):
    structure, drop = STRUCTURES[name], DropWeights(0.3, jax.random.key(1))
    inputs = operands(structure, 2, dtype=jnp.bfloat16)
    shape = (4, LENGTH + inputs[1].shape[1] - 1)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)

    def compute(implementation, query, key, value, bias):
        return attend(query, key, value, structure, bias=bias, dropout=drop, implementation=implementation)

    exact = [x.astype(jnp.float32) for x in inputs]
    expected = value_and_gradients(functools.partial(compute, "xla"), [*exact, bias], structure)
    found = value_and_gradients(functools.partial(compute, "flash"), [*inputs, bias], structure)
    for theirs, ours in zip(expected, found):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=8e-2, rtol=5e-2)
