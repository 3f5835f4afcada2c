import math
import pathlib

import numpy as np
import pytest
import scipy.stats

from research.errors import UserError
from research.reporting import comparison
from research.reporting.runs import Run

SLOW, FAST = (0.80, 0.82, 0.87, 0.85), (0.83, 0.84, 0.91, 0.87)


def run(name, seed=0, accuracy=None, **config):
    metrics = {} if accuracy is None else {"test/accuracy": accuracy}
    flat = {"seed": seed, "optimizer.learning_rate": 1e-3} | {key.replace("__", "."): v for key, v in config.items()}
    return Run(pathlib.Path("runs", name), flat, {}, (), {"step": 1, "metrics": metrics})


def arms(order=(0, 1, 2, 3), fast=FAST, **more):
    slow = [run(f"slow{seed}", seed, SLOW[seed]) for seed in range(len(SLOW))]
    return slow + [run(f"fast{i}", i, fast[i], optimizer__learning_rate=2e-3, **more) for i in order]


def test_runs_that_differ_in_their_seed_alone_are_a_group():
    groups = comparison.make_groups(arms())
    assert [group.name for group in groups] == ["slow0 and 3 more seeds", "fast0 and 3 more seeds"]
    assert groups[0].values("test/accuracy") == list(SLOW)
    assert comparison.keys_within(groups) == ["seed"]


def test_groups_agree_in_the_keys_that_are_named():
    found = [
        run("a", 0, 0.1, task__dropout=0.0, optimizer__learning_rate=1e-3),
        run("b", 0, 0.2, task__dropout=0.1, optimizer__learning_rate=1e-3),
        run("c", 0, 0.3, optimizer__learning_rate=2e-3),
    ]
    groups = comparison.make_groups(found, ["optimizer.learning_rate"])
    assert {group.name: list(group.members) for group in groups} == {
        "learning_rate=0.001": ["a", "b"],
        "learning_rate=0.002": ["c"],
    }
    assert comparison.notes(groups, ["test/accuracy"], ["optimizer.learning_rate"]) == [
        "Runs of one group differ in more than their seed: task.dropout"
    ]
    by_two = comparison.make_groups(found, ["task.dropout", "seed"])
    assert [group.name for group in by_two] == ["dropout=0.0, seed=0", "dropout=0.1, seed=0", "dropout=-, seed=0"]


def test_an_unknown_key_is_one_line_with_the_nearest():
    with pytest.raises(UserError, match=r"'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'\?"):
        comparison.make_groups(arms(), ["optimizer.learning_rat"])


def test_the_interval_of_a_mean_is_students():
    found = comparison.mean_interval(SLOW)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(SLOW), scipy.stats.sem(SLOW))
    assert (found.low, found.high) == pytest.approx((low, high))
    # By hand: the deviation of 1, 2, 3 is 1, and the quantile of two degrees of freedom 4.302653.
    assert comparison.mean_interval((1.0, 2.0, 3.0)).half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert comparison.mean_interval((1.0,)) == comparison.Interval(1.0, None, "1 run")
    assert comparison.mean_interval((2.0, 2.0)).half_width == 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_differences_are_paired_by_seed_in_whatever_order(order):
    slow, fast = comparison.make_groups(arms(order))
    found = comparison.difference(fast, slow, "test/accuracy", ["seed"])
    want = scipy.stats.ttest_rel(FAST, SLOW).confidence_interval(0.95)
    assert found.center == pytest.approx(np.mean(FAST) - np.mean(SLOW))
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    assert found.over == "4 pairs"


def test_what_has_no_partner_is_left_out_of_the_pairs():
    slow, fast = comparison.make_groups(arms((3, 1)))
    found = comparison.difference(fast, slow, "test/accuracy", ["seed"])
    want = scipy.stats.ttest_rel([FAST[1], FAST[3]], [SLOW[1], SLOW[3]]).confidence_interval(0.95)
    assert (found.low, found.high, found.over) == (pytest.approx(want.low), pytest.approx(want.high), "2 pairs")


def test_pairs_agree_in_all_that_differs_within_groups():
    found = [
        run(f"{rate}-{dropout}", 0, rate + 10 * dropout, task__dropout=dropout, optimizer__learning_rate=rate)
        for rate, dropouts in ((0.1, (0.0, 0.5)), (0.3, (0.5, 0.0)))
        for dropout in dropouts
    ]
    low, high = comparison.make_groups(found, ["optimizer.learning_rate"])
    keys = comparison.keys_within([low, high])
    assert keys == ["task.dropout"]
    difference = comparison.difference(high, low, "test/accuracy", keys)
    assert (difference.center, difference.half_width) == (pytest.approx(0.2), pytest.approx(0, abs=1e-9))


def test_without_common_seeds_the_interval_is_welchs():
    found = arms((), FAST) + [run(f"fast{i}", 10 + i, FAST[i], optimizer__learning_rate=2e-3) for i in range(3)]
    slow, fast = comparison.make_groups(found)
    difference = comparison.difference(fast, slow, "test/accuracy", ["seed"])
    want = scipy.stats.ttest_ind(FAST[:3], SLOW, equal_var=False).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((want.low, want.high))
    assert difference.over == "unpaired, 3 and 4 runs"


def test_two_runs_of_one_seed_are_no_pair():
    found = [*arms(), run("again", 0, 0.9)]
    slow, fast = comparison.make_groups(found)
    assert comparison.difference(fast, slow, "test/accuracy", ["seed"]).over == "unpaired, 4 and 5 runs"


def test_runs_without_a_finite_metric_are_named_and_not_counted():
    groups = comparison.make_groups([*arms(), run("without", 7), run("infinite", 8, math.inf)])
    assert groups[0].values("test/accuracy") == list(SLOW)
    assert comparison.notes(groups, ["test/accuracy"], None) == ["Without a finite test/accuracy: without, infinite"]
    assert comparison.tables(groups, ["test/accuracy"])["results"].rows[0][1] == "83.50 % ± 3.11 (4 of 6 runs)"


def test_tables_are_those_that_there_are_runs_enough_for():
    everything = comparison.tables(comparison.make_groups(arms()), ["test/accuracy"])
    assert list(everything) == ["config", "results", "intervals", "differences"]
    assert everything["differences"].rows == [("test/accuracy", "+2.75 points (+1.23 to +4.27; 4 pairs)")]
    assert list(comparison.tables(comparison.make_groups(arms()[:1]), ["test/accuracy"])) == ["results"]
    pair = comparison.make_groups([run("a", 0, 0.5), run("b", 0, 0.6, optimizer__learning_rate=2e-3)])
    assert list(comparison.tables(pair, ["test/accuracy"])) == ["config", "results"]
