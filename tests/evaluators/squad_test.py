"""SQuAD's scores: cases worked out by hand, thresholds against trying all, and answers that come from every window."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.data import tokenizer
from research.data.dataset import Dataset
from research.data.question_answering import Windows
from research.data.source import examples
from research.errors import UserError
from research.evaluators.squad import Squad, best_threshold, score, score_v2
from research.tasks.question_answering import QuestionAnswering


def test_v1_takes_the_best_of_the_answers():
    found = score(["The cat", "big dog", "x"], [["dog", "a cat!"], ["dog", "big bad dog"], ["y"]])
    assert found == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 4 / 5 + 0) / 3})


def test_v2_by_hand():
    predictions = ["cat", "", "", "dog"]
    bests = ["cat", "big dog", "mouse", "dog"]
    answers = [["the cat"], ["dog"], [], []]
    leads = [-4.0, 1.0, 3.0, -1.0]
    found = score_v2(predictions, bests, leads, answers)
    # Answering the leads up to -4: 1 + 0 + 1 + 1; up to -1: 1 + 0 + 1 + 0; up to 1: 1 + f1 2/3 + 1 + 0.
    assert found == pytest.approx(
        {
            "exact": 0.5,
            "f1": 0.5,
            "HasAns_exact": 0.5,
            "HasAns_f1": 0.5,
            "NoAns_exact": 0.5,
            "NoAns_f1": 0.5,
            "best_exact": 0.75,
            "best_exact_thresh": -4,
            "best_f1": 0.75,
            "best_f1_thresh": -4,
        }
    )
    assert "NoAns_f1" not in score_v2(["x"], ["x"], [0.0], [["x"]])
    # An article alone is no answer that counts, but the question has one.
    assert score_v2([""], ["x"], [0.0], [["the"]])["HasAns_f1"] == 1


def test_best_threshold_is_that_of_trying_all():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(1, 12))
        answerable = rng.random(count) < 0.6
        values = np.where(answerable, rng.random(count).round(1), 0.0)
        leads = rng.integers(-3, 4, count).astype(float)
        leads[rng.random(count) < 0.1] = np.inf

        def at(threshold, values=values, leads=leads, answerable=answerable):
            return np.where(leads > threshold, ~answerable, values).mean()

        found, threshold = best_threshold(values, leads, answerable)
        assert found == pytest.approx(max(at(t) for t in np.arange(-5, 5, 0.5)))
        assert at(threshold) == pytest.approx(found)
        assert np.isfinite(threshold)


class Letters(nn.Module):
    """A model whose parameters are the logits of start and end of every byte."""

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        return self.param("logits", nn.initializers.zeros, (260, 2))[input_ids]


def evaluate(records, logits, batch_size=2, window=50, **fields):
    bytes_ = tokenizer.byte_level()
    op = Windows(bytes_, max_length=20, max_question_length=4, stride=6)
    features = ("input_ids", "attention_mask", "token_type_ids", "context_mask", "start", "end")
    data = Dataset(examples(records), features, (op,), batch_size, length_buckets=2, window=window)
    table = np.zeros((260, 2), np.float32)
    for letter, value in logits.items():
        table[bytes_.backend.token_to_id(letter)] = value
    task = QuestionAnswering(Letters(), **fields)
    return Squad(task, sharding.make_mesh(), data)({"logits": jnp.asarray(table)})


def record(context, *texts):
    answers = {"text": list(texts), "answer_start": [context.index(text) for text in texts]}
    return {"question": "q?", "context": context, "answers": answers}


RECORDS = [
    record("x" * 30 + "s--e" + "x" * 30, "s--e"),  # in the middle of many windows
    record("s.e", "s.", "s.e"),
    record("s-e and x", "x"),
    record("xxxxx" * 9),
    record(""),
    record("x" * 40 + "s"),
]
LOGITS = {"s": (6, 0), "e": (0, 6), "[CLS]": (2, 2)}


@pytest.mark.parametrize(("batch_size", "window"), [(1, 50), (4, 1), (64, 50)])
def test_answers_of_all_windows(batch_size, window):
    found = evaluate(RECORDS[:3], LOGITS, batch_size, window)
    assert found.pop("loss") > 0
    assert found == pytest.approx({"exact_match": 2 / 3, "f1": 2 / 3})


def test_questions_without_an_answer():
    found = evaluate(RECORDS, LOGITS, null_threshold=0.0)
    # "s" scores 6 against 4 of nothing, "s--e" 12, "x" 0.
    assert found["exact"] == pytest.approx(4 / 6)
    assert (found["HasAns_exact"], found["NoAns_exact"]) == pytest.approx((2 / 3, 2 / 3))
    assert found["best_exact"] == pytest.approx(5 / 6)
    assert found["best_exact_thresh"] == pytest.approx(4 - 12)
    unwilling = evaluate(RECORDS, LOGITS, null_threshold=-9.0)
    assert (unwilling["HasAns_exact"], unwilling["NoAns_exact"]) == pytest.approx((0, 1))


def test_answers_elsewhere():
    renamed = [{k: v for k, v in RECORDS[0].items() if k != "answers"} | {"answer": RECORDS[0]["answers"]}]
    with pytest.raises(UserError, match="examples have no 'start'"):
        evaluate(renamed, LOGITS)
