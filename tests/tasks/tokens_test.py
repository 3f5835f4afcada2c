"""The loss of token objectives: chunks, masks and packing must not change it."""

import functools

import jax
import numpy as np
import pytest

from research.errors import UserError
from research.models import gpt
from research.tasks import cross_entropy, tokens
from research.tasks.causal_lm import CausalLM

V, B, T = 23, 3, 10


def model(**options):
    sizes = {"vocab_size": V, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    return gpt.Decoder(**sizes, positions="rotary", initializer_range=0.3, **options)


def batch(seed=0, length=T, rows=B):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V, (rows, length + 1)).astype(np.int32)
    return {
        "input_ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "target_mask": (rng.random((rows, length)) < 0.7).astype(np.float32),
        "mask": np.array([1, 1, 0][:rows], np.float32),
    }


def spec(rows):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in rows.items()}


@functools.cache
def params():
    return jax.jit(lambda: CausalLM(model()).init(jax.random.key(0), spec(batch())))()


def gradient(task, rows):
    return jax.jit(jax.value_and_grad(lambda p: task.loss(p, rows, jax.random.key(0))[0].total))(params())


def test_the_loss_is_the_mean_over_the_targets_that_count():
    rows = batch()
    logits = jax.jit(model().apply)({"params": params()}, rows["input_ids"])
    log_p = jax.nn.log_softmax(logits)
    weights = rows["target_mask"] * rows["mask"][:, None]
    expected = -np.take_along_axis(np.asarray(log_p), rows["targets"][..., None], 2)[..., 0]
    metrics = jax.jit(CausalLM(model()).metrics)(params(), rows)
    np.testing.assert_allclose(metrics["loss"].compute(), (expected * weights).sum() / weights.sum(), rtol=1e-5)
    right = (np.asarray(logits).argmax(-1) == rows["targets"]) * weights
    np.testing.assert_allclose(metrics["accuracy"].compute(), right.sum() / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 5, 10])
def test_chunks_change_neither_the_loss_nor_the_gradient(chunk):
    loss, gradients = gradient(CausalLM(model()), batch())
    chunked_loss, chunked_gradients = gradient(CausalLM(model(), logits_chunk=chunk), batch())
    np.testing.assert_allclose(chunked_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), chunked_gradients, gradients)


def test_chunks_never_hold_the_logits_of_all_positions():
    rows, wide = batch(length=64), gpt.Decoder(4096, 16, 1, 2, intermediate_size=16, positions="rotary")

    def memory(chunk):
        task = CausalLM(wide, logits_chunk=chunk)
        state = jax.eval_shape(lambda: task.init(jax.random.key(0), spec(rows)))
        step = jax.grad(lambda p: task.loss(p, rows, jax.random.key(0))[0].total)
        return jax.jit(step).lower(state).compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < memory(0) / 3


