import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import directions, optimizer, schedules
from research.build import build, invoke
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
    chosen = optimizer.make_optimizer(**{"num_steps": 10, "learning_rate": 0.1, "schedule": "constant"} | arguments)
    state = chosen.init(params)
    for _ in range(steps):
        updates, state = chosen.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_linear_schedule_is_that_of_the_usual_fine_tuning_loop():
    rate = schedules.make_schedule("linear", 5e-5, 0.1, 100, 0.0)
    for i in range(101):
        expected = 5e-5 * (i / 10 if i < 10 else (100 - i) / 90)
        assert float(rate(i)) == pytest.approx(expected, abs=1e-10)


def test_step_schedule_drops_once():
    rate = schedules.make_schedule("step", 1e-4, 10, 300, 0.1, drop_at=2 / 3)
    assert [float(rate(step)) for step in (5, 10, 199, 200, 299)] == pytest.approx([5e-5, 1e-4, 1e-4, 1e-5, 1e-5])
    for name, drop_at in (("step", None), ("step", 1.5), ("cosine", 0.5)):
        with pytest.raises(UserError, match="drop_at: schedule 'step' needs it"):
            schedules.make_schedule(name, 1e-4, 0, 300, 0.1, drop_at)


def test_cosine_and_inverse_square_root_schedules():
    cosine = schedules.make_schedule("cosine", 1.0, 10, 110, 0.1)
    assert float(cosine(10)) == pytest.approx(1.0)
    assert float(cosine(60)) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert float(cosine(110)) == pytest.approx(0.1)
    inverse = schedules.make_schedule("inverse_sqrt", 1.0, 16, 1000, 0.0)
    for i in (1, 8, 16, 64, 400):
        assert float(inverse(i)) == pytest.approx(min(i / 16, math.sqrt(16 / i)), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "liner"}, "did you mean 'linear'"),
        ({"warmup": 11}, "11 steps do not fit a run of 10"),
        ({"warmup": 1.5}, "neither a number of steps nor a share in [0, 1)"),
        ({"b1": 1.5}, "optimizer.b1"),
        ({"microbatches": 0}, "optimizer.microbatches"),
        ({"direction": optax.scale_by_lion(), "b1": 0.5}, "optimizer.b1: it is AdamW's"),
        ({"direction": optax.lion(1e-3)}, "applies a learning rate already"),
        ({"moment_dtype": "bfloat61"}, "did you mean 'bfloat16'"),
        ({"average": 0.9, "schedule_free": 0.9}, "set one of the two"),
        ({"decay_share": 0.1}, "schedule 'constant' takes none; wsd, wsd_sqrt do"),
        ({"schedule": "wsd", "warmup": 0.5, "decay_share": 0.6}, "do not fit behind 5 of warm-up"),
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
    chosen = optimizer.make_optimizer(
        10, 0.1, direction=optax.trace(0.5), schedule="constant", clip_norm=None, freeze=("^head/",)
    )
    params, state = PARAMS, chosen.init(PARAMS)
    for _ in range(2):
        updates, state = chosen.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    found, gradients = params["encoder"]["layers"]["mlp"]["kernel"], GRADIENTS["encoder"]["layers"]["mlp"]["kernel"]
    np.testing.assert_allclose(found, 1 - 0.1 * (1 + 1.5) * gradients, rtol=1e-5)
    np.testing.assert_array_equal(params["head"]["kernel"], 1)


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
    chosen = optimizer.make_optimizer(10, 0.1, schedule="constant", clip_norm=None, layer_decay=0.5)
    updates, _ = chosen.update(params, chosen.init(params), params)
    np.testing.assert_allclose(updates["word"]["embedding"], -0.1 * 0.0625, rtol=1e-5)
    np.testing.assert_allclose(updates["decoder"]["layers"]["mlp"]["kernel"][:, 0], [-0.0125, -0.025, -0.05], rtol=1e-5)
    np.testing.assert_allclose(updates["norm_out"]["scale"], -0.1, rtol=1e-5)


def test_layer_decay_reaches_a_first_block_that_stands_beside_the_stack():
    encoder = {name: {"mlp": {"kernel": jnp.ones((3, 2))}} for name in ("first", "layers")}
    params = {"encoder": encoder | {"norm_in": {"scale": jnp.ones(2)}, "norm_out": {"scale": jnp.ones(2)}}}
    chosen = optimizer.make_optimizer(10, 0.1, schedule="constant", clip_norm=None, layer_decay=0.5)
    updates = chosen.update(params, chosen.init(params), params)[0]["encoder"]
    np.testing.assert_allclose(updates["first"]["mlp"]["kernel"], -0.1 * 0.0625, rtol=1e-5)
    np.testing.assert_allclose(updates["layers"]["mlp"]["kernel"][:, 0], [-0.0125, -0.025, -0.05], rtol=1e-5)
    np.testing.assert_allclose(updates["norm_in"]["scale"], -0.1 * 0.0625, rtol=1e-5)
    np.testing.assert_allclose(updates["norm_out"]["scale"], -0.1, rtol=1e-5)


