"""Written texts are scored against their own references, in whatever order they were written."""

import dataclasses

import flax.linen as nn
import pytest

from research import sharding
from research.data import tokenizer
from research.data.dataset import Dataset
from research.data.source import examples
from research.data.text import Tokenize
from research.errors import UserError
from research.evaluators import text_scores
from research.evaluators.generation import Generation


class Nothing(nn.Module):
    """A model of one unused parameter."""


@dataclasses.dataclass(frozen=True)
class Repeat:
    """A task that writes what it read, in capitals where a parameter says so."""

    tokenizer: tokenizer.Tokenizer
    model: nn.Module = dataclasses.field(default_factory=Nothing)

    def predict(self, params, batch, rng):
        return {"tokens": batch["input_ids"]}

    def describe(self, output):
        text = self.tokenizer.backend.decode([int(i) for i in output["tokens"]], skip_special_tokens=True)
        return {"prediction": text}


TEXTS = ["a long text about a cat", "dog", "one bird and two birds", "", "naïve 映画", "a fish that swims very fast"]
TARGETS = ["a long text about a dog", "dog", "one bird and three birds", "x", "naïve 映画", ["a fish", "two fish"]]


def make(batch_size=2, **fields):
    bytes_ = tokenizer.byte_level()
    source = examples([{"text": text, "target": target} for text, target in zip(TEXTS, TARGETS)])
    data = Dataset(
        source, ("input_ids", "attention_mask"), (Tokenize(bytes_, max_length=64),), batch_size, length_buckets=2
    )
    return Generation(Repeat(bytes_), sharding.make_mesh(), data, **fields)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_predictions_meet_their_references(batch_size):
    names = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "f1")
    evaluator = make(batch_size, scores=names)
    assert evaluator.predictions({}) == TEXTS
    references = [[target] if isinstance(target, str) else target for target in TARGETS]
    assert evaluator.references == references
    found = evaluator({})
    assert found == {name: text_scores.SCORES[name](TEXTS, references) for name in names}
    assert all(type(value) is float for value in found.values())
    assert found["exact_match"] == pytest.approx(2 / 6)


def test_the_first_examples_only_and_another_field():
    evaluator = make(max_examples=3, scores=("exact_match",), reference="text")
    assert evaluator.predictions({}) == TEXTS[:3]
    assert evaluator({}) == {"exact_match": 1.0}
    assert make(max_examples=100).predictions({}) == TEXTS


def test_the_signature_is_said(caplog):
    caplog.set_level("INFO")
    evaluator = make(max_examples=3, scores=("bleu", "rouge1"))
    evaluator({})
    assert set(evaluator.signatures) == {"bleu"}
    assert evaluator.signatures["bleu"].startswith("nrefs:1|case:mixed")
    assert f"sacreBLEU's signature of bleu: {evaluator.signatures['bleu']}" in caplog.text
    assert "predicted: a long text about a cat" in caplog.text


def test_it_gives_up_when_asked():
    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make()({}, check)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scores": ("blue",)}, "scores: unknown score 'blue'; did you mean 'bleu'"),
        ({"max_examples": 0}, "max_examples: 0 must be at least 1"),
        ({"reference": "tagret"}, "reference: examples have no 'tagret'; did you mean 'target'"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError, match=message):
        make(**fields)({})
