import itertools
import json
import math

import jax
import numpy as np
import pytest

from research.data import language, text, tokenizer, tokenizer_training
from research.data.batching import best_lengths
from research.data.dataset import Dataset
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
    with pytest.raises(UserError, match="is shorter than the max_length 48"):
        _ = make_dataset(length_buckets=(16, 32)).lengths


def test_a_missing_feature_is_named():
    dataset = Dataset(make_source(), ("input_ids", "lable"), (text.Tokenize(tokenizer.byte_level()),))
    with pytest.raises(UserError, match="no 'lable'; did you mean 'label'"):
        next(dataset.batches())


def test_a_missing_text_is_named():
    dataset = Dataset([{"txt": "a", "label": 0}], FEATURES, (text.Tokenize(tokenizer.byte_level()),))
    with pytest.raises(UserError, match="no text field 'text'; did you mean 'txt'"):
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


@pytest.mark.parametrize("iterate", [Dataset.batches, Dataset.epoch])
def test_what_is_drawn_does_not_depend_on_the_number_of_processes(iterate, monkeypatch):
    def noise(example, rng):
        return {"noise": np.float32(rng.random()), "id": example["id"]}

    def drawn(processes):
        found = {}
        for process in range(processes):
            monkeypatch.setattr(jax, "process_count", lambda: processes)
            monkeypatch.setattr(jax, "process_index", lambda p=process: p)
            batches = iterate(Dataset(make_source(16), ("noise", "id"), (noise,), batch_size=4))
            for batch in itertools.islice(batches, 4):
                found |= dict(zip(batch["id"].tolist(), batch["noise"].tolist()))
        return found

    alone = drawn(1)
    assert len(set(alone.values())) == 16
    assert drawn(2) == alone


def windows(example):
    """Cuts an example into windows of 5 tokens; there may be none."""
    tokens = example["tokens"]
    starts = range(0, len(tokens), 5)
    return [{"input_ids": tokens[s : s + 5], "id": example["id"], "start": s} for s in starts]


windows.padding, windows.max_length = {"input_ids": 0}, 5


def language_model(example):
    tokens = example["tokens"]
    return {"input_ids": tokens, "targets": tokens + 1, "target_mask": np.ones(len(tokens), np.float32)}


language_model.padding = {"input_ids": 0, "targets": 0, "target_mask": 0.0}
PACKED = ("input_ids", "targets", "target_mask", "attention_mask", "positions")


def make_documents(count=100, seed=0, longest=30):
    """Documents of up to `longest` tokens, none twice; a few are empty."""
    lengths = np.random.default_rng(seed).integers(0, longest, count)
    starts = 1 + np.cumsum(lengths) - lengths
    return [{"tokens": np.arange(s, s + n, dtype=np.int32), "id": i} for i, (s, n) in enumerate(zip(starts, lengths))]


def make_packed(count=100, **arguments):
    defaults = {"batch_size": 4, "window": 3, "pack": 16}
    return Dataset(make_documents(count), PACKED, (language_model,), **defaults | arguments)


def make_windows(count=100, **arguments):
    features = ("input_ids", "id", "start")
    return Dataset(make_documents(count), features, (windows,), **{"batch_size": 4, "window": 3} | arguments)


def tokens(batches):
    """Returns all tokens of real rows."""
    return [int(t) for b in batches for row in b["input_ids"][b["mask"] > 0] for t in row if t]


def of_process(monkeypatch, process, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "process_index", lambda: process)


def every_token(count=100):
    return [t for document in make_documents(count) for t in document["tokens"].tolist()]


@pytest.mark.parametrize("make", [make_packed, make_windows])
@pytest.mark.parametrize("count", [1, 9, 100])
def test_an_epoch_of_many_rows_an_example_holds_every_token_once(make, count):
    dataset = make(count)
    batches = list(dataset.epoch())
    assert sorted(tokens(batches)) == every_token(count)
    assert {len(batch["mask"]) for batch in batches} == {4}
    rows = sum(batch["mask"].sum() for batch in batches)
    assert rows <= len(batches) * 4 < rows + 4 * (1 + len(batches) / 2)


@pytest.mark.parametrize("make", [make_packed, make_windows])
def test_processes_share_an_epoch_of_many_rows_an_example(monkeypatch, make):
    alone, parts = list(make().epoch()), []
    for process in range(2):
        of_process(monkeypatch, process, 2)
        parts.append(list(make().epoch()))
    assert len(parts[0]) == len(parts[1]) == len(alone)  # every process runs the same number of steps
    for first, second, whole in zip(*parts, alone):
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), whole[name])


def test_an_epoch_of_packed_rows_is_in_order():
    first = next(make_packed(pack=16).epoch())
    assert first["input_ids"][0, 0] == 1
    heads = first["input_ids"][:, 0]
    assert (np.diff(heads) > 0).all()


