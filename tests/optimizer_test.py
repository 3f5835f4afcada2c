import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import optimizer
from research.errors import UserError
from research.models import vit

PARAMS = {
    "encoder": {
        "embeddings": {"word": {"embedding": jnp.ones((5, 4))}},
        "layers": {"mlp": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}},
    },
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}
GRADIENTS = jax.tree.map(lambda p: 0.5 * p, PARAMS)


def step(gradients=GRADIENTS, params=PARAMS, steps=1, **arguments):
    """Returns the parameters after some steps of the same gradient, and the optimizer's state."""
    chosen = optimizer.adamw(**{"num_steps": 10, "learning_rate": 0.1, "schedule": "constant"} | arguments)
    state = chosen.init(params)
    for _ in range(steps):
        updates, state = chosen.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_linear_schedule_is_that_of_the_usual_fine_tuning_loop():
    rate = optimizer.make_schedule("linear", 5e-5, 0.1, 100, 0.0)
    for i in range(101):
        expected = 5e-5 * (i / 10 if i < 10 else (100 - i) / 90)
        assert float(rate(i)) == pytest.approx(expected, abs=1e-10)


def test_step_schedule_drops_once():
    rate = optimizer.make_schedule("step", 1e-4, 10, 300, 0.1, drop_at=2 / 3)
    assert [float(rate(step)) for step in (5, 10, 199, 200, 299)] == pytest.approx([5e-5, 1e-4, 1e-4, 1e-5, 1e-5])
    for name, drop_at in (("step", None), ("step", 1.5), ("cosine", 0.5)):
        with pytest.raises(UserError, match="drop_at: schedule 'step' needs it"):
            optimizer.make_schedule(name, 1e-4, 0, 300, 0.1, drop_at)


def test_cosine_and_inverse_square_root_schedules():
    cosine = optimizer.make_schedule("cosine", 1.0, 10, 110, 0.1)
    assert float(cosine(10)) == pytest.approx(1.0)
    assert float(cosine(60)) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert float(cosine(110)) == pytest.approx(0.1)
    inverse = optimizer.make_schedule("inverse_sqrt", 1.0, 16, 1000, 0.0)
    for i in (1, 8, 16, 64, 400):
        assert float(inverse(i)) == pytest.approx(min(i / 16, math.sqrt(16 / i)), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "liner"}, "did you mean 'linear'"),
        ({"warmup": 11}, "11 steps do not fit a run of 10"),
        ({"warmup": 1.5}, "must lie in [0, 1)"),
        ({"b1": 1.5}, "optimizer.b1"),
        ({"microbatches": 0}, "optimizer.microbatches"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError) as caught:
        step(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["freeze", "learning_rate_multipliers"])
def test_a_pattern_that_finds_nothing_is_an_error(key):
    value = ("encodr/",) if key == "freeze" else (("encodr/", 0.5),)
    with pytest.raises(UserError, match=f"optimizer.{key}: 'encodr/' finds no parameter"):
        step(**{key: value})


def test_the_first_step_of_adam_moves_by_the_learning_rate():
    params, _ = step(clip_norm=None)
    for leaf in jax.tree.leaves(params):
        np.testing.assert_allclose(leaf, 0.9, rtol=1e-6)