def test_layer_decay_reaches_what_an_image_is_embedded_by():
    model = vit.ImageClassifier(vit.Encoder(4, 2, 1, 8, 3, 2, 8), num_outputs=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    chosen = optimizer.make_optimizer(10, 0.1, schedule="constant", clip_norm=None, layer_decay=0.5)
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
    ours = optimizer.make_optimizer(8, 0.01, "linear", warmup=2, weight_decay=0.1, clip_norm=1.0)
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


def test_warm_up_stable_decay_schedules():
    linear = schedules.make_schedule("wsd", 1.0, 10, 100, 0.1, decay_share=0.2)
    root = schedules.make_schedule("wsd_sqrt", 1.0, 10, 100, decay_share=0.2)
    for rate in (linear, root):
        assert [float(rate(step)) for step in (0, 5, 10, 50, 80)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert [float(linear(step)) for step in (90, 100, 120)] == pytest.approx([0.55, 0.1, 0.1])
    assert [float(root(step)) for step in (85, 100, 120)] == pytest.approx([0.5, 0, 0])


# Every direction is what a config's section says, so that none needs a line of code.
DIRECTIONS = {
    "adamw": {},
    "adamw, half-precision moment": {"moment_dtype": "bfloat16"},
    "lion": {"direction": {"call": "optax.scale_by_lion", "b1": 0.9}, "learning_rate": 0.003},
    "adafactor": {"direction": {"call": "research.directions.adafactor", "min_dim_size_to_factor": 4}},
    "muon": {"direction": {"call": "research.directions.muon"}},
    "momentum": {"direction": {"call": "optax.trace", "decay": 0.9}, "learning_rate": 0.05},
    "schedule-free": {"schedule_free": 0.9, "b1": 0.0, "schedule": "constant"},
    "nadam": {"direction": {"call": "optax.scale_by_adam", "nesterov": True}},
}


def made(name, num_steps=100, **more):
    """Returns the optimizer of a config's section."""
    section = {"learning_rate": 0.02, "weight_decay": 1e-4} | DIRECTIONS[name] | more
    arguments = build(section, "config.optimizer")
    return invoke(optimizer.make_optimizer, arguments, "config.optimizer", num_steps=num_steps)


def network(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[-2] ** -0.5  # noqa: E731
    layers = {"up": {"kernel": normal(2, 8, 16), "bias": jnp.zeros((2, 16))}, "down": {"kernel": normal(2, 16, 8)}}
    return {"layers": layers, "head": {"kernel": normal(8, 4)}}


def outputs(params, x):
    for i in range(2):
        layer = jax.tree.map(lambda p: p[i], params["layers"])  # noqa: B023
        x += jnp.tanh(x @ layer["up"]["kernel"] + layer["up"]["bias"]) @ layer["down"]["kernel"]
    return x @ params["head"]["kernel"]


def loss(params, x, y):
    return jnp.square(outputs(params, x) - y).mean()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_direction_trains_around_frozen_parameters(name):
    x = jax.random.normal(jax.random.key(1), (64, 8))
    y = outputs(network(2), x)
    chosen, params = made(name, freeze=("up/bias$",)), network()
    state = chosen.init(params)

    @jax.jit
    def step(params, state):
        updates, state = chosen.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    before = loss(params, x, y)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(optimizer.evaluation_params(params, state), x, y) < 0.3 * before
    np.testing.assert_array_equal(params["layers"]["up"]["bias"], 0)


def test_muon_orthogonalises_every_layer_alone_and_leaves_the_rest_to_adam():
    chosen, params = directions.muon(consistent_rms=None), network()
    gradients = jax.tree.map(lambda p: p + 0.1, params)
    together, _ = chosen.update(gradients, chosen.init(params), params)
    for i in range(2):
        alone = {"layers": jax.tree.map(lambda p: p[i : i + 1], params["layers"])}  # noqa: B023
        mine = {"layers": jax.tree.map(lambda p: p[i : i + 1], gradients["layers"])}  # noqa: B023
        updates, _ = chosen.update(mine, chosen.init(alone), alone)
        for part in ("up", "down"):
            kernel = together["layers"][part]["kernel"][i]
            np.testing.assert_allclose(kernel, updates["layers"][part]["kernel"][0], atol=1e-5)
            singular = jnp.linalg.svd(kernel, compute_uv=False) / math.sqrt(max(1, kernel.shape[1] / kernel.shape[0]))
            assert 0.5 < singular.min() <= singular.max() < 1.5
    np.testing.assert_allclose(jnp.abs(together["head"]["kernel"]), 1, rtol=1e-3)  # Adam's first step


def test_adafactor_is_that_of_optax_layer_by_layer():
    params = {"layers": {"kernel": network()["layers"]["up"]["kernel"]}}
    gradients = jax.tree.map(jnp.sin, params)
    ours = directions.adafactor(min_dim_size_to_factor=4)
    updates, state = ours.update(gradients, ours.init(params), params)
    theirs = optax.adafactor(min_dim_size_to_factor=4)
    for i in range(2):
        alone, mine = (jax.tree.map(lambda p: p[i], tree) for tree in (params, gradients))  # noqa: B023
        expected, _ = theirs.update(mine, theirs.init(alone), alone)
        np.testing.assert_allclose(updates["layers"]["kernel"][i], -expected["layers"]["kernel"], rtol=1e-5)
    assert max(x.size for x in jax.tree.leaves(state)) == 2 * 16  # rows and columns, no whole second moment


def test_a_first_moment_in_half_precision_takes_half_the_memory():
    _, state = step(moment_dtype="bfloat16")
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    assert {x.dtype.name for x in jax.tree.leaves(adam.mu)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(adam.nu)} == {"float32"}
