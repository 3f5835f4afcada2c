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
