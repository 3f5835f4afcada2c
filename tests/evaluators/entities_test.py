"""Entities: cases worked out by hand, every sentence once however batches are cut, and equality with seqeval."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.data import tokenizer
from research.data.dataset import Dataset
from research.data.source import examples
from research.data.token_classification import AlignLabels
from research.evaluators.entities import Entities, score
from research.tasks.token_classification import TokenClassification

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def test_score_by_hand():
    right = ["B-PER I-PER O B-LOC".split(), "O O".split(), "B-LOC B-LOC".split()]
    predicted = ["B-PER I-PER O B-PER".split(), "B-LOC O".split(), "B-LOC I-LOC".split()]
    # right: PER 0-2, LOC 3, LOC 0, LOC 1; predicted: PER 0-2, PER 3, LOC 0, LOC 0-2; one in common
    assert score(right, predicted) == pytest.approx(
        {"accuracy": 5 / 8, "precision": 1 / 4, "recall": 1 / 4, "f1": 1 / 4, "f1_PER": 2 / 3, "f1_LOC": 0}
    )
    assert score([["O"]], [["O"]]) == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0}


class Letters(nn.Module):
    """A model that knows the label by the byte: its parameters are the label of every byte."""

    num_outputs: int = 5

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        return self.param("logits", nn.initializers.zeros, (260, self.num_outputs))[input_ids]


SENTENCES = [
    (["p", "q", "x"], [1, 2, 0]),
    (["x"], [0]),
    (["l", "x", "x", "l", "m", "x", "p", "x", "x", "l"], [3, 0, 0, 3, 4, 0, 1, 0, 0, 3]),
    (["p", "m"], [1, 3]),
    (["x", "x"], [0, 1]),
]
GUESS = {"p": 1, "q": 2, "x": 0, "l": 3, "m": 4}


def evaluate(max_length, batch_size):
    bytes_ = tokenizer.byte_level()
    source = examples([{"tokens": words, "ner": labels} for words, labels in SENTENCES], {"ner": NAMES})
    features = ("input_ids", "attention_mask", "targets", "target_mask")
    data = Dataset(source, features, (AlignLabels(bytes_, max_length=max_length),), batch_size, length_buckets=2)
    logits = np.zeros((260, 5), np.float32)
    for letter, label in GUESS.items():
        logits[bytes_.backend.token_to_id(letter), label] = 5
    evaluator = Entities(TokenClassification(Letters(), NAMES), sharding.make_mesh(), data)
    return evaluator({"logits": jnp.asarray(logits)})


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_sentence_once(batch_size):
    found = evaluate(64, batch_size)
    loss = found.pop("loss")
    right = [[NAMES[label] for label in labels] for _, labels in SENTENCES]
    assert found == pytest.approx(score(right, [[NAMES[GUESS[word]] for word in words] for words, _ in SENTENCES]))
    wrong = 2 / 18
    rest = np.log(np.exp(5) + 4)
    assert loss == pytest.approx((1 - wrong) * (rest - 5) + wrong * rest, rel=1e-5)


def test_words_that_were_cut_off_count():
    found = evaluate(9, 2)  # 7 bytes: 4 words
    right = [[NAMES[label] for label in labels] for _, labels in SENTENCES]
    predicted = [[NAMES[GUESS[w]] if i < 4 else "O" for i, w in enumerate(words)] for words, _ in SENTENCES]
    assert {k: v for k, v in found.items() if k != "loss"} == pytest.approx(score(right, predicted))


@pytest.mark.peers
def test_score_is_that_of_seqeval():
    metrics = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(0)
    labels = [*NAMES, "B-ORG", "I-ORG"]
    lengths = rng.integers(1, 12, 300)
    right, predicted = ([[labels[i] for i in rng.integers(0, 7, n)] for n in lengths] for _ in range(2))
    predicted = [a if rng.random() < 0.5 else b for a, b in zip(right, predicted)]
    found = score(right, predicted)
    for name in ("accuracy", "precision", "recall", "f1"):
        theirs = getattr(metrics, {"accuracy": "accuracy_score"}.get(name, f"{name}_score"))
        assert found[name] == pytest.approx(theirs(right, predicted))
    kinds = metrics.f1_score(right, predicted, average=None)
    assert [found[f"f1_{kind}"] for kind in ("LOC", "ORG", "PER")] == pytest.approx(kinds)
