import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import optimizer, step
from research.models import bert
from research.tasks.classification import Classification


def make_task(dropout=0.0):
    encoder = bert.Encoder(
        vocab_size=50,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_positions=16,
        dropout=dropout,
        attention_dropout=dropout,
    )
    return Classification(bert.SequenceClassifier(encoder, 3, head_dropout=dropout))


def make_batch(size=8, length=6, mask=None, seed=0):
    random = np.random.default_rng(seed)
    batch = {
        "input_ids": random.integers(1, 50, (size, length)),
        "attention_mask": np.ones((size, length), np.int32),
        "label": random.integers(0, 3, size),
        "mask": np.ones(size, np.float32) if mask is None else np.asarray(mask, np.float32),
    }
    return {name: jnp.asarray(value) for name, value in batch.items()}


# Compiled: one program takes a fraction of the time of hundreds of operations that are compiled one by one.
train_step = jax.jit(step.train_step, static_argnums=(0, 1))
gradients = jax.jit(step._gradients, static_argnums=(0, 4))


def start(task, chosen, batch, seed=0):
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    return jax.jit(lambda: step.init_state(task, chosen, spec, seed))()


def one_step(batch, microbatches=1, task=None, seed=0):
    task = task or make_task()
    chosen = optimizer.make_optimizer(10, 0.1, "constant", microbatches=microbatches)
    return train_step(task, chosen, start(task, chosen, batch, seed), batch)


@pytest.mark.parametrize("microbatches", [2, 4, 8])
@pytest.mark.parametrize("mask", [None, [1, 1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]])
def test_accumulated_gradients_are_those_of_the_whole_batch(microbatches, mask):
    batch, task, rng = make_batch(mask=mask), make_task(), jax.random.key(0)
    params = start(task, optimizer.make_optimizer(10, 0.1), batch).params
    whole, whole_metrics = gradients(task, params, batch, rng, 1)
    parts, parts_metrics = gradients(task, params, batch, rng, microbatches)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale), whole, parts)
    for name in whole_metrics:
        np.testing.assert_allclose(whole_metrics[name].compute(), parts_metrics[name].compute(), rtol=1e-6)


def test_filling_rows_change_nothing():
    full = make_batch(size=4)
    filled = {k: jnp.concatenate([v, v[:2] * 0 if k == "mask" else v[:2]]) for k, v in full.items()}
    (a, metrics_a), (b, metrics_b) = one_step(full), one_step(filled)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a.params, b.params)
    np.testing.assert_allclose(metrics_a["loss"].compute(), metrics_b["loss"].compute(), rtol=1e-6)


def test_an_empty_batch_leaves_finite_parameters():
    state, _ = one_step(make_batch(mask=[0] * 8))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


def test_dropout_is_a_function_of_seed_and_step():
    batch, task = make_batch(), make_task(dropout=0.5)
    chosen = optimizer.make_optimizer(10, 0.0, "constant")
    run = functools.partial(train_step, task, chosen)
    first = start(task, chosen, batch)
    second, metrics = run(first, batch)
    losses = [float(metrics["loss"].compute()) for metrics in (metrics, run(first, batch)[1], run(second, batch)[1])]
    assert losses[0] == losses[1]  # the same state draws the same
    assert losses[0] != losses[2]  # nothing was learnt at rate 0; only the draws differ
    assert int(second.step) == 1


def test_a_batch_is_learnt_by_heart():
    batch, task = make_batch(), make_task()
    chosen = optimizer.make_optimizer(60, 3e-3, "constant")
    state = start(task, chosen, batch)
    run = jax.jit(functools.partial(step.train_step, task, chosen), donate_argnums=0)
    losses = []
    for _ in range(60):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"].compute()))
    assert losses[0] > 0.8
    assert losses[-1] < 0.2


def test_loaded_parameters_take_the_place_of_new_ones():
    batch, task = make_batch(), make_task()
    chosen = optimizer.make_optimizer(10, 0.1, average=0.5)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    new = step.init_state(task, chosen, spec, 0)
    loaded = jax.tree.map(lambda p: jnp.full_like(p, 7.0), new.params) | {"head_output": {"kernel": None, "bias": None}}
    state = step.init_state(task, chosen, spec, 0, loaded)
    np.testing.assert_array_equal(state.params["head_dense"]["kernel"], 7.0)
    np.testing.assert_array_equal(state.params["head_output"]["kernel"], new.params["head_output"]["kernel"])
    averaged = optimizer.evaluation_params(state.params, state.opt_state)
    assert averaged is not state.params
    jax.tree.map(np.testing.assert_array_equal, averaged, state.params)