def test_packed_documents_have_the_loss_of_the_same_documents_apart():
    first, second = batch(1, length=4, rows=1), batch(2, length=6, rows=1)
    packed = {name: np.concatenate([first[name], second[name]], 1) for name in ("input_ids", "targets", "target_mask")}
    packed |= {
        "attention_mask": np.array([[1] * 4 + [2] * 6], np.int32),
        "positions": np.array([[*range(4), *range(6)]], np.int32),
        "mask": np.ones(1, np.float32),
    }
    task = CausalLM(model())
    loss, gradients = gradient(task, packed)
    apart = [gradient(task, rows) for rows in (first, second)]
    np.testing.assert_allclose(loss, sum(loss for loss, _ in apart), rtol=1e-5)
    added = jax.tree.map(np.add, *(gradients for _, gradients in apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, added)


def test_bits_per_byte_counts_the_bytes_of_the_targets():
    rows = batch() | {"target_bytes": np.full((B, T), 3, np.int32)}
    metrics = jax.jit(CausalLM(model()).metrics)(params(), rows)
    np.testing.assert_allclose(metrics["bits_per_byte"].compute(), metrics["loss"].compute() / np.log(2) / 3, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_cross_entropy_with_a_spread_target(smoothing):
    logits = np.random.default_rng(0).normal(size=(4, V)).astype(np.float32)
    targets = np.array([3, 0, 22, 7])
    spread = (1 - smoothing) * np.eye(V)[targets] + smoothing / V
    expected = -(spread * np.asarray(jax.nn.log_softmax(logits))).sum(-1)
    losses, right = cross_entropy.token_losses(logits, targets, smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(right, logits.argmax(-1) == targets)


def test_only_some_positions_need_logits():
    rows, hidden = batch(), np.random.default_rng(0).normal(size=(B, T, 16)).astype(np.float32)
    most = int(rows["target_mask"].sum(1).max())
    every = tokens.score(model(), params(), hidden, rows)
    few = tokens.score(model(), params(), hidden, rows, most=most)
    for name, mean in every.items():
        np.testing.assert_allclose(few[name].compute(), mean.compute(), rtol=1e-5)


def test_what_is_missing_or_too_long_is_said():
    with pytest.raises(UserError, match=r"config.data.features: 'targets' is missing"):
        tokens.check({"input_ids": jax.ShapeDtypeStruct((1, 4), "int32")}, ("input_ids", "targets"))
    with pytest.raises(UserError, match="rows of 10 tokens are longer than the 8 that the model has positions for"):
        CausalLM(gpt.Decoder(V, 16, 1, 2, max_positions=8)).init(jax.random.key(0), spec(batch()))


def plain(task, rows):
    """The loss by its formula, with all logits at once and JAX's own gradient."""

    def loss(p):
        logits = task.model.apply({"params": p}, rows["input_ids"])
        log_p, weights = jax.nn.log_softmax(logits), rows["target_mask"] * rows["mask"][:, None]
        of_target = np.eye(V)[rows["targets"]]
        losses = -(log_p * of_target).sum(-1) + task.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return (losses * weights).sum()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [None, 0, 4])
def test_the_loss_and_its_gradient_are_those_of_all_logits(tied, chunk):
    task, rows = CausalLM(model(tie_embeddings=tied), logits_chunk=chunk, z_loss=0.01), batch()
    values = jax.jit(lambda: task.init(jax.random.key(1), spec(rows)))()
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: task.loss(p, rows, jax.random.key(0))[0].total))(values)
    expected_loss, expected = plain(task, rows)(values)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), err_msg=str(path))


def test_neither_all_logits_nor_their_gradient_exist(monkeypatch):
    monkeypatch.setattr(cross_entropy, "MOST_BYTES", 2**17)
    wide = gpt.Decoder(4096, 16, 1, 2, intermediate_size=16, positions="rotary")
    rows = {name: np.repeat(x, 16, axis=1) for name, x in batch().items() if x.ndim == 2} | {"mask": np.ones(B)}
    shapes = jax.eval_shape(lambda: wide.init(jax.random.key(0), rows["input_ids"])["params"])

    def temporaries(chunk):
        task = CausalLM(wide, logits_chunk=chunk)
        step = jax.jit(jax.grad(lambda p: task.loss(p, rows, jax.random.key(0))[0].total))
        return step.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    every = B * T * 16 * 4096 * 4
    assert temporaries(0) > every
    assert temporaries(None) < every / 2


def test_of_equal_logits_each_is_right_in_its_share():
    _, right = cross_entropy.token_losses(np.array([[1.0, 2.0, 2.0, 0.0]] * 3, np.float32), np.array([0, 1, 2]))
    np.testing.assert_array_equal(right, [0, 0.5, 0.5])


def test_the_block_shrinks_with_the_vocabulary():
    assert cross_entropy.block_size((8, 128, 1000), "float32") == 128
    assert cross_entropy.block_size((32, 1024, 50304), "bfloat16") == 256
    assert cross_entropy.block_size((32, 1024, 50304), "float32") == 147
    assert cross_entropy.block_size((4096, 1024, 250000), "float32") == 1
