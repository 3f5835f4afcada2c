import errno
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from research import main
from research.configuration import overrides
from research.data import keys, language, prepared, preparing, shards, source, text, tokenizer
from research.data.dataset import Dataset
from research.errors import UserError
from research.experiment import Experiment

FEATURES = ("input_ids", "targets", "target_mask", "attention_mask")
WORDS = "the film was long and slow but warm in its own odd way".split()
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Keeps whatever is prepared, in many shards."""
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "IN_MEMORY", 0)
    monkeypatch.setattr(prepared, "SHARD", (300, 300))
    monkeypatch.setattr(preparing, "cores", lambda: 1)
    return tmp_path / "cache" / "prepared"


def make_source(count=40):
    rng = np.random.default_rng(0)
    return source.examples([{"text": " ".join(rng.choice(WORDS, int(rng.integers(0, 30))))} for _ in range(count)])


def make_dataset(seed=0, **settings):
    ops = (language.CausalTokens(tokenizer.byte_level()),)
    return Dataset(make_source(), FEATURES, ops, batch_size=4, seed=seed, **{"pack": 64, "window": 2} | settings)


def masked(share=0.15):
    from research.data import tokenizer_training

    own = tokenizer_training.train(make_source(), "wordpiece", 120)
    ops = (language.Pieces(own, max_length=16), language.MaskTokens(own, share=share))
    return Dataset(make_source(), ("input_ids", "targets", "attention_mask"), ops, batch_size=4, window=3)


def some(dataset, count=12):
    return list(itertools.islice(dataset.batches(), count))


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        assert {n: (x.dtype, x.shape) for n, x in one.items()} == {n: (x.dtype, x.shape) for n, x in other.items()}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("make", [make_dataset, masked])
def test_files_give_the_batches_that_memory_does(make, cache, monkeypatch):
    monkeypatch.setattr(prepared, "IN_MEMORY", 1e9)
    expected, once = some(make()), list(make().epoch())
    assert not cache.exists()
    monkeypatch.setattr(prepared, "IN_MEMORY", 0)
    for _ in range(2):  # made, then read
        assert_same(some(make()), expected)
        assert_same(list(make().epoch()), once)
    (folder,) = cache.iterdir()
    assert len(list(folder.glob("*-of-*"))) > 5
    assert {path.suffix for path in folder.iterdir()} == {""}  # no leases


def test_what_draws_is_not_prepared(cache):
    """Another share of masked tokens needs no other files."""
    some(masked(0.15))
    some(masked(0.5))
    assert len(list(cache.iterdir())) == 1


def test_another_source_op_or_tokenizer_is_prepared_anew(cache):
    def op(example):
        return example | {"text": example["text"].upper()}

    base = make_dataset()
    longer = source.examples([*make_source().records, {"text": "one more"}])
    own = tokenizer.byte_level(sentinels=3)
    for dataset in (
        base,
        Dataset(longer, FEATURES, base.ops, pack=64),
        Dataset(base.source, FEATURES, (language.CausalTokens(tokenizer.byte_level(), eos=False),), pack=64),
        Dataset(base.source, FEATURES, (language.CausalTokens(own),), pack=64),
        Dataset(base.source, FEATURES, (op, *base.ops), pack=64),
    ):
        assert dataset.size
    assert len(list(cache.iterdir())) == 5
    for same in (make_dataset(seed=3), make_dataset(window=5), make_dataset(pack=32)):  # these change the plan alone
        assert same.size
    assert len(list(cache.iterdir())) == 5


def test_the_code_of_an_op_is_part_of_its_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for number, body in enumerate(("x", "x + 1")):
        (tmp_path / f"own_op_{number}.py").write_text(f"class Op:\n    def __call__(self, x):\n        return {body}\n")
        found.add(keys.key_of(__import__(f"own_op_{number}").Op()))
    assert len(found) == 2


def test_a_key_does_not_depend_on_where_a_tokenizer_lies_or_what_was_asked_of_it(tmp_path):
    own = tokenizer.byte_level(sentinels=3)
    before = keys.key_of(text.Tokenize(own), own)
    own.save(tmp_path / "tokenizer")
    assert own.special_ids
    assert own.sentinels
    again = tokenizer.read(tmp_path / "tokenizer")
    assert before == keys.key_of(text.Tokenize(own), own) == keys.key_of(text.Tokenize(again), again)


def test_what_cannot_be_seen_has_no_key():
    with open(os.devnull) as file, pytest.raises(keys.UnknownError):
        keys.key_of([file])


def replace(path, content):
    """Puts another file in place of one that threads of earlier iterators may still have mapped into memory."""
    other = path.with_name("other")
    other.write_bytes(content)
    other.replace(path)


def test_a_truncated_file_is_one_line_and_a_changed_one_is_made_anew(cache):
    expected = some(make_dataset())
    values = sorted(cache.glob("*/*/0.values.npy"))
    replace(values[0], values[0].read_bytes()[:-1])
    with pytest.raises(UserError, match=r"prepared data: '.*0.values.npy' is damaged; --mode=prepare makes anew"):
        some(make_dataset())
    content = bytearray(values[1].read_bytes())
    content[-1] ^= 1
    replace(values[1], bytes(content))
    make_dataset().prepare()
    assert_same(some(make_dataset()), expected)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_made(cache, monkeypatch):
    saved, save = itertools.count(), np.save

    def full(file, values):
        if next(saved) == 7:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, values)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"prepared data: '.*' cannot be written to .No space left on device"):
        some(make_dataset())
    monkeypatch.undo()
    left = [path for path in cache.glob("*/*") if path.is_dir()]
    assert 0 < len(left) < 10
    for path in left:
        shards.read(path, whole=True)


def lose_a_shard(cache):
    """Deletes a shard that was prepared and returns where its lease would be."""
    (folder,) = cache.iterdir()
    lost = sorted(folder.iterdir())[2]
    for path in lost.iterdir():
        path.unlink()
    lost.rmdir()
    return folder / f"{lost.name}.lease"


def test_a_shard_whose_process_is_gone_is_taken_over(cache):
    expected = some(make_dataset())
    lease = lose_a_shard(cache)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lease.write_text(f'{{"host": "{preparing.socket.gethostname()}", "pid": {dead.pid}, "token": "x", "done": 0.5}}')
    assert_same(some(make_dataset()), expected)
    assert not lease.exists()


def test_a_shard_that_another_machine_works_on_is_waited_for_and_taken_when_it_is_silent(cache, monkeypatch):
    expected = some(make_dataset())
    lease = lose_a_shard(cache)
    lease.write_text('{"host": "elsewhere", "pid": 1, "token": "x", "done": 0.5}')
    monkeypatch.setattr(preparing, "EXPIRED", 1.0)
    begin = time.monotonic()
    assert_same(some(make_dataset()), expected)
    assert time.monotonic() - begin > 0.8
    assert not lease.exists()


SCRIPT = """
    import sys, time
    from research.data import prepared, preparing
    prepared.IN_MEMORY, prepared.SHARD = 0, (300, 300)
    sys.path.insert(0, sys.argv[1])
    import prepared_test

    def slow(example):
        time.sleep(float(sys.argv[2]))
        return example

    if __name__ == "__main__":
        base = prepared_test.make_dataset()
        preparing.cores = lambda: int(sys.argv[3])
        print(prepared_test.Dataset(base.source, base.features, (slow, *base.ops), pack=64).size)
