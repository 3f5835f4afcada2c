"""Scores over a whole set: every example once, whatever the batch size, and as scikit-learn and scipy compute them."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from research import sharding
from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators.classification import Scores
from research.tasks.classification import Classification

ROWS = 23
LOGITS = np.random.default_rng(0).normal(0, 2, (ROWS, 3)).astype(np.float32)
RNG = np.random.default_rng(1)
LABELS = {
    "softmax": RNG.integers(0, 3, ROWS).astype(np.int32),
    "binary": RNG.integers(0, 2, ROWS).astype(np.int32),
    "sigmoid": RNG.integers(0, 2, (ROWS, 3)).astype(np.float32),
    "regression": (LOGITS[:, 0] + RNG.normal(0, 1, ROWS)).astype(np.float32),
}


class Given(nn.Module):
    """A model that looks its logits up."""

    num_outputs: int

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        return self.param("logits", nn.initializers.zeros, (ROWS, self.num_outputs))[input_ids[:, 0]]


@dataclasses.dataclass(frozen=True)
class Rows:
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"input_ids": np.array([index]), "attention_mask": np.array([1]), "label": self.labels[index]}


def scores(objective, outputs, labels, names, batch_size):
    mesh = sharding.make_mesh()
    data = Dataset(Rows(labels), ("input_ids", "attention_mask", "label"), batch_size=batch_size)
    evaluator = Scores(Classification(Given(outputs), objective), mesh, data, names)
    return evaluator({"logits": jax.numpy.asarray(LOGITS[:, :outputs])})


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_classes(batch_size):
    labels, predictions = LABELS["softmax"], LOGITS.argmax(axis=1)
    found = scores("softmax", 3, labels, ("accuracy", "macro_f1", "micro_f1", "matthews"), batch_size)
    log_probabilities = LOGITS - scipy.special.logsumexp(LOGITS, axis=1, keepdims=True)
    assert found == pytest.approx(
        {
            "loss": -log_probabilities[np.arange(ROWS), labels].mean(),
            "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
            "macro_f1": sklearn.metrics.f1_score(labels, predictions, average="macro"),
            "micro_f1": sklearn.metrics.f1_score(labels, predictions, average="micro"),
            "matthews": sklearn.metrics.matthews_corrcoef(labels, predictions),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("batch_size", [4, 64])
def test_two_classes(batch_size):
    labels, predictions = LABELS["binary"], LOGITS[:, :2].argmax(axis=1)
    found = scores("softmax", 2, labels, ("f1", "matthews"), batch_size)
    true = ((labels == 1) & (predictions == 1)).sum()
    assert found["f1"] == pytest.approx(2 * true / ((labels == 1).sum() + (predictions == 1).sum()))
    assert found["matthews"] == pytest.approx(np.corrcoef(labels, predictions)[0, 1])
    one = scores("sigmoid", 1, labels, ("accuracy", "f1", "matthews"), batch_size)
    assert one["accuracy"] == pytest.approx(((LOGITS[:, 0] > 0) == labels).mean())
    assert one["f1"] == pytest.approx(sklearn.metrics.f1_score(labels, LOGITS[:, 0] > 0))


@pytest.mark.parametrize("batch_size", [4, 64])
def test_several_labels(batch_size):
    labels, predictions = LABELS["sigmoid"], LOGITS > 0
    found = scores("sigmoid", 3, labels, ("accuracy", "micro_f1", "macro_f1"), batch_size)
    assert found["accuracy"] == pytest.approx((labels == predictions).all(axis=1).mean())
    for average in ("micro", "macro"):
        expected = sklearn.metrics.f1_score(labels, predictions, average=average)
        assert found[f"{average}_f1"] == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_numbers(batch_size):
    labels = LABELS["regression"]
    found = scores("regression", 1, labels, ("pearson", "spearman"), batch_size)
    assert found["loss"] == pytest.approx(((LOGITS[:, 0] - labels) ** 2).mean(), rel=1e-5)
    assert found["pearson"] == pytest.approx(np.corrcoef(LOGITS[:, 0], labels)[0, 1], rel=1e-5)
    ranks = [scipy.stats.rankdata(x) for x in (LOGITS[:, 0], labels)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "outputs", "name"),
    [
        ("softmax", 3, "f1"),
        ("softmax", 2, "pearson"),
        ("sigmoid", 3, "matthews"),
        ("sigmoid", 2, "f1"),
        ("regression", 1, "accuracy"),
        ("softmax", 2, "acuracy"),
    ],
)
def test_scores_that_cannot_be_computed_are_refused_at_once(objective, outputs, name):
    task = Classification(Given(outputs), objective)
    with pytest.raises(UserError, match=f"scores: .*'{name}'"):
        Scores(
            task,
            sharding.make_mesh(),
            Dataset(Rows(LABELS["binary"]), ()),
            ("accuracy",)[: objective != "regression"] + (name,),
        )
