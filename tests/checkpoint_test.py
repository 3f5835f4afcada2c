import logging
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.checkpoint import Checkpoints, SaveError, UnreadableCheckpointError, quieten
from research.errors import UserError
from research.step import TrainState


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quieten()


def state(step: int, width: int = 8) -> TrainState:
    """A state whose every number depends on the step."""
    kernel = jnp.arange(3 * width, dtype=jnp.float32).reshape(3, width) + step
    params = {"dense": {"kernel": kernel, "bias": kernel[0].astype(jnp.bfloat16)}}
    moments = (jnp.asarray(step, jnp.int32), jax.tree.map(lambda x: x / 7, params))
    return TrainState(jnp.asarray(step, jnp.int32), params, moments, jnp.asarray([step, 1], jnp.uint32))


def abstract(like: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


def assert_same(found: TrainState, wanted: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, wanted)


def save(folder: pathlib.Path, steps, best=None, **options) -> None:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"data": {"position": step}}, best)
    checkpoints.close()


def restore(folder: pathlib.Path, **options):
    checkpoints = Checkpoints(folder, **options)
    try:
        return checkpoints.restore(abstract(state(0)))
    finally:
        checkpoints.close()


def steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A folder with the checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, [10, 20])
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def test_the_latest_comes_back_bit_by_bit(folder):
    found, extras = restore(folder)
    assert_same(found, state(20))
    assert extras["data"] == {"position": 20}


def test_the_latest_are_kept_and_the_best_also_after_reopening(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, [1, 2, 3], best=1)
    assert steps(folder) == [1, 2, 3]
    save(folder, [4, 5], best=1)
    assert steps(folder) == [1, 4, 5]
    save(folder, [6], best=6)
    assert steps(folder) == [5, 6]


def best_step(folder: pathlib.Path, best: str | None = "test/loss") -> int | None:
    checkpoints = Checkpoints(folder, best=best, read_only=True)
    try:
        return checkpoints.best_step()
    finally:
        checkpoints.close()


def test_the_best_step_is_known_by_the_latest_readable_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, [1, 2], best=1)
    save(folder, [3], best=3)
    assert best_step(folder) == 3
    assert best_step(folder, best=None) is None
    (folder / "3" / "extras" / "metadata").write_text("{")
    assert best_step(folder) == 1


def test_a_step_that_exists_is_left_alone_or_its_extras_replaced(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(20, state(21), {"evaluated": False})
    checkpoints.wait()
    assert_same(checkpoints.read(20, abstract(state(0)))[0], state(20))
    checkpoints.save(20, state(20), {"evaluated": True}, best=20, replace=True)
    assert checkpoints.read(20, abstract(state(0)))[1]["evaluated"] is True
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def test_extras_are_those_of_the_moment_of_saving(tmp_path, monkeypatch):
    """Orbax writes them later, in a thread, while the run goes on counting in the same dictionaries."""
    checkpoints, extras = Checkpoints(tmp_path), {"counts": {"steps": 1}}
    given: dict = {}
    monkeypatch.setattr(checkpoints._manager, "save", lambda step, args, **_: given.update(args.extras.item))
    checkpoints.save(1, state(1), extras)
    extras["counts"]["steps"] = 2
    assert given["counts"] == {"steps": 1}
    checkpoints.close()


def test_new_extras_delete_what_was_best_before(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, [1, 2, 3], best=1)
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state(3), {}, best=3, replace=True)
    checkpoints.close()
    assert steps(folder) == [2, 3]


def test_read_only_changes_nothing(folder):
    (folder / "20").rename(folder / "unreadable-20-0")
    (folder / "30.orbax-checkpoint-tmp").mkdir()
    save(folder.parent / "other", [])
    checkpoints = Checkpoints(folder, keep=1, read_only=True)
    assert checkpoints.steps() == [10]
    assert_same(checkpoints.read(10, abstract(state(0)))[0], state(10))
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["10", "30.orbax-checkpoint-tmp", "unreadable-20-0"]
    missing = folder.parent / "missing"
    Checkpoints(missing, read_only=True).close()
    assert not missing.exists()


def flip(path: pathlib.Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x55
    path.write_bytes(bytes(data))


def files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def largest(checkpoint: pathlib.Path) -> pathlib.Path:
    return max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)


