"""The loss of words against its formula, and entities put in words."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.tasks.token_classification import TokenClassification, spans

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


class Given(nn.Module):
    """A model whose logits are its parameters: each token has a row."""

    num_outputs: int = 5

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        return self.param("logits", nn.initializers.normal(2.0), (8, self.num_outputs))[input_ids]


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "input_ids": jnp.asarray(rng.integers(0, 8, (3, 6)), jnp.int32),
        "attention_mask": jnp.ones((3, 6), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, 5, (3, 6)), jnp.int32),
        "target_mask": jnp.asarray([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]]),
        "mask": jnp.array([1.0, 1.0, 0.0]),
    }


@pytest.fixture(scope="module")
def params():
    return {"logits": jnp.asarray(np.random.default_rng(1).normal(0, 2, (8, 5)), jnp.float32)}


def test_loss_is_the_mean_over_the_words_of_real_rows(batch, params):
    logits = np.asarray(params["logits"], np.float64)[batch["input_ids"]]
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    kept = [(0, 1), (0, 2), (0, 4), (1, 1)]
    targets = np.asarray(batch["targets"])
    task = TokenClassification(Given())
    loss, scores = task.loss(params, batch, jax.random.key(0))
    assert float(loss.count) == 4
    assert float(loss.compute()) == pytest.approx(-np.mean([log_probabilities[p][targets[p]] for p in kept]), rel=1e-5)
    hits = np.mean([logits[p].argmax() == targets[p] for p in kept])
    assert float(scores["accuracy"].compute()) == pytest.approx(hits)
    metrics = task.metrics(params, batch)
    assert float(metrics["loss"].compute()) == pytest.approx(float(loss.compute()))
    outputs = task.predict(params, batch, jax.random.key(0))
    np.testing.assert_array_equal(outputs["label"], logits.argmax(axis=-1))
    np.testing.assert_allclose(outputs["probability"], np.exp(log_probabilities).max(axis=-1), rtol=1e-5)


def test_entities_in_words():
    task = TokenClassification(Given(), NAMES)
    row = {"words": ["Ann", "Lee", "saw", "Rome", "\u200b"], "first_tokens": np.array([1, 2, 4, 5, -1])}
    found = task.describe_rows([row], [{"label": np.array([3, 1, 2, 3, 0, 3, 4])}])
    assert found == {
        "labels": ["B-PER", "I-PER", "O", "B-LOC", "O"],
        "entities": [
            {"label": "PER", "text": "Ann Lee", "start": 0, "end": 2},
            {"label": "LOC", "text": "Rome", "start": 3, "end": 4},
        ],
    }
    assert task.describe({"label": np.array([0, 1])}) == {"labels": ["O", "B-PER"]}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-X I-X O", [("X", 0, 2)]),
        ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
        ("I-X I-X", [("X", 0, 2)]),
        ("O I-X I-Y", [("X", 1, 2), ("Y", 2, 3)]),
        ("B-X I-Y I-Y", [("X", 0, 1), ("Y", 1, 3)]),
        ("B-X-Z I-X-Z", [("X-Z", 0, 2)]),
        ("B-X I-X E-X S-X S-X I-X", [("X", 0, 3), ("X", 3, 4), ("X", 4, 5), ("X", 5, 6)]),
    ],
)
def test_spans(labels, expected):
    assert spans(labels.split()) == expected


def test_mistakes(batch):
    with pytest.raises(UserError, match=r"config\.task\.model.num_outputs: 4 outputs for 5 labels"):
        TokenClassification(Given(4), NAMES)
    spec = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()}
    assert TokenClassification(Given(), NAMES).init(jax.random.key(0), spec)["logits"].shape == (8, 5)
    spec.pop("targets")
    with pytest.raises(UserError, match=r"config\.data\.features: 'targets' is missing"):
        TokenClassification(Given(), NAMES).init(jax.random.key(0), spec)
