import math

import numpy as np
import pytest
from PIL import Image

from research.reporting import figures


def rows(seed=0, steps=100):
    noise = np.random.default_rng(seed).normal(size=steps) * 0.02
    made = [{"step": s, "train/loss": 1 / s + noise[s - 1], "train/learning_rate": 1e-5 * s} for s in range(1, steps)]
    return [*made, {"step": steps, "test/accuracy": 0.8 + noise[0], "test/loss": 0.4}]


def ink(path):
    return (np.asarray(Image.open(path).convert("L")) < 200).mean()


def test_default_metrics_are_loss_rate_and_evaluations():
    line = {"step": 1, "train/examples_per_second": 9.0, "train/loss": 1.0, "test/f1": 0.5, "test/accuracy": 0.5}
    assert figures.default_metrics({"run": [line]}) == ["train/loss", "test/f1", "test/accuracy"]


def test_running_mean_is_the_mean_of_neighbours():
    values = np.array([0.0, 3.0, 6.0, 9.0, 0.0])
    np.testing.assert_allclose(figures._running_mean(values, 3), [1.5, 3.0, 6.0, 5.0, 4.5])


def test_points_are_sorted_and_finite():
    steps, numbers = figures._points(
        [{"step": 2, "a": 1.0}, {"step": 1, "a": 3.0}, {"step": 3, "a": math.nan}, {"step": 4, "a": None}, {"step": 5}],
        "a",
    )
    assert steps.tolist() == [1, 2]
    assert numbers.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("runs", [{"one": rows()}, {"a": rows(0), "b": rows(1)}])
def test_curves_draw_and_are_reproducible(tmp_path, runs):
    first, second = tmp_path / "new" / "first.png", tmp_path / "second.png"
    figures.curves(runs, None, first)
    figures.curves(runs, None, second)
    assert ink(first) > 0.01
    assert first.read_bytes() == second.read_bytes()


def test_curves_of_an_empty_run_say_so(tmp_path):
    figures.curves({"run": []}, None, tmp_path / "empty.png")
    assert ink(tmp_path / "empty.png") > 0.001


def test_a_single_point_can_be_seen(tmp_path):
    figures.curves({"run": [{"step": 1, "train/loss": 1.0}]}, None, tmp_path / "one.png")
    blue = np.array([0x00, 0x72, 0xB2])  # the first of COLOURS
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"), int)
    assert (abs(pixels - blue).max(axis=-1) < 8).sum() > 20


def test_results_draw_one_run_and_many(tmp_path):
    values = {"ours": [0.85, 0.86, 0.87], "theirs": [0.84]}
    figures.results(values, "test/accuracy", tmp_path / "results.png", reference=("published", 0.85), title="title")
    assert ink(tmp_path / "results.png") > 0.005


def test_a_band_is_the_mean_and_the_sample_deviation_where_all_runs_are():
    curves = [
        (np.array([0.0, 10.0, 20.0]), np.array([1.0, 2.0, 3.0])),
        (np.array([10.0, 20.0, 30.0]), np.array([4.0] * 3)),
    ]
    steps, mean, deviation = figures.band(curves)
    assert steps.tolist() == [10, 20]
    np.testing.assert_allclose(mean, [3, 3.5])
    np.testing.assert_allclose(deviation, [np.std([2, 4], ddof=1), np.std([3, 4], ddof=1)])
    # Another run was logged at other steps: it is interpolated.
    steps, mean, _ = figures.band([*curves[:1], (np.array([5.0, 15.0]), np.array([0.0, 10.0]))])
    assert steps.tolist() == [5, 10, 15]
    np.testing.assert_allclose(mean, [(1.5 + 0) / 2, (2 + 5) / 2, (2.5 + 10) / 2])
    assert not len(figures.band([(np.array([1.0]), np.array([1.0])), (np.array([2.0]), np.array([1.0]))])[0])
    assert not len(figures.band([])[0])


def test_a_group_is_drawn_as_its_mean_in_a_band(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        figures.Axes, "fill_between", lambda self, steps, low, high, **_: drawn.append((steps, low, high))
    )
    several = {f"run{i}": [{"step": s, "test/loss": float(i * s)} for s in (1, 2)] for i in range(3)}
    groups = {"run0": "ours", "run1": "ours", "run2": "theirs"}
    figures.curves(several, None, tmp_path / "bands.png", groups=groups, bands=True)
    ((steps, low, high),) = drawn  # none around a single run
    assert steps.tolist() == [1, 2]
    np.testing.assert_allclose((low + high) / 2, [0.5, 1.0])
    np.testing.assert_allclose((high - low) / 2, np.array([1, 2]) * np.std([0, 1], ddof=1))


def test_groups_whose_runs_share_no_step_are_drawn_one_by_one(tmp_path):
    several = {"a": [{"step": 1, "test/loss": 1.0}], "b": [{"step": 2, "test/loss": 2.0}]}
    figures.curves(several, None, tmp_path / "each.png", groups=dict.fromkeys(several, "one"), bands=True)
    assert ink(tmp_path / "each.png") > 0.005
