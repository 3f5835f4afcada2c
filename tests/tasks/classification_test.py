"""The objectives against their formulas, written out in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import bert
from research.tasks.classification import Classification


class Given(nn.Module):
    """A model whose logits are its parameters: input_ids [B, 1] picks a row."""

    num_outputs: int
    rows: int = 8

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        table = self.param("logits", nn.initializers.normal(2.0), (self.rows, self.num_outputs))
        return table[input_ids[:, 0]]


def setup(objective, num_outputs, labels, mask=None, rows=6, **fields):
    task = Classification(Given(num_outputs), objective, **fields)
    logits = np.random.default_rng(0).normal(0, 3, (8, num_outputs)).astype(np.float32)
    batch = {
        "input_ids": jnp.arange(rows, dtype=jnp.int32)[:, None],
        "attention_mask": jnp.ones((rows, 1), jnp.int32),
        "label": jnp.asarray(labels),
        "mask": jnp.ones(rows) if mask is None else jnp.asarray(mask, jnp.float32),
    }
    return task, {"logits": jnp.asarray(logits)}, batch, logits[:rows].astype(np.float64)


def loss(task, params, batch):
    total, metrics = task.loss(params, batch, jax.random.key(0))
    evaluated = task.metrics(params, batch)
    if not task.label_smoothing:
        np.testing.assert_allclose(evaluated["loss"].compute(), total.compute(), rtol=1e-6)
    return float(total.compute()), {name: float(value.compute()) for name, value in metrics.items()}


CLASSES = np.array([0, 2, 1, 1, 0, 2], np.int32)
ON = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]], np.float32)


def test_softmax_is_the_textbook_cross_entropy():
    task, params, batch, logits = setup("softmax", 3, CLASSES)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found, metrics = loss(task, params, batch)
    assert found == pytest.approx(-np.log(probabilities[np.arange(6), CLASSES]).mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((probabilities.argmax(axis=1) == CLASSES).mean())


def test_label_smoothing_spreads_a_share_of_the_target():
    task, params, batch, logits = setup("softmax", 3, CLASSES, label_smoothing=0.3)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = np.full((6, 3), 0.1)
    targets[np.arange(6), CLASSES] += 0.7
    assert loss(task, params, batch)[0] == pytest.approx(-(targets * log_probabilities).sum(axis=1).mean(), rel=1e-5)
    plain = setup("softmax", 3, CLASSES)
    np.testing.assert_allclose(
        task.metrics(params, batch)["loss"].compute(), plain[0].metrics(plain[1], plain[2])["loss"].compute()
    )


@pytest.mark.parametrize("unknown", [3, -1])
def test_an_unknown_class_is_no_number(unknown):
    labels = np.where(np.arange(6) == 1, unknown, CLASSES)
    task, params, batch, _ = setup("softmax", 3, labels, label_smoothing=0.1)
    assert np.isnan(loss(task, params, batch)[0])
    hidden = batch | {"mask": jnp.asarray(np.arange(6) != 1, jnp.float32)}
    assert np.isfinite(loss(task, params, hidden)[0])


def binary_cross_entropy(logits, labels):
    p = 1 / (1 + np.exp(-logits))
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p))


def test_sigmoid_is_the_textbook_binary_cross_entropy_of_several_labels():
    task, params, batch, logits = setup("sigmoid", 3, ON)
    found, metrics = loss(task, params, batch)
    assert found == pytest.approx(binary_cross_entropy(logits, ON).mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(((logits > 0) == ON).mean())


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_sigmoid_on_one_output(shape):
    labels = np.array([1, 0, 0, 1, 1, 0], np.int32).reshape(shape)
    task, params, batch, logits = setup("sigmoid", 1, labels, label_names=("no", "yes"))
    expected = binary_cross_entropy(logits[:, 0], labels.reshape(6)).mean()
    assert loss(task, params, batch)[0] == pytest.approx(expected, rel=1e-5)
    outputs = task.predict(params, batch, jax.random.key(0))
    np.testing.assert_array_equal(outputs["label"], logits[:, 0] > 0)
    described = task.describe({name: np.asarray(value[0]) for name, value in outputs.items()})
    assert described["label"] == ("yes" if logits[0, 0] > 0 else "no")
    assert sum(described["probabilities"].values()) == pytest.approx(1)


def test_sigmoid_does_not_overflow():
    task, _, batch, _ = setup("sigmoid", 1, np.array([1, 0, 1, 0, 1, 0], np.int32))
    params = {"logits": jnp.full((8, 1), 500.0)}
    assert loss(task, params, batch)[0] == pytest.approx(250)
    assert np.isfinite(jax.grad(lambda p: task.loss(p, batch, jax.random.key(0))[0].total)(params)["logits"]).all()


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_is_the_squared_error(outputs):
    labels = np.random.default_rng(1).normal(size=(6, outputs)).astype(np.float32)
    task, params, batch, logits = setup("regression", outputs, labels[:, 0] if outputs == 1 else labels)
    assert loss(task, params, batch)[0] == pytest.approx(((logits - labels) ** 2).mean(), rel=1e-5)
    described = task.describe({"logits": logits[0]})
    assert described == {"value": logits[0, 0] if outputs == 1 else list(logits[0])}


@pytest.mark.parametrize(
    ("objective", "outputs", "labels"),
    [("softmax", 3, CLASSES), ("sigmoid", 3, ON), ("regression", 1, ON[:, 0])],
)
def test_masked_rows_count_nothing_even_where_they_are_nan(objective, outputs, labels):
    mask = [1, 0, 1, 1, 0, 0]
    task, params, batch, _ = setup(objective, outputs, labels, mask)
    broken = {"logits": params["logits"].at[jnp.array([1, 4, 5])].set(jnp.nan)}
    kept = [i for i, m in enumerate(mask) if m]
    few = batch | {name: batch[name][jnp.array(kept)] for name in batch}
    found, metrics = loss(task, broken, batch)
    expected, expected_metrics = loss(task, params, few)
    assert found == pytest.approx(expected, rel=1e-6)
    assert metrics == pytest.approx(expected_metrics)
    assert float(task.loss(broken, batch, jax.random.key(0))[0].count) == 3


def test_predict():
    task, params, batch, logits = setup("softmax", 3, CLASSES, label_names=("a", "b", "c"))
    outputs = task.predict(params, batch, jax.random.key(0))
    np.testing.assert_allclose(outputs["probabilities"].sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(outputs["label"], logits.argmax(axis=1))
    described = task.describe({name: np.asarray(value[0]) for name, value in outputs.items()})
    assert described["label"] == "abc"[logits[0].argmax()]
    several = setup("sigmoid", 3, ON, label_names=("a", "b", "c"))
    outputs = several[0].predict(several[1], several[2], jax.random.key(0))
    described = several[0].describe({name: np.asarray(value[0]) for name, value in outputs.items()})
    assert described["label"] == [name for name, logit in zip("abc", several[3][0]) if logit > 0]


@pytest.mark.parametrize(
    ("fields", "outputs", "message"),
    [
        ({"objective": "softmx"}, 2, "unknown 'softmx'; did you mean 'softmax'"),
        ({"label_smoothing": 1.0}, 2, "must lie in"),
        ({"label_smoothing": 0.1, "objective": "regression"}, 1, "only objective 'softmax' smooths"),
        ({"label_smoothing": 0.1, "objective": "sigmoid"}, 2, "only objective 'softmax' smooths"),
        ({"label_names": ("a", "b", "c")}, 2, "2 outputs for 3 labels"),
        ({}, 1, "'softmax' needs 2 or more"),
    ],
)
def test_fields_that_do_not_go_together(fields, outputs, message):
    with pytest.raises(UserError, match=message):
        Classification(Given(outputs), **fields)


def spec(**changes):
    shapes = {"input_ids": ((4, 9), "int32"), "attention_mask": ((4, 9), "int32"), "label": ((4,), "int32")} | changes
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items() if shape}


@pytest.mark.parametrize(
    ("objective", "outputs", "changes", "message"),
    [
        ("softmax", 2, {"label": None}, "config.data.features: 'label' is missing"),
        ("softmax", 2, {"input_ids": None}, "config.data.features: 'input_ids' is missing"),
        ("softmax", 2, {"attention_mask": None}, "config.data.features: 'attention_mask' is missing"),
        ("softmax", 2, {"label": ((4,), "float32")}, r"takes class numbers, integers \[B\]; the labels are float32"),
        ("softmax", 2, {"label": ((4, 2), "int32")}, r"the labels are int32 \[B, C\]"),
        ("sigmoid", 2, {}, "takes 2 numbers an example"),
        ("sigmoid", 2, {"label": ((4, 3), "float32")}, "takes 2 numbers an example"),
        ("regression", 2, {"label": ((4,), "float32")}, "takes 2 numbers an example"),
        ("softmax", 2, {"input_ids": ((4, 10), "int32")}, "max_length 10 is more than the 9 tokens"),
    ],
)
def test_features_that_do_not_fit(objective, outputs, changes, message):
    encoder = bert.Encoder(16, 8, 1, 2, 16, max_positions=9)
    task = Classification(bert.SequenceClassifier(encoder, num_outputs=outputs), objective)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: task.init(jax.random.key(0), spec(**changes)))


def test_token_types_are_not_taken_for_the_mask():
    encoder = bert.Encoder(16, 8, 1, 2, 16, max_positions=9)
    task = Classification(bert.SequenceClassifier(encoder, num_outputs=2))
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": jnp.asarray(rng.integers(1, 16, (4, 9)), jnp.int32),
        "attention_mask": jnp.ones((4, 9), jnp.int32).at[:, 5:].set(0),
        "label": jnp.zeros(4, jnp.int32),
        "mask": jnp.ones(4),
    }
    params = jax.jit(lambda: task.init(jax.random.key(0), spec()))()
    zeros = batch | {"token_type_ids": jnp.zeros((4, 9), jnp.int32)}
    np.testing.assert_array_equal(
        task.predict(params, batch, jax.random.key(0))["logits"],
        task.predict(params, zeros, jax.random.key(0))["logits"],
    )
