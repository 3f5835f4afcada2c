"""Low-rank adapters and vectors: what they change, what they leave alone, and what is kept for them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import bert, layers
from research.optimizer import make_optimizer
from research.step import init_state, train_step
from research.tasks.classification import Classification
from research.tasks.ia3 import IA3
from research.tasks.lora import LoRA, magnitudes

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


KINDS = {
    "lora": lambda base, **more: LoRA(base, TARGETS, rank=4, **more),
    "rslora": lambda base, **more: LoRA(base, TARGETS, rank=4, rslora=True, **more),
    "dora": lambda base, **more: LoRA(base, TARGETS, rank=4, dora=True, **more),
    "ia3": lambda base, **more: IA3(base, ("layers/(attention/.*|mlp/up)/kernel$",), ("mlp/down/kernel$",), **more),
}


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing(kind):
    task = KINDS[kind](BASE)
    params = jax.jit(lambda: task.init(RNG, SPEC))()
    plain = {**params["base"]}
    for a, b in zip(jax.tree.leaves(task.merge(params)), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, rtol=2e-7)  # of equal norms, one may be compiled to another last bit
    np.testing.assert_allclose(
        task.loss(params, BATCH, RNG)[0].total,
        BASE.loss(plain, BATCH, RNG)[0].total,
        rtol=0 if kind != "dora" else 1e-6,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_beside_and_the_base_stays(kind):
    task = KINDS[kind](BASE, whole=("^head_",))
    before, after = trained(task)
    same = jax.tree.map(np.array_equal, before.params["base"], after.params["base"])
    assert all(jax.tree.leaves(same))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before.params[task.part], after.params[task.part])))
    assert not np.array_equal(
        before.params["whole"]["head_output"]["kernel"], after.params["whole"]["head_output"]["kernel"]
    )
    beside, merged = (
        f.loss(p, BATCH, RNG)[0].total for f, p in ((task, after.params), (BASE, task.merge(after.params)))
    )
    np.testing.assert_allclose(beside, merged, rtol=1e-5)
    assert abs(merged - BASE.loss(task.merge(before.params), BATCH, RNG)[0].total) > 1e-3


LAYER = {
    "lora": LoRA(BASE, ("kernel$",), rank=2),
    "dora": LoRA(BASE, ("kernel$",), rank=2, dora=True),
    "outputs": IA3(BASE, targets=("kernel$",)),
    "inputs": IA3(BASE, feedforward=("kernel$",)),
}


@pytest.mark.parametrize("kind", LAYER)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_they_act_before_the_activation(kind, dtype, tolerance):
    layer, task, x = layers.Dense(6, dtype=dtype), LAYER[kind], jax.random.normal(RNG, (5, 4))
    params = {"kernel": jax.random.normal(jax.random.key(1), (4, 6)), "bias": jnp.linspace(-1, 1, 6)}
    own = {name: y + 0.5 * jax.random.normal(RNG, y.shape) for name, y in task.new(params, RNG).items()}
    with nn.intercept_methods(task.intercept):
        found = layer.apply({"params": params | own}, x, jnp.tanh)
    wanted = layers.Dense(6).apply({"params": task.add(dict(params), own)}, x, jnp.tanh)
    assert found.dtype == dtype
    assert jnp.abs(wanted - layers.Dense(6).apply({"params": params}, x, jnp.tanh)).max() > 0.2
    np.testing.assert_allclose(found.astype(np.float32), wanted, atol=tolerance)


def test_magnitudes_begin_as_those_of_the_weights_that_were_read():
    task = LoRA(BASE, TARGETS, dora=True)
    read = jax.tree.map(lambda x: 2 * x + 1, jax.jit(lambda: BASE.init(RNG, SPEC))())
    shapes = jax.eval_shape(lambda: task.init(RNG, SPEC))
    loaded = jax.tree.map(lambda x: None if isinstance(x, jax.ShapeDtypeStruct) else x, {**shapes, **task.divide(read)})
    params = init_state(task, make_optimizer(10, 1e-2, freeze=("^base/",)), SPEC, 0, loaded).params
    query = params["lora"]["encoder"]["layers"]["attention"]["query"]
    kernel = read["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert query["lora_magnitude"].shape == (2, 16)
    np.testing.assert_allclose(query["lora_magnitude"], np.linalg.norm(kernel, axis=1), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), task.merge(params), read)


def test_columns_have_the_magnitudes_that_trained_and_zero_ones_stay_zero():
    task = LoRA(BASE, TARGETS, dora=True)
    params = jax.jit(lambda: task.init(RNG, SPEC))()
    flat = params["base"]["encoder"]["layers"]["mlp"]["up"]
    flat["kernel"] = flat["kernel"].at[..., 0].set(0.0)
    params = task.start(params)
    own = params["lora"]["encoder"]["layers"]["mlp"]["up"]
    own["lora_magnitude"] = 3 * own["lora_magnitude"]
    kernel = task.merge(params)["encoder"]["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(magnitudes(kernel), own["lora_magnitude"], rtol=1e-5)
    assert not kernel[..., 0].any()
    gradient = jax.grad(lambda p: task.loss(p, BATCH, RNG)[0].total)(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


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


def test_a_wrong_vector_is_an_error():
    both = ("layers/mlp/.*/kernel$",)
    for settings, message in (
        ({"targets": both, "feedforward": both}, "feedforward: .* is among the targets too"),
        ({"feedforward": ("mlp/dwn/kernel$",)}, "feedforward: 'mlp/dwn/kernel.' finds no parameter"),
        ({"targets": both, "whole": ("mlp/up",)}, "whole: .* is among the targets too"),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda settings=settings: IA3(BASE, **settings).init(RNG, SPEC))
    with pytest.raises(UserError, match="name at least one"):
        IA3(BASE)
