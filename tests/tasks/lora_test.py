"""Low-rank adapters: what they change, what they leave alone, and what is kept for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import bert
from research.optimizer import make_optimizer
from research.step import init_state, train_step
from research.tasks.classification import Classification
from research.tasks.lora import LoRA

ENCODER = bert.Encoder(
    vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=8,
    dropout=0.0, attention_dropout=0.0, initializer_range=0.2,
)  # fmt: skip
BASE = Classification(bert.SequenceClassifier(ENCODER, num_outputs=3, head_dropout=0.0))
TARGETS = ("layers/.*/kernel$",)
BATCH = {
    "input_ids": np.arange(32, dtype=np.int32).reshape(4, 8),
    "attention_mask": np.ones((4, 8), np.int32),
    "label": np.arange(4, dtype=np.int32) % 3,
    "mask": np.ones(4, np.float32),
}
SPEC = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in BATCH.items()}
RNG = jax.random.key(0)


def trained(task, steps=3, **settings):
    """Returns the states before and after a few steps."""
    optimizer = make_optimizer(10, 1e-2, freeze=("^base/",), weight_decay=0.1, **settings)
    before = jax.jit(lambda: init_state(task, optimizer, SPEC, 0))()
    step, after = jax.jit(lambda state, batch: train_step(task, optimizer, state, batch)), before
    for _ in range(steps):
        after, _ = step(after, BATCH)
    return before, after


def test_new_adapters_change_nothing():
    task = LoRA(BASE, TARGETS)
    params = jax.jit(lambda: task.init(RNG, SPEC))()
    plain = {**params["base"]}
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(task.merge(params)), jax.tree.leaves(plain)))
    np.testing.assert_array_equal(task.loss(params, BATCH, RNG)[0].total, BASE.loss(plain, BATCH, RNG)[0].total)


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_beside_and_the_base_stays(rslora):
    task = LoRA(BASE, TARGETS, rank=4, rslora=rslora, whole=("^head_",))
    before, after = trained(task)
    same = jax.tree.map(np.array_equal, before.params["base"], after.params["base"])
    assert all(jax.tree.leaves(same))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before.params["lora"], after.params["lora"])))
    assert not np.array_equal(
        before.params["whole"]["head_output"]["kernel"], after.params["whole"]["head_output"]["kernel"]
    )
    beside, merged = (
        f.loss(p, BATCH, RNG)[0].total for f, p in ((task, after.params), (BASE, task.merge(after.params)))
    )
    np.testing.assert_allclose(beside, merged, rtol=1e-5)
    assert abs(merged - BASE.loss(task.merge(before.params), BATCH, RNG)[0].total) > 1e-3


def test_the_optimizer_keeps_nothing_of_the_base():
    _, after = trained(LoRA(BASE, TARGETS, rank=2), steps=1)
    state, matrices = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (after.opt_state, after.params["lora"]))
    assert state == 2 * matrices + 8  # two moments, two counts


def test_dropout_acts_on_the_adapters_alone():
    task = LoRA(BASE, TARGETS, rank=2, dropout=0.5)
    params = jax.jit(lambda: task.init(RNG, SPEC))()
    losses = [float(task.loss(params, BATCH, jax.random.key(i))[0].total) for i in range(2)]
    assert losses[0] == losses[1]  # B is zero
    params = {**params, "lora": jax.tree.map(jnp.ones_like, params["lora"])}
    losses = [float(task.loss(params, BATCH, jax.random.key(i))[0].total) for i in range(2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("targets", [("layers/.*/kernal$",), ("layers/.*/bias$",), ("embedding$",)])
def test_a_target_that_is_no_kernel_is_an_error(targets):
    with pytest.raises(UserError, match="targets"):
        jax.eval_shape(lambda: LoRA(BASE, targets).init(RNG, SPEC))