@pytest.mark.parametrize("make", [make_packed, make_windows])
def test_training_goes_through_all_tokens_again_and_again(make):
    dataset = make(window=12)
    batches = list(itertools.islice(dataset.batches(), 3 * math.ceil(dataset.size / 4)))
    counts = np.bincount(tokens(batches))[1:]
    assert counts.min() >= 1
    assert counts.max() <= 5
    assert np.mean([batch["mask"].mean() for batch in batches]) > 0.9
    assert tokens(batches[:1]) != tokens(itertools.islice(dataset.epoch(), 1))


@pytest.mark.parametrize("make", [make_packed, make_windows])
@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 5, 7, 11, 40])
def test_many_rows_an_example_resume_exactly(make, position):
    batches = make().batches()
    for _ in range(position):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(9)]
    restored = make().batches()
    restored.set_state(state)
    for batch in expected:
        other = next(restored)
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_packed_order_is_a_function_of_the_seed():
    def order(seed):
        return tokens(itertools.islice(make_packed(seed=seed).batches(), 8))

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_packed_rows_keep_what_belongs_together():
    for batch in itertools.islice(make_packed().batches(), 20):
        real = batch["attention_mask"] > 0
        np.testing.assert_array_equal(batch["targets"][real], batch["input_ids"][real] + 1)
        np.testing.assert_array_equal(batch["target_mask"], real.astype(np.float32))
        assert (batch["input_ids"][~real] == 0).all()
        assert not real[batch["mask"] == 0].any()  # the rows that fill up hold nothing
        follows = (np.diff(batch["attention_mask"]) == 0) & real[:, 1:]
        np.testing.assert_array_equal(np.diff(batch["input_ids"])[follows], 1)
        np.testing.assert_array_equal(np.diff(batch["positions"])[follows], 1)
        assert (batch["positions"][:, 1:][~follows] == 0).all()


def test_packed_spec_and_lengths():
    dataset = make_packed()
    assert dataset.lengths == (16,)
    assert {name: (x.shape, x.dtype) for name, x in dataset.spec.items()} == {
        **dict.fromkeys(PACKED, ((4, 16), np.int32)),
        "target_mask": ((4, 16), np.float32),
        "mask": ((4,), np.float32),
    }
    assert {name: x.shape for name, x in next(dataset.batches()).items()} == {
        k: x.shape for k, x in dataset.spec.items()
    }


def test_a_first_document_without_tokens_does_not_change_the_spec():
    empty = {"tokens": np.zeros(0, np.int32), "id": 0}
    dataset = Dataset([empty, *make_documents()], PACKED, (language_model,), batch_size=4, pack=16)
    assert dataset.spec == make_packed().spec
    with pytest.raises(UserError, match="drop all of the first"):
        _ = Dataset([empty], PACKED, (language_model,), batch_size=4, pack=16).spec


def test_a_window_of_packed_rows_is_about_as_many_batches():
    rows, sizes = 4000, []
    dataset = make_packed(rows, window=10)
    state = dataset.batches()
    for _ in range(40):
        next(state)
        sizes.append(state.get_state()["batch"])
    assert all(8 <= n <= 12 for n, following in itertools.pairwise(sizes) if following == 1)


def test_size_is_the_number_of_rows():
    assert make_dataset().size == 103
    assert make_windows().size == sum(math.ceil(len(d["tokens"]) / 5) for d in make_documents())
    assert make_windows(6000).size == pytest.approx(sum(b["mask"].sum() for b in make_windows(6000).epoch()), rel=0.02)
    packed = make_packed(6000, window=50)
    assert packed.size == pytest.approx(sum(b["mask"].sum() for b in packed.epoch()), rel=0.04)


def test_ops_apply_to_all_that_the_one_before_made():
    def twice(example):
        return [example | {"x": example["x"] * 2}, example | {"x": example["x"] * 2 + 1}]

    def odd(example):
        return [example] if example["x"] % 2 else []

    assert [e["x"] for e in Dataset([], ("x",), (twice, twice)).transform({"x": 1})] == [4, 5, 6, 7]
    dataset = Dataset([{"x": i} for i in range(10)], ("x",), (twice, odd), batch_size=4)
    assert sorted(x for b in dataset.epoch() for x in b["x"][b["mask"] > 0].tolist()) == list(range(1, 20, 2))
    assert dataset.size == 10
    with pytest.raises(UserError, match="drop all of 10 examples"):
        Dataset(dataset.source, ("x",), (twice, odd, lambda example: [])).batches()


def test_an_op_that_makes_lists_now_and_then_is_an_error():
    def op(example):
        return [example, example] if example["x"] == 3 else example

    with pytest.raises(UserError, match="one example became 2, but the first did not become a list"):
        list(Dataset([{"x": i} for i in range(5)], ("x",), (op,), batch_size=2).epoch())