def test_decay_spares_biases_and_norms():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    params, _ = step(gradients=zero, weight_decay=0.5)
    np.testing.assert_allclose(params["head"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(params["head"]["bias"], 1)
    np.testing.assert_array_equal(params["encoder"]["layers"]["mlp"]["bias"], 1)


def test_clipping_scales_to_the_norm():
    clipped = []
    norm = float(optax.tree.norm(GRADIENTS))
    for scale in (1.0, 10.0):
        gradients = jax.tree.map(lambda g, s=scale: s * g, GRADIENTS)
        _, state = step(gradients=gradients, clip_norm=norm / 2)
        clipped.append(optax.tree.get(state, "mu"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *clipped)


def test_one_layer_of_a_stack_can_be_frozen():
    params, _ = step(freeze=(r"layers/[01]/", r"^head/kernel"), weight_decay=0.1, steps=2)
    kernel = np.asarray(params["encoder"]["layers"]["mlp"]["kernel"])
    np.testing.assert_array_equal(kernel[:2], 1)
    assert (kernel[2] != 1).all()
    np.testing.assert_array_equal(params["head"]["kernel"], 1)
    assert (np.asarray(params["head"]["bias"]) != 1).all()


def test_frozen_gradients_do_not_count_in_the_norm_nor_need_moments():
    huge = GRADIENTS | {"head": jax.tree.map(lambda g: 1e6 * g, GRADIENTS["head"])}
    plain, _ = step(gradients=GRADIENTS, freeze=("^head/",))
    other, state = step(gradients=huge, freeze=("^head/",))
    jax.tree.map(np.testing.assert_array_equal, plain, other)
    assert isinstance(optax.tree.get(state, "mu")["head"]["kernel"], optax.MaskedNode)


def test_momentum_sums_shrinking_gradients():
    chosen = optimizer.sgd(10, 0.1, momentum=0.5, schedule="constant", clip_norm=None, freeze=("^head/",))
    params, state = PARAMS, chosen.init(PARAMS)
    for _ in range(2):
        updates, state = chosen.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    found, gradients = params["encoder"]["layers"]["mlp"]["kernel"], GRADIENTS["encoder"]["layers"]["mlp"]["kernel"]
    np.testing.assert_allclose(found, 1 - 0.1 * (1 + 1.5) * gradients, rtol=1e-5)
    np.testing.assert_array_equal(params["head"]["kernel"], 1)
    with pytest.raises(UserError, match=r"config\.optimizer\.momentum: 2 must lie in"):
        optimizer.sgd(10, 0.1, momentum=2)


def test_layer_decay_falls_from_the_head_down():
    params, _ = step(layer_decay=0.5, clip_norm=None)
    moved = jax.tree.map(lambda p: 1 - p, params)
    np.testing.assert_allclose(moved["head"]["kernel"], 0.1, rtol=1e-5)
    for layer, factor in enumerate((0.125, 0.25, 0.5)):
        np.testing.assert_allclose(moved["encoder"]["layers"]["mlp"]["kernel"][layer], 0.1 * factor, rtol=1e-5)
    np.testing.assert_allclose(moved["encoder"]["embeddings"]["word"]["embedding"], 0.1 * 0.0625, rtol=1e-5)


def test_layer_decay_reaches_tables_that_stand_beside_the_layers():
    layers = {"mlp": {"kernel": jnp.ones((3, 2))}}
    params = {"word": {"embedding": jnp.ones(2)}, "decoder": {"layers": layers}, "norm_out": {"scale": jnp.ones(2)}}
    chosen = optimizer.adamw(10, 0.1, schedule="constant", clip_norm=None, layer_decay=0.5)
    updates, _ = chosen.update(params, chosen.init(params), params)
    np.testing.assert_allclose(updates["word"]["embedding"], -0.1 * 0.0625, rtol=1e-5)
    np.testing.assert_allclose(updates["decoder"]["layers"]["mlp"]["kernel"][:, 0], [-0.0125, -0.025, -0.05], rtol=1e-5)
    np.testing.assert_allclose(updates["norm_out"]["scale"], -0.1, rtol=1e-5)


def test_layer_decay_reaches_what_an_image_is_embedded_by():
    model = vit.ImageClassifier(vit.Encoder(4, 2, 1, 8, 3, 2, 8), num_outputs=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    chosen = optimizer.adamw(10, 0.1, schedule="constant", clip_norm=None, layer_decay=0.5)
    moved, _ = chosen.update(jax.tree.map(jnp.ones_like, params), chosen.init(params), params)
    for name in ("patches", "prefix", "position"):
        for leaf in jax.tree.leaves(moved["encoder"][name]):
            np.testing.assert_allclose(leaf, -0.1 * 0.0625, rtol=1e-5)
    np.testing.assert_allclose(
        moved["encoder"]["layers"]["mlp"]["up"]["bias"][:, 0], [-0.0125, -0.025, -0.05], rtol=1e-5
    )
    for leaf in jax.tree.leaves((moved["encoder"]["norm"], moved["head_output"])):
        np.testing.assert_allclose(leaf, -0.1, rtol=1e-5)


def test_multipliers_take_the_first_rule_that_matches():
    rules = ((r"layers/2/mlp/kernel", 3.0), (r"layers/", 0.5))
    params, _ = step(learning_rate_multipliers=rules, clip_norm=None)
    moved = 1 - np.asarray(params["encoder"]["layers"]["mlp"]["kernel"])
    np.testing.assert_allclose(moved[:, 0, 0], [0.05, 0.05, 0.3], rtol=1e-5)


def test_the_average_follows_the_parameters():
    params, state = step(average=0.3, steps=4)
    expected, current = PARAMS, PARAMS
    for i, decay in enumerate((0.1, 2 / 11, 0.25, 0.3), start=1):
        current, _ = step(steps=i)
        expected = jax.tree.map(lambda e, c, d=decay: d * e + (1 - d) * c, expected, current)
    averaged = optimizer.evaluation_params(params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), averaged, expected)
    assert optimizer.evaluation_params(params, step()[1]) is params


def test_initial_parameters_do_not_stay_in_the_average():
    still, start = optimizer.average_params(0.999), {"kernel": jnp.ones(1)}
    state = still.init(start)
    for _ in range(100):
        _, state = still.update({"kernel": jnp.zeros(1)}, state, {"kernel": jnp.zeros(1)})
    assert state.average["kernel"] < 1e-6


@pytest.mark.peers
def test_steps_equal_those_of_pytorch():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    start = random.normal(size=(4, 3)).astype(np.float32)
    gradients = random.normal(size=(8, 4, 3)).astype(np.float32) * 3

    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda i: i / 2 if i < 2 else (8 - i) / 6)
    ours = optimizer.adamw(8, 0.01, "linear", warmup=2, weight_decay=0.1, clip_norm=1.0)
    params = {"kernel": jnp.asarray(start)}
    state = ours.init(params)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        theirs.step()
        schedule.step()
        updates, state = ours.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        # Steps are of 0.01, so this is a ten-thousandth of one: rounding, and no more.
        np.testing.assert_allclose(params["kernel"], weight.detach().numpy(), rtol=0, atol=1e-6)
