"""What says that processes read the same data."""

from research.data import agreement
from research.data.dataset import Dataset


def digest(examples):
    dataset = Dataset(source=examples, ops=(), features=("label",), batch_size=2)
    return agreement.digest(dataset)


def test_the_same_examples_agree_and_others_do_not():
    examples = [{"label": i} for i in range(100)]
    assert digest(examples) == digest(list(examples))
    assert digest(examples[:-1]) != digest(examples)
    assert digest([*examples[:-1], {"label": 5}]) != digest(examples)
    assert digest([{"label": 5}, *examples[1:]]) != digest(examples)


def test_no_examples_agree_with_no_examples_alone():
    assert digest([]) == digest([])
    assert digest([]) != digest([{"label": 0}])
