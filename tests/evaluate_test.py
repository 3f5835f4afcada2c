import importlib.util

import numpy as np
import pytest
from ml_collections import ConfigDict

from research import evaluate, harness, main
from research.errors import UserError


def test_numbers_and_pictures_part_and_keep_their_names():
    picture = np.zeros((2, 3, 3), np.uint8)

    def evaluator(params, check):
        check()
        return {"loss": np.float32(0.5), "grid": picture}

    metrics, pictures = evaluate.scores({"samples": evaluator}, params={})
    assert metrics == {"samples/loss": 0.5}
    assert type(metrics["samples/loss"]) is float
    assert list(pictures) == ["samples/grid"]
    assert pictures["samples/grid"] is picture


def test_an_evaluator_that_fails_is_named():
    def broken(params, check):
        raise ZeroDivisionError("no examples")

    with pytest.raises(evaluate.EvaluationError, match=r"config\.evals\.b failed \(ZeroDivisionError: no examples\)"):
        evaluate.scores({"a": lambda params, check: {"loss": 1.0}, "b": broken}, {})


def test_a_missing_harness_is_said_with_how_to_install_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(UserError, match=r"lm_eval is not installed; pip install -e '\.\[evals\]'"):
        harness.run(ConfigDict(), tmp_path, "hellaswag")


def test_flags_of_the_harness(tmp_path, capsys):
    assert main.main([f"--workdir={tmp_path}", "--mode=predict", "--harness=hellaswag"]) == 2
    assert "--harness: --mode=predict takes no such flag" in capsys.readouterr().err
    assert main.main([f"--workdir={tmp_path}", "--mode=evaluate", "--harness_include=tasks"]) == 2
    assert "--harness_include: it holds tasks for --harness" in capsys.readouterr().err
