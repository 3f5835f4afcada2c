"""Numbers beside the rows of a dataset: each stays with its own row, wherever that goes."""

import itertools

import jax
import numpy as np
import pytest

from research.data.beside import ROW, beside, count, numbered
from research.data.dataset import Dataset
from research.data.mixture import Joined, make_mixture
from research.errors import UserError

FEATURES = ("tokens", "place")


class Pieces:
    """Makes of an example as many rows as it says, of several lengths, and none of some."""

    padding = {"tokens": 0}  # noqa: RUF012
    max_length = 9

    def __call__(self, example):
        start = example["start"]
        return [
            {"tokens": np.full(1 + (start + i) % 9, start + i, np.int32), "place": start + i}
            for i in range(example["count"])
        ]


def examples(first, size):
    return [{"start": first + 10 * i, "count": i % 4} for i in range(size)]


def places(source):
    return [example["start"] + i for example in source for i in range(example["count"])]


def make(source, **options):
    return Dataset(source, FEATURES, (Pieces(),), **{"batch_size": 4, "window": 3, "length_buckets": 2} | options)


SOURCES = {
    "one": lambda: examples(0, 20),
    "joined": lambda: Joined({"a": examples(0, 10), "b": examples(100, 14)}),
    "mixed": lambda: make_mixture({"a": examples(0, 10), "b": examples(100, 14)}, {"a": 1.0, "b": 2.0}, 0, 1.0),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_row_has_its_own_number(kind):
    data = make(SOURCES[kind]())
    found = np.full(count(data), -1, np.int32)
    for batch in numbered(data).epoch():
        real = batch["mask"] > 0
        assert (found[batch[ROW][real]] == -1).all()  # each row once
        found[batch[ROW][real]] = batch["place"][real]
    sources = SOURCES[kind]()
    wanted = places(sources) if kind == "one" else [p for part in sources.sources.values() for p in places(part)]
    assert found.tolist() == wanted

    made = beside(data, {"half": found.astype(np.float32) / 2})
    plain = list(itertools.islice(data.batches(), 40))
    for batch, expected in zip(itertools.islice(made.batches(), 40), plain):
        np.testing.assert_array_equal(batch["half"], batch["place"] / 2)
        assert set(batch) == {*expected, "half"}
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])
    assert made.spec["half"] == jax.ShapeDtypeStruct((4,), "float32")
    assert {name: x for name, x in made.spec.items() if name != "half"} == data.spec


def test_processes_get_the_numbers_of_their_own_rows(monkeypatch):
    data = beside(make(examples(0, 20)), {"half": np.array(places(examples(0, 20)), np.float32) / 2})
    seen = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        for batch in data.epoch():
            real = batch["mask"] > 0
            assert len(real) == 2
            np.testing.assert_array_equal(batch["half"][real], batch["place"][real] / 2)
            seen += batch["place"][real].tolist()
    assert sorted(seen) == places(examples(0, 20))


def test_processes_that_read_have_the_numbers():
    data = beside(make(examples(0, 20), workers=1), {"half": np.array(places(examples(0, 20)), np.float32) / 2})
    for batch in data.epoch():
        real = batch["mask"] > 0
        np.testing.assert_array_equal(batch["half"][real], batch["place"][real] / 2)
    data._pool.close()


def test_rows_that_are_others_in_every_epoch_have_none():
    def drawn(example, rng):
        return {"tokens": rng.integers(0, 5, 3), "place": example["start"]}

    with pytest.raises(UserError, match=r"config.data.ops: one draws"):
        numbered(Dataset(examples(0, 4), ("place",), (drawn,)))
    with pytest.raises(UserError, match=r"config.data.pack: packed rows"):
        numbered(Dataset(examples(0, 4), ("tokens",), (Pieces(),), pack=16))