DAMAGE = {
    "values truncated": lambda c: os.truncate(largest(c), largest(c).stat().st_size // 2),
    "values emptied": lambda c: os.truncate(largest(c), 0),
    "values deleted": lambda c: [path.unlink() for path in c.rglob("d/*")],
    "manifest deleted": lambda c: (c / "state" / "manifest.ocdbt").unlink(),
    "manifest flipped": lambda c: flip(c / "state" / "manifest.ocdbt", 0.6),
    "state deleted": lambda c: shutil.rmtree(c / "state"),
    "state described wrongly": lambda c: flip(c / "state" / "_METADATA", 0.3),
    "extras deleted": lambda c: shutil.rmtree(c / "extras"),
    "extras truncated": lambda c: os.truncate(c / "extras" / "metadata", 40),
    "extras changed": lambda c: (c / "extras" / "metadata").write_text(
        (c / "extras" / "metadata").read_text().replace('"position": 20', '"position": 21')
    ),
    "emptied": lambda c: (shutil.rmtree(c), c.mkdir()),
    "all files emptied": lambda c: [os.truncate(path, 0) for path in files(c)],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_falls_back_to_the_checkpoint_before(damage, folder, caplog):
    damage(folder / "20")
    with caplog.at_level(logging.WARNING):
        found, extras = restore(folder)
    assert_same(found, state(10))
    assert extras["data"] == {"position": 10}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("checkpoint 20 is unreadable (")
    assert line.endswith("); trying the one before")
    assert "\n" not in line
    assert sorted(path.name for path in folder.iterdir()) == ["10", "unreadable-20-0"]
    save(folder, [20])  # the step can be saved again
    assert_same(restore(folder)[0], state(20))


def test_a_flipped_byte_is_found_or_harmless(saved, tmp_path):
    """Wherever a byte changes, what is restored is the checkpoint as it was saved, or the one before."""
    fallen = 0
    paths = [path.relative_to(saved) for path in files(saved / "20")]
    for i in range(40):
        folder = pathlib.Path(shutil.copytree(saved, tmp_path / str(i)))
        flip(folder / paths[i % len(paths)], (i * 0.37) % 1)
        found, extras = restore(folder)
        step = int(found.step)
        fallen += step == 10
        assert_same(found, state(step))
        assert extras["data"] == {"position": step}
    assert fallen >= 10


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"commit_timestamp_nsecs": 1e999}', '{"metrics": 3}', '{"init_timestamp_nsecs": "now"}']
)
def test_damage_to_what_is_not_needed_does_not_keep_a_folder_from_opening(content, folder):
    """Orbax notes times beside a checkpoint; what stands there stops neither a run nor a reader."""
    for step in ("10", "20"):
        (folder / step / "_CHECKPOINT_METADATA").write_text(content)
    reader = Checkpoints(folder, read_only=True)
    assert reader.steps() == [10, 20]
    reader.close()
    assert_same(restore(folder)[0], state(20))
    (folder / "20" / "extras" / "metadata").write_text("{")
    assert_same(restore(folder)[0], state(10))
    save(folder, [20])
    assert_same(restore(folder)[0], state(20))


def test_no_readable_checkpoint_is_an_error_and_deletes_nothing(folder):
    for step in (10, 20):
        (folder / str(step) / "state" / "manifest.ocdbt").unlink()
    before = files(folder)
    with pytest.raises(UnreadableCheckpointError, match=r"none of the checkpoints \[10, 20\] in .* can be read"):
        restore(folder)
    assert files(folder) == before


def test_another_model_is_the_users_mistake_and_named(folder):
    checkpoints = Checkpoints(folder)
    with pytest.raises(
        UserError, match=r"checkpoints/20 holds another model: params/dense/bias is .*\[8\] there and .*\[9\]"
    ):
        checkpoints.restore(abstract(state(0, width=9)))
    other = state(0).replace(params={"dense": {"weights": jnp.zeros(3)}})
    with pytest.raises(UserError, match=r"params/dense/weights is missing there and float32\[3\] in this config"):
        checkpoints.restore(abstract(other))
    checkpoints.close()
    assert steps(folder) == [10, 20]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "OSError: .*No space left on device"),
        (ValueError("OUT_OF_RANGE: Failed to write to file 6: File too large [os_error_code='27']"), "File too large"),
        (ValueError("DATA_LOSS: a [{'path': true}'] [source='x.cc' os_error_code='27']"), "File too large"),
    ],
)
def test_a_save_that_fails_says_so_and_keeps_what_was_saved(folder, monkeypatch, error, said):
    checkpoints = Checkpoints(folder)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(SaveError, match=rf"could not be saved \({said}\); those before it"):
        checkpoints.save(30, state(30), {})
    checkpoints.close()
    assert_same(restore(folder)[0], state(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "largest"}, "config.checkpoint.mode: 'largest' is neither"),
        ({"keep": 0}, "keep .0. must be at least 1"),
        ({"every_steps": -1}, "every_steps .-1. at least 0"),
        ({"patience": 3}, "config.checkpoint.patience: early stopping needs config.checkpoint.best"),
    ],
)
def test_options_that_make_no_sense(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path, **options)


def test_ranking(tmp_path):
    highest, lowest = Checkpoints(tmp_path, best="a"), Checkpoints(tmp_path, best="a", mode="min")
    assert highest.better(2.0, 1.0)
    assert lowest.better(1.0, 2.0)
    assert not highest.better(1.0, 1.0)
    assert highest.ranking({"a": 3.0}) == 3.0
    with pytest.raises(UserError, match=r"config.checkpoint.best: no evaluation gives 'a'; there are: b"):
        highest.ranking({"b": 3.0})
    highest.close()
    lowest.close()