"""


def start(tmp_path, seconds, processes=1):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, tmp_path / "script.py", pathlib.Path(__file__).parent, str(seconds), str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RESEARCH_CACHE": str(tmp_path / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_preparation_goes_on_where_it_was(cache, tmp_path):
    killed = start(tmp_path, 0.05)
    done = wait_for(lambda: len(list(cache.glob("*/0*-of-*[0-9]"))) > 3 and cache)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    times = {path: path.stat().st_mtime_ns for path in done.glob("*/0*-of-*[0-9]")}
    again = start(tmp_path, 0.05)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert "prepared the data" in errors
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (folder,) = cache.iterdir()
    assert not list(folder.glob("*.lease"))


@pytest.mark.slow
def test_processes_share_the_work(cache, tmp_path):
    both = [start(tmp_path, 0.05, processes=2) for _ in range(2)]
    sizes = [process.communicate(timeout=90) for process in both]
    assert len({size for size, _ in sizes}) == 1
    assert all(process.returncode == 0 for process in both), sizes


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError


def test_workers_change_nothing():
    alone, helped = masked(), masked()
    object.__setattr__(helped, "workers", 2)
    expected = some(alone, 20)
    batches = helped.batches()
    first = [next(batches) for _ in range(8)]
    threads = alone.batches()
    threads.set_state(batches.get_state())  # a run may go on with another number of workers
    assert_same([*first, *itertools.islice(threads, 12)], expected)
    assert_same(list(helped.epoch()), list(alone.epoch()))
    helped._pool.close()


def test_workers_are_chosen_by_what_ops_cost(monkeypatch):
    def dear(example, rng):
        time.sleep(0.02)
        return example | {"x": rng.random()}

    monkeypatch.setattr(preparing, "cores", lambda: 2)
    records = source.examples([{"x": 0.0}] * 8)
    assert Dataset(records, ("x",), (dear,), batch_size=8)._needed_workers(8) == 2
    assert Dataset(records, ("x",), (lambda e, rng: e,), batch_size=8)._needed_workers(8) == 0
    with pytest.raises(UserError, match="workers: -1 is less than 0"):
        Dataset(records, ("x",), workers=-1)


def test_the_mode_prepares_training_and_evaluation(cache, capfd):
    assert main.main(["--mode=prepare", "--config=configs/pretrain_text.py:tiny"]) == 0
    assert "evals" in capfd.readouterr().err
    assert len(list(cache.iterdir())) >= 1


def test_the_mode_prepares_what_evaluators_read_that_number_their_examples(cache):
    assert main.main(["--mode=prepare", "--config=configs/conll2003.py:tiny"]) == 0
    made = {path.name for path in cache.iterdir()}
    for evaluator in Experiment(overrides.load("configs/conll2003.py:tiny")).evaluators.values():
        assert len(list(evaluator.dataset.epoch())) > 0
    assert {path.name for path in cache.iterdir()} == made