def test_rows_say_what_they_were_made_from():
    documents = make_documents(20)
    made_from, starts = [], []
    for owners, batch in make_windows().rows(documents):
        assert len(owners) == len(batch["id"]) <= 4
        made_from += owners
        starts += batch["start"].tolist()
    assert made_from == [i for i, d in enumerate(documents) for _ in range(0, len(d["tokens"]), 5)]
    assert starts == [s for d in documents for s in range(0, len(d["tokens"]), 5)]


def test_rows_to_predict_for_are_not_packed_together():
    documents = [d for d in make_documents(30) if len(d["tokens"]) <= 16]
    batches = list(make_packed().rows(documents))
    assert [i for owners, _ in batches for i in owners] == list(range(len(documents)))
    rows = [ids[numbers == 1].tolist() for _, b in batches for ids, numbers in zip(b["input_ids"], b["attention_mask"])]
    assert rows == [d["tokens"].tolist() for d in documents]


def translate(example):
    """The source is `source` tokens long, the target `target`; where there is none it is left out."""
    made = {"input_ids": np.full(example["source"], example["id"] + 1), "id": example["id"]}
    if "target" in example:
        target = np.full(example["target"], example["id"] + 1)
        made |= {"decoder_input_ids": target, "targets": target, "target_mask": np.ones(len(target), np.float32)}
    return made


translate.padding = {"input_ids": 0, "decoder_input_ids": 0, "targets": 0, "target_mask": 0.0}
translate.max_length, translate.decoder_max_length = 30, 50
SIDES = ("input_ids", "decoder_input_ids", "targets", "target_mask")
MASKS = ("attention_mask", "positions", "decoder_attention_mask", "decoder_positions")


def make_pairs(count=400):
    random = np.random.default_rng(0)
    sources = random.integers(1, 31, count)
    targets = np.clip(sources * random.uniform(0.8, 1.8, count), 1, 50).astype(int)
    return [{"source": int(s), "target": int(t), "id": i} for i, (s, t) in enumerate(zip(sources, targets))]


def test_the_decoders_side_has_lengths_of_its_own():
    dataset = Dataset(make_pairs(), (*SIDES, "id"), (translate,), batch_size=8, length_buckets=3)
    assert dataset.spec["input_ids"].shape == (8, 30)
    assert dataset.spec["targets"].shape == dataset.spec["target_mask"].shape == (8, 50)
    batches = list(itertools.islice(dataset.batches(), 100))
    shapes = {(b["input_ids"].shape[1], b["targets"].shape[1]) for b in batches}
    assert len(dataset.lengths) == 3
    assert 3 < len(shapes) <= 3 * 3
    assert {b["target_mask"].dtype for b in batches} == {np.dtype(np.float32)}
    for batch in batches:
        for i, source, target in zip(batch["id"], batch["input_ids"], batch["targets"]):
            assert (source > 0).sum() == make_pairs()[i]["source"]
            assert (target > 0).sum() == make_pairs()[i]["target"]
    places = sum(b["targets"].size for b in batches)
    assert sum(b["target_mask"].sum() for b in batches) / places > 0.6  # 0.42 without buckets


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("iterate", [Dataset.batches, Dataset.epoch])
@pytest.mark.parametrize("kind", ["sorted", "two sides", "windows", "packed", "packed pairs", "masked", "spans"])
def test_batches_are_the_same_whatever_the_number_of_processes(kind, iterate, processes, monkeypatch):
    def drawn():
        return list(itertools.islice(iterate(make(kind)), 30))

    alone, parts = drawn(), []
    for process in range(processes):
        of_process(monkeypatch, process, processes)
        parts.append(drawn())
    assert len(alone) > 5
    assert {len(part) for part in parts} == {len(alone)}
    for whole, *shares in zip(alone, *parts):
        for name in whole:  # of one shape too, without a word between the processes
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), whole[name])


def make(kind):
    """Returns a dataset of batches of 4, of which the last ones of an epoch are not full."""
    if kind == "sorted":
        return make_dataset(batch_size=4)
    if kind == "windows":
        return make_windows()
    if kind == "packed":
        return make_packed()
    packed = {"pack": 64, "pack_decoder": 96} if kind == "packed pairs" else {}
    if kind in ("two sides", "packed pairs"):
        return Dataset(
            make_pairs(90), SIDES + (MASKS if packed else ()), (translate,), batch_size=4, window=3, **packed
        )
    own = tokenizer_training.train(make_source(), "wordpiece", 200)
    if kind == "masked":
        ops = (language.Pieces(own, max_length=16), language.MaskTokens(own))
        return Dataset(make_source(), ("input_ids", "targets", "attention_mask"), ops, batch_size=4, window=3)
    own = tokenizer.byte_level(sentinels=20)
    spans = language.SpanCorruption(own, max_length=20, mean_span_length=1.0)
    return Dataset(make_source(40), SIDES, (spans,), batch_size=4, window=3)


