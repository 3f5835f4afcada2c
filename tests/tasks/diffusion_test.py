"""What a diffusion task teaches and draws, with models that say what they are told to say, and with a small DiT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.data.shapes import shapes
from research.errors import UserError
from research.generation.diffusion import Flow, Gaussian, Sampling
from research.models.dit import DiT
from research.tasks.diffusion import Diffusion

SIZES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_classes": 3}
SIZES |= {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
PROCESSES = {"epsilon": Gaussian(), "v": Gaussian("cosine", "v"), "flow": Flow()}
SAMPLERS = {"epsilon": "ddim", "v": "ddim", "flow": "euler"}


class Says(DiT):
    """Says a number for each class, whatever it sees."""

    @nn.compact
    def __call__(self, image, time, label):
        said = self.param("said", nn.initializers.normal(1.0), (self.num_classes + 1,))
        x = jnp.broadcast_to(said[label][:, None, None, None], image.shape)
        variance = self.param("variance", nn.initializers.normal(0.3), (1,)) if self.learned_variance else None
        return x if variance is None else jnp.concatenate([x, jnp.broadcast_to(variance, x.shape)], axis=-1)


def batch(size=4, seed=0, mask=None):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.uniform(-1, 1, (size, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 3, size).astype(np.int32),
        "mask": np.ones(size, np.float32) if mask is None else np.asarray(mask, np.float32),
    }


def spec(size=8, channels=1, dtype="int32", label=()):
    image = jax.ShapeDtypeStruct((4, size, size, channels), jnp.float32)
    return {"image": image, "label": jax.ShapeDtypeStruct((4, *label), dtype)}


def task(process="epsilon", model=DiT, learned_variance=False, **fields):
    fields = {"sampling": Sampling(SAMPLERS[process])} | fields
    return Diffusion(model(**SIZES, learned_variance=learned_variance), PROCESSES[process], **fields)


def begin(tasks, noise=0.0):
    """Returns new parameters, none of which is 0 where there is noise."""
    params = jax.jit(lambda key: tasks.init(key, spec()))(jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + noise * rng.normal(size=x.shape).astype(np.float32), params)


def numbers(means):
    return {name: float(mean.compute()) for name, mean in means.items()}


@pytest.mark.parametrize("process", PROCESSES)
def test_the_loss_is_the_squared_error_of_what_is_to_be_said(process):
    """Of a new model, which says 0: the mean square of the target."""
    tasks = task(process)
    params, rows = begin(tasks), batch(256)
    loss, parts = jax.jit(tasks.loss)(params, rows, jax.random.key(1))
    assert parts == {}
    power = np.square(rows["image"]).mean()  # a third
    wanted = {"epsilon": 1.0, "v": 0.5 * (1 + power), "flow": 1 + power}[process]
    assert float(loss.compute()) == pytest.approx(wanted, rel=0.04)
    assert float(loss.count) == 256


def test_the_hybrid_loss():
    tasks, rows = task(model=Says, learned_variance=True), batch(8)
    params = begin(tasks)

    @jax.jit
    def parts(params):
        loss, parts = tasks.loss(params, rows, jax.random.key(1))
        return {"loss": loss.compute()} | {name: mean.compute() for name, mean in parts.items()}

    found, teaches = parts(params), jax.jit(jax.jacrev(parts))(params)
    assert float(found["loss"]) == pytest.approx(float(found["squared_error"] + 1e-3 * found["bound"]), rel=1e-5)
    assert not teaches["bound"]["said"].any()
    assert not teaches["squared_error"]["variance"].any()
    np.testing.assert_allclose(teaches["loss"]["said"], teaches["squared_error"]["said"], rtol=1e-4)
    np.testing.assert_allclose(teaches["loss"]["variance"], 1e-3 * teaches["bound"]["variance"], rtol=1e-4)


def test_labels_are_dropped():
    tasks, rows = task(model=Says, label_dropout=0.25), batch(400)
    params = begin(tasks)

    def heard(key):
        labels = []
        spy = lambda next_, args, kwargs, context: labels.append(args[2]) or next_(*args, **kwargs)  # noqa: E731
        with nn.intercept_methods(spy):
            tasks.loss(params, rows, key)
        return np.asarray(labels[0])

    first, other = heard(jax.random.key(0)), heard(jax.random.key(1))
    assert (first == 3).mean() == pytest.approx(0.25, abs=0.06)
    assert ((first == 3) != (other == 3)).any()
    np.testing.assert_array_equal(first[first != 3], rows["label"][first != 3])


@pytest.mark.parametrize("unknown", [SIZES["num_classes"], -1])
def test_an_unknown_class_is_not_taken_for_none(unknown):
    tasks, rows = task(label_dropout=0.0), batch(4)
    params = begin(tasks, 0.1)
    wrong = rows | {"label": np.where(np.arange(4) == 0, unknown, rows["label"])}
    assert np.isnan(numbers(tasks.metrics(params, wrong))["loss"])
    assert np.isnan(float(tasks.loss(params, wrong, jax.random.key(0))[0].compute()))


def test_evaluation_is_repeatable_and_knows_no_batch():
    tasks, rows = task("v"), batch(6)
    params = begin(tasks, 0.1)
    metrics = jax.jit(tasks.metrics)
    whole = metrics(params, rows)
    assert numbers(whole) == numbers(metrics(params, rows))
    halves = [metrics(params, {name: x[part] for name, x in rows.items()}) for part in (slice(0, 3), slice(3, 6))]
    assert float(whole["loss"].total) == pytest.approx(sum(float(half["loss"].total) for half in halves), rel=1e-5)
    filled = rows | {"mask": np.array([1, 1, 1, 0, 0, 0], np.float32)}
    assert numbers(metrics(params, filled)) == pytest.approx(numbers(halves[0]), rel=1e-5)


@pytest.mark.parametrize("process", PROCESSES)
def test_guidance_goes_beyond_the_label(process):
    """A model that says a number for each class, guided, is one that says the guided number."""
    tasks, label = task(process, Says), np.array([0, 1, 2], np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"said": jnp.array([0.1, -0.2, 0.3, 0.05])}

    def draw(params, guidance, label=label):
        sampling = Sampling(SAMPLERS[process], 4, guidance=guidance)
        return jax.jit(lambda p: tasks.draw(p, label, keys, sampling))(params)

    beyond = {"said": 0.05 + 2.5 * (params["said"] - 0.05)}
    np.testing.assert_allclose(draw(params, 2.5), draw(beyond, 1.0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(draw(params, 0.0), draw(params, 1.0, np.full(3, 3, np.int32)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(draw(params, 1.0), draw(params, 1.0 + 1e-7), rtol=1e-5, atol=1e-5)
    assert np.abs(draw(params, 2.5) - draw(params, 1.0)).max() > 1e-2


def test_images_are_functions_of_the_seed_and_the_class():
    tasks = task("v", label_dropout=0.1, sampling=Sampling("ddpm", 3, guidance=2.0, clip=True))
    params = begin(tasks, 0.1)
    predict = jax.jit(tasks.predict)
    rows = batch()
    one = predict(params, rows, jax.random.key(0))["image"]
    assert one.shape == (4, 8, 8, 1)
    assert np.abs(one).max() <= 1
    np.testing.assert_array_equal(one, predict(params, rows, jax.random.key(0))["image"])
    assert np.abs(one - predict(params, rows, jax.random.key(1))["image"]).max() > 0.1
    other = rows | {"label": (rows["label"] + 1) % 3}
    assert np.abs(one - predict(params, other, jax.random.key(0))["image"]).max() > 1e-3


@pytest.mark.parametrize(("process", "learned_variance"), [("epsilon", True), ("v", False), ("flow", False)])
def test_it_learns_drawn_shapes(process, learned_variance):
    source = shapes(24, size=8, channels=1)
    image = np.stack([source[i]["image"] for i in range(24)]).astype(np.float32) / 127.5 - 1
    rows = {"image": image, "label": np.array([source[i]["label"] for i in range(24)]), "mask": np.ones(24)}
    tasks = task(process, learned_variance=learned_variance)
    params = begin(tasks)
    optimizer = optax.adam(3e-3)
    before = numbers(jax.jit(tasks.metrics)(params, rows))

    def step(carry, key):
        params, state = carry
        gradients = jax.grad(lambda p: tasks.loss(p, rows, key)[0].compute())(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    params, _ = train((params, optimizer.init(params)), jax.random.split(jax.random.key(1), 60))
    after = numbers(jax.jit(tasks.metrics)(params, rows))
    assert after["loss"] < 0.8 * before["loss"]
    assert ("bound" in after) == learned_variance
    if learned_variance:
        assert after["bound"] < before["bound"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(label_dropout=1.0), "config.task.label_dropout: 1.0 must lie in"),
        (lambda: task("flow", learned_variance=True), "learned_variance: a flow has no variance"),
        (lambda: task(label_names=("a", "b")), "num_classes: 3 classes for 2 labels"),
        (lambda: task("flow", sampling=Sampling()), "sampling.sampler: 'ddim' does not fit"),
        (lambda: task(label_dropout=0.0, sampling=Sampling(guidance=2.0)), "sampling.guidance: the model is not train"),
        (lambda: task().init(jax.random.key(0), spec(size=16)), "it is for images of 8 x 8 x 1; .* 16 x 16 x 1"),
        (lambda: task().init(jax.random.key(0), spec(dtype="float32")), "labels must be class numbers"),
        (
            lambda: task().init(jax.random.key(0), {"image": spec()["image"]}),
            "config.data.features: 'label' is missing",
        ),
        (lambda: task().predict({}, {"image": None}, None), "--mode=predict: .* --mode=generate draws images"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
