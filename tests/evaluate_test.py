import numpy as np

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
