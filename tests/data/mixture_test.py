"""Mixtures: exact proportions at any position, each source's own epochs, and weights that change."""

import itertools
import json
import pickle

import numpy as np
import pytest

from configs.pretrain_text import get_config
from research import train
from research.build import build
from research.configuration import trust
from research.data.dataset import Dataset
from research.data.mixture import permuted
from research.data.source import examples, mixture
from research.errors import UserError
from research.reporting import figures
from research.reporting.record import Record

LENGTHS = {"web": 70, "code": 11, "books": 23}
SOURCES = {name: examples([{"text": f"{name} {i}"} for i in range(n)]) for name, n in LENGTHS.items()}
WEIGHTS = {"web": 6, "code": 3, "books": 1.5}


def _names(mixed, positions):
    return [mixed[i]["text"].split()[0] for i in positions]


def test_any_run_of_positions_has_the_proportions_of_the_weights():
    mixed = mixture(SOURCES, WEIGHTS)
    for start in (0, 1, 777, 10**9):
        names = _names(mixed, range(start, start + 210))
        for name, weight in WEIGHTS.items():
            assert abs(names.count(name) - 210 * weight / 10.5) <= len(SOURCES)


def test_each_source_has_epochs_of_its_own_each_in_another_order():
    mixed = mixture(SOURCES, WEIGHTS)
    texts = [mixed[i]["text"] for i in range(1000)]
    for name, length in LENGTHS.items():
        own = [text for text in texts if text.startswith(name)]
        epochs = [own[i : i + length] for i in range(0, len(own) - length + 1, length)]
        assert len(epochs) >= 6 or name != "code"
        assert all(set(epoch) == {f"{name} {i}" for i in range(length)} for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_position_is_a_function_of_the_seed_and_itself_alone():
    mixed, again = mixture(SOURCES, WEIGHTS), mixture(dict(reversed(SOURCES.items())), dict(reversed(WEIGHTS.items())))
    positions = [5, 10**10, 0, 999, 5]
    assert [mixed[i] for i in positions] == [pickle.loads(pickle.dumps(again))[i] for i in positions]
    other = mixture(SOURCES, WEIGHTS, seed=1)
    assert _names(mixed, range(99)) == _names(other, range(99))
    assert [mixed[i] for i in range(99)] != [other[i] for i in range(99)]


def test_many_positions_are_located_as_one_is():
    mixed = mixture(SOURCES, WEIGHTS)
    positions = np.random.default_rng(0).integers(0, 10**6, 50)
    names, records = mixed.locate(positions)
    keys = list(mixed.sources)
    assert [f"{keys[n]} {r}" for n, r in zip(names, records)] == [mixed[i]["text"] for i in positions]


def test_an_epoch_is_over_when_each_source_has_been_seen_once():
    mixed = mixture(SOURCES, WEIGHTS)
    assert {example["text"] for example in mixed} >= {f"{name} {i}" for name, n in LENGTHS.items() for i in range(n)}
    epochs = mixed.epochs(len(mixed))
    assert min(epochs.values()) >= 1 > min(mixed.epochs(len(mixed) - 1).values())
    names = _names(mixed, range(len(mixed)))
    assert epochs == {name: names.count(name) / n for name, n in LENGTHS.items()}


def test_weights_that_change_leave_what_was_before():
    phases = [{"from_step": 0, "weights": {"web": 3, "code": 1}}]
    phases += [{"from_step": 10, "weights": {"books": 1, "code": 1}}, {"from_step": 30, "weights": {"web": 1}}]
    one = mixture(SOURCES, phases[:1] + [{"from_step": 1000, "weights": WEIGHTS}], examples_per_step=8)
    three = mixture(SOURCES, phases, examples_per_step=8)
    assert [one[i] for i in range(80)] == [three[i] for i in range(80)]
    assert len(one) == len(three)
    names = _names(three, range(400))
    assert [names[80:240].count(name) for name in ("web", "code", "books")] == [0, 80, 80]
    assert set(names[240:]) == {"web"}
    assert three.epochs(400) == {name: names.count(name) / n for name, n in LENGTHS.items()}
    web = [text for i in range(400) if (text := three[i]["text"]).startswith("web")]
    assert len(set(web[:70])) == 70  # its first epoch goes on after the pause
    with pytest.raises(UserError, match="examples_per_step: it is missing"):
        mixture(SOURCES, phases)


def _recorded(folder, source):
    config = {"data": {"source": {"call": "research.data.source.mixture", "sources": {}} | source}}
    Record(folder, config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_may_go_on_with_other_weights_from_its_step_on(tmp_path):
    first, other = {"from_step": 0, "weights": {"web": 1}}, {"web": 1, "code": 1}
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    _recorded(tmp_path, {"weights": {"web": 1}})
    with pytest.raises(UserError, match=r"config\.data\.source\.weights.*: .* holds a run with"):
        _recorded(tmp_path, {"weights": other})
    late = [first, {"from_step": 10, "weights": other}]
    with pytest.raises(UserError, match=r"config\.data\.source\.weights: .* holds a run with"):
        _recorded(tmp_path, {"weights": [first, {"from_step": 9, "weights": other}], "examples_per_step": 8})
    _recorded(tmp_path, {"weights": late, "examples_per_step": 8})
    (tmp_path / "checkpoints" / "11").mkdir()
    with pytest.raises(UserError, match=r"config\.data\.source\.examples_per_step: .* holds a run with 8"):
        _recorded(tmp_path, {"weights": late, "examples_per_step": 9})
    with pytest.raises(UserError, match=r"config\.data\.source\.seed: "):
        _recorded(tmp_path, {"weights": late, "examples_per_step": 8, "seed": 1})


def test_without_weights_each_example_comes_once():
    joined = pickle.loads(pickle.dumps(mixture(SOURCES)))
    texts = [example["text"] for example in joined]
    assert len(joined) == len(texts) == len(set(texts)) == sum(LENGTHS.values())
    assert joined.epochs(208) == dict.fromkeys(LENGTHS, 2.0)
    with pytest.raises(IndexError):
        joined[len(joined)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"web": 1, "code": 1, "boks": 1}, r"weights: no source 'boks'; did you mean 'books'\?"),
        ({"web": 1, "code": 1}, "weights: there is none for 'books'"),
        (WEIGHTS | {"web": 0}, "weights: that of 'web' is 0; it must be a number greater than 0"),
        (WEIGHTS | {"web": -1.0}, "weights: that of 'web' is -1.0"),
        ([{"from_step": 5, "weights": WEIGHTS}], "weights: from_step must begin at 0 and ascend, not 5"),
        ([{"from": 0, "weights": WEIGHTS}], "weights: a phase has from_step and weights, not from, weights"),
    ],
)
def test_weights_that_are_wrong(weights, message):
    with pytest.raises(UserError, match=message):
        mixture(SOURCES, weights)


