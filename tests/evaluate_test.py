import numpy as np
import pytest

from research import evaluate


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
