import json
import pathlib
import pkgutil

import pytest

from research.build import locate
from research.configuration.moved import MOVED, current, current_config
from research.errors import UserError
from research.reporting.record import load_config

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


def calls(node):
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key == "call" else calls(value)
    elif isinstance(node, list):
        for value in node:
            yield from calls(value)


@pytest.mark.parametrize("old", MOVED)
def test_what_moved_is_where_the_table_says(old):
    assert pkgutil.resolve_name(current(old))
    with pytest.raises((ImportError, AttributeError)):
        pkgutil.resolve_name(old)


def test_only_whole_names_are_moved():
    assert current("research.transfer.load_params") == "research.configuration.transfer.load_params"
    assert current("research.transferred.load") == "research.transferred.load"
    assert current("research.data.tokenizer.trained") == "research.data.tokenizer.trained"


def test_every_recorded_config_still_names_what_there_is():
    found = set()
    for path in EXPERIMENTS.glob("*/runs/*/*/config.json"):
        found |= set(calls(current_config(json.loads(path.read_text()))))
    assert len(found) > 30
    for path in sorted(found):
        locate(path, "config")


def test_the_config_of_an_older_run_is_read_with_todays_names(tmp_path):
    node = {"call": "research.transfer.load_params", "nested": [{"call": "research.features.TrainedRun"}]}
    (tmp_path / "config.json").write_text(json.dumps({"init": node}))
    config = load_config(tmp_path)
    assert config.init.call == "research.configuration.transfer.load_params"
    assert config.init.nested[0]["call"] == "research.evaluators.features.TrainedRun"


def test_gradient_descent_is_a_direction_now():
    node = {"optimizer": {"call": "research.optimizer.sgd", "learning_rate": 0.1, "momentum": 0.5}}
    direction = {"call": "optax.trace", "decay": 0.5}
    assert current_config(node) == {"optimizer": {"learning_rate": 0.1, "direction": direction}}


def test_settings_that_were_flags_are_names_now():
    node = {"model": {"remat": True, "gated": True}, "ops": [{"remat": False}]}
    assert current_config(node) == {"model": {"remat": "full", "gated": True}, "ops": [{"remat": "none"}]}


def test_a_config_file_with_an_old_name_is_told_the_new_one():
    with pytest.raises(UserError, match=r"is now 'research\.configuration\.transfer\.load_params'"):
        locate("research.transfer.load_params", "config.init")