def test_sources_that_do_not_go_together():
    with pytest.raises(UserError, match="the examples of 'b' have no 'text', but those of 'a' do"):
        mixture({"a": examples([{"text": "", "id": 1}]), "b": examples([{"id": 1}])})
    with pytest.raises(UserError, match="sources: 'b' has no examples"):
        mixture({"a": examples([{"text": ""}]), "b": examples([])})
    with pytest.raises(UserError, match="the classes of 'label' in 'b' are not those of the others"):
        mixture({name: examples([{"label": 0}], {"label": [name, "x"]}) for name in ("a", "b")})


def test_permutations():
    for length in (1, 2, 3, 37, 256, 257):
        assert sorted(permuted(np.arange(length), np.full(length, length), np.full(length, 3, np.uint64))) == list(
            range(length)
        )
    keys = np.arange(3000, dtype=np.uint64)
    orders = permuted(np.tile(np.arange(3), 3000), np.full(9000, 3), np.repeat(keys, 3)).reshape(3000, 3)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi squared of 5 degrees of freedom: 0.1 %


def test_a_run_on_a_mixture_logs_epochs_of_each_source(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "curves", lambda *_, **__: None)  # it takes longer than all else
    config = get_config("tiny")
    config.num_steps, config.log.every_steps, config.evals = 4, 2, {}
    records = {name: [{"text": f"{name} {i}"} for i in range(n)] for name, n in (("web", 40), ("code", 8))}
    nodes = {name: {"call": "research.data.source.examples", "records": few} for name, few in records.items()}
    weights = [{"from_step": 0, "weights": {"web": 3, "code": 1}}, {"from_step": 99, "weights": {"code": 1}}]
    config.data.source = {"call": "research.data.source.mixture", "sources": nodes, "weights": weights}
    config.data.source["examples_per_step"] = 50
    trust.check(config.data.source.to_dict(), tmp_path)
    mixed = build(config.data.source, "config.data.source")
    train.run(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (last,) = (row for row in rows if row["step"] == 4 and "train/loss" in row)
    assert 8 < last["train/source_examples"] < 4 * len(mixed)
    assert {name: last[f"train/epochs/{name}"] for name in records} == mixed.epochs(last["train/source_examples"])


def rows_of(name, count, length=1):
    return examples([{"input_ids": np.full(length, i, np.int32), "kind": np.int32(name)} for i in range(count)])


def halves(example):
    """Makes two rows of an example."""
    return [example | {"half": np.int32(i)} for i in range(2)]


def shuffled(weights, ops=(), seed=0, **fields):
    sources = {"a": rows_of(0, 30), "b": rows_of(1, 12)}
    mixed = mixture(sources, weights, seed=3)
    return Dataset(mixed, ("input_ids", "kind"), (one_token, *ops), batch_size=6, seed=seed, **fields)


def one_token(example):
    return example


one_token.padding, one_token.max_length = {"input_ids": 0}, 4


@pytest.mark.parametrize("ops", [(), (halves,)])
def test_training_takes_a_mixture_in_its_order(ops):
    batches = list(itertools.islice(shuffled({"a": 1, "b": 2}, ops, window=2).batches(), 40))
    kinds = np.array([batch["kind"] for batch in batches])
    assert (np.abs(kinds.reshape(20, 12).sum(axis=1) - 8) <= 1).all()  # 2 of 3 in every window
    seen = [int(i) for batch in batches for i in batch["input_ids"][batch["kind"] == 1, 0]]
    rows = 12 * (1 + len(ops))
    assert sorted(seen[:rows]) == sorted(list(range(12)) * (1 + len(ops)))  # whole epochs of the smaller source
    assert len(seen) > 5 * rows


def test_weights_that_change_act_in_training():
    phases = [{"from_step": 0, "weights": {"a": 1}}, {"from_step": 6, "weights": {"a": 1, "b": 1}}]
    sources = {"a": rows_of(0, 30), "b": rows_of(1, 12)}
    mixed = mixture(sources, phases, examples_per_step=6)
    batches = Dataset(mixed, ("input_ids", "kind"), (one_token,), batch_size=6, window=2).batches()
    shares = [next(batches)["kind"].mean() for _ in range(20)]
    assert not any(shares[:6])
    assert np.mean(shares[6:]) == pytest.approx(0.5, abs=0.05)


def test_a_mixture_is_evaluated_without_weights():
    with pytest.raises(UserError, match="a mixture with weights has no end"):
        shuffled({"a": 1, "b": 2}).epoch()
    batches = list(shuffled(()).epoch())
    assert sum(batch["mask"].sum() for batch in batches) == 42


def test_packed_documents_of_a_mixture():
    sources = {"a": rows_of(0, 30, length=9), "b": rows_of(1, 12, length=5)}
    dataset = Dataset(mixture(sources), ("input_ids", "attention_mask"), (one_token,), batch_size=2, pack=16)
    tokens = [int(t) for batch in dataset.epoch() for t in batch["input_ids"][batch["attention_mask"] > 0]]
    assert sorted(tokens) == sorted([i for i in range(30) for _ in range(9)] + [i for i in range(12) for _ in range(5)])
