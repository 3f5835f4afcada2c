import itertools
import json

import jax
import numpy as np
import pytest

from research.data import text, tokenizer
from research.data.dataset import Dataset, best_lengths
from research.errors import UserError

WORDS = "the film was long and slow but warm in its own odd way so we stayed until the end of it".split()
FEATURES = ("input_ids", "attention_mask", "token_type_ids", "label", "id")


def make_source(size=103, seed=0):
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 12))) for _ in range(size)]
    return [{"text": text, "label": i % 2, "id": i} for i, text in enumerate(texts)]


def make_dataset(size=103, **arguments):
    ops = (text.Tokenize(tokenizer.byte_level(), max_length=48),)
    return Dataset(make_source(size), FEATURES, ops, **{"batch_size": 8, "window": 4, "length_buckets": 4} | arguments)


def ids(batch):
    return [int(i) for i in batch["id"][batch["mask"] > 0]]


@pytest.mark.parametrize("size", [1, 7, 8, 64, 103])
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_an_epoch_holds_every_example_once(size, batch_size):
    batches = list(make_dataset(size, batch_size=batch_size).epoch())
    assert sorted(i for batch in batches for i in ids(batch)) == list(range(size))
    assert {len(batch["mask"]) for batch in batches} == {batch_size}


@pytest.mark.parametrize("processes", [2, 4])
def test_an_epoch_is_shared_out_among_processes(monkeypatch, processes):
    seen, counts = [], []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        batches = list(make_dataset().epoch())
        seen += [i for batch in batches for i in ids(batch)]
        counts.append(len(batches))
        assert all(len(batch["mask"]) == 8 // processes for batch in batches)
    assert sorted(seen) == list(range(103))
    assert len(set(counts)) == 1  # every process runs the same number of steps


def test_training_epochs_hold_every_example_once_in_new_orders():
    dataset = make_dataset(64, batch_size=8, window=8)
    order = [i for batch in itertools.islice(dataset.batches(), 16) for i in ids(batch)]
    assert sorted(order[:64]) == sorted(order[64:]) == list(range(64))
    assert order[:64] != order[64:]


def test_the_order_is_a_function_of_the_seed():
    def order(seed):
        return [ids(batch) for batch in itertools.islice(make_dataset(seed=seed).batches(), 12)]

    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize("position", [0, 1, 3, 4, 5, 13, 14, 29])
def test_a_restored_iterator_goes_on_exactly(position):
    dataset = make_dataset()
    batches = dataset.batches()
    for _ in range(position):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(10)]
    restored = make_dataset().batches()
    restored.set_state(state)
    for batch in expected:
        other = next(restored)
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_batches_have_few_lengths_and_little_padding():
    dataset = make_dataset(size=2000, batch_size=16, window=50, length_buckets=8)
    batches = list(itertools.islice(dataset.batches(), 125))
    lengths = {batch["input_ids"].shape[1] for batch in batches}
    assert lengths <= set(dataset.lengths)
    assert len(dataset.lengths) <= 8
    places = sum(batch["attention_mask"].size for batch in batches)
    assert 1 - sum(batch["attention_mask"].sum() for batch in batches) / places < 0.1


def test_padding_is_what_the_tokenizer_says_and_nothing_real_is_cut():
    dataset = make_dataset()
    source = make_source()
    for batch in dataset.epoch():
        for row, mask, i, real in zip(batch["input_ids"], batch["attention_mask"], batch["id"], batch["mask"]):
            if real:
                assert (row[mask == 0] == 0).all()
                expected = tokenizer.byte_level().truncated(48).backend.encode(source[i]["text"]).ids
                assert row[mask == 1].tolist() == expected


def test_spec_is_the_largest_batch():
    dataset = make_dataset()
    assert dataset.spec["input_ids"].shape == (8, 48)
    assert dataset.spec["label"].shape == dataset.spec["mask"].shape == (8,)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_best_lengths_pad_least(count):
    measured = np.random.default_rng(count).integers(1, 13, 60).tolist()

    def cost(lengths):
        return sum(min(length for length in lengths if length >= m) for m in measured)

    found = best_lengths(measured, count, 12)
    every = (c for n in range(count) for c in itertools.combinations(range(1, 12), n))
    assert cost(found) == min(cost((*c, 12)) for c in every)
    assert found[-1] == 12


def test_explicit_lengths_need_room():
    assert make_dataset(length_buckets=(16, 48)).lengths == (16, 48)
    with pytest.raises(UserError, match="no room for max_length 48"):
        _ = make_dataset(length_buckets=(16, 32)).lengths


def test_a_missing_feature_is_named():
    dataset = Dataset(make_source(), ("input_ids", "lable"), (text.Tokenize(tokenizer.byte_level()),))
    with pytest.raises(UserError, match="no 'lable'; did you mean 'label'"):
        next(dataset.batches())


def test_a_missing_text_is_named():
    dataset = Dataset([{"txt": "a", "label": 0}], FEATURES, (text.Tokenize(tokenizer.byte_level()),))
    with pytest.raises(UserError, match="no text 'text'; did you mean 'txt'"):
        next(dataset.batches())


def test_random_ops_are_a_function_of_seed_and_position():
    def noise(example, rng):
        return {"noise": rng.normal(size=2).astype(np.float32), "id": example["id"]}

    def drawn(seed, start=0):
        batches = Dataset(make_source(40), ("noise", "id"), (noise,), batch_size=4, seed=seed).batches()
        return np.stack([b["noise"] for b in itertools.islice(batches, start, 25)])

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert (drawn(0) != drawn(1)).any()
    assert len(np.unique(drawn(0))) == drawn(0).size  # also the second epoch draws anew