def test_every_piece_whose_spans_are_drawn_is_read_once_an_epoch_and_drawn_anew():
    dataset = make("spans")
    rows = dataset.size
    batches = list(dataset.epoch())
    assert sum(batch["mask"].sum() for batch in batches) == rows > 40
    stream = itertools.islice(dataset.batches(), 2 * len(batches))
    inputs = {tuple(row[row > 0]) for batch in stream for row in batch["input_ids"][batch["mask"] > 0]}
    assert len(inputs) > 1.5 * rows


def test_an_op_that_draws_lengths_must_say_so():
    def halves(example, rng):
        return [example, example]

    def longer(example, rng):
        return example | {"input_ids": np.repeat(example["input_ids"], 2)}

    with pytest.raises(UserError, match="makes a list; split it into `prepare`"):
        next(Dataset(make_documents(), ("id",), (halves,), batch_size=2).batches())
    for packed in ({}, {"pack": 16}):
        ops = (language_model, longer) if packed else (windows, longer)
        with pytest.raises(UserError, match=r"config\.data\.ops: a row has .* tokens, and .* were planned"):
            list(Dataset(make_documents(), ("input_ids",), ops, batch_size=2, **packed).epoch())


def test_a_decoders_side_alone_fits_its_buckets():
    explicit = {"length_buckets": (10, 30), "decoder_length_buckets": (20, 40)}
    with pytest.raises(UserError, match=r"decoder_length_buckets: \(20, 40\) is shorter than the max_length 50"):
        Dataset(make_pairs(), SIDES, (translate,), **explicit).batches()
    (_, batch), *_ = Dataset(make_pairs(), SIDES, (translate,)).rows([{"source": 3, "id": 0}])
    assert batch.keys() == {"input_ids", "mask"}


def test_packed_pairs_hold_every_pair_once():
    dataset = Dataset(make_pairs(), SIDES + MASKS, (translate,), batch_size=4, pack=64, pack_decoder=96)
    assert dataset.spec["targets"].shape == dataset.spec["decoder_positions"].shape == (4, 96)
    batches, seen = list(dataset.epoch()), []
    for row in (dict(zip(b, values)) for b in batches for values in zip(*b.values())):
        for number in set(row["attention_mask"].tolist()) - {0}:
            source = row["input_ids"][row["attention_mask"] == number]
            target = row["targets"][row["decoder_attention_mask"] == number]
            assert len(set(source) | set(target)) == 1
            seen.append({"source": len(source), "target": len(target), "id": int(source[0]) - 1})
    assert sorted(seen, key=lambda pair: pair["id"]) == make_pairs()
    (_, batch), *_ = dataset.rows([{"source": 3, "id": 0}])
    assert batch.keys() == {"input_ids", "attention_mask", "positions", "mask"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pack": 1}, "pack: 1 is too short for a row"),
        ({"pack": -5}, "pack: -5 is too short for a row"),
        ({"pack": 0, "pack_decoder": 8}, "pack_decoder: 8 needs `pack`"),
        ({"pack_decoder": 8}, "pack_decoder: it needs decoder_input_ids"),
        ({"features": ("id", "attention_mask")}, "pack: no feature is a sequence .* they are id, attention_mask"),
        ({"features": (*PACKED, "id")}, "features: 'id' is not a sequence; packed rows hold sequences only"),
        ({"features": SIDES, "ops": (translate,)}, "pack_decoder: it is missing, beside `pack`"),
        (
            {"features": SIDES, "ops": (translate,), "pack_decoder": 64},
            "pack: the ops make 30 tokens, but packed rows hold 16",
        ),
        ({"features": SIDES, "ops": (translate,), "pack": 32, "pack_decoder": 8}, "pack: the ops make 50 tokens"),
    ],
)
def test_packing_that_cannot_be_is_an_error_at_once(arguments, message):
    basic = {"source": make_documents(), "features": PACKED, "ops": (language_model,), "pack": 16}
    with pytest.raises(UserError, match=f"^{message}"):
        Dataset(**basic | arguments)


def test_sequences_of_no_stated_length_must_be_packed():
    with pytest.raises(UserError, match=r"what makes input_ids, targets, target_mask needs a max_length \(or `pack`\)"):
        Dataset(make_documents(), PACKED, (language_model,)).batches()


def test_reading_does_not_write_out_the_source():
    class Source(list):
        def __repr__(self):
            raise AssertionError

    next(Dataset(Source(make_documents()), PACKED, (language_model,), batch_size=4, pack=16).batches())


def test_windows_may_be_of_one_example():
    batches = make_packed(window=1, batch_size=1).batches()
    assert next(batches)["input_ids"].shape == (1, 16)
