"""SQuAD metrics: exact match and F1 of words (Rajpurkar 2016; v2 with unanswerable questions, 2018)."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.errors import UserError, nearest
from research.evaluators import batches, text_scores
from research.evaluators.numbered import numbered
from research.metrics import Mean, merge
from research.task import Batch, Params
from research.tasks.question_answering import QuestionAnswering


@dataclasses.dataclass(frozen=True)
class Squad:
    """Answers every question of a dataset from all its windows, and scores the answers.

    Attributes:
      task: with a `null_threshold` it may abstain and is scored by v2's rules, else by v1.1's.
      mesh: the device mesh.
      data: the evaluation data; one of its ops is `Windows`.
      answers: the field whose `text` lists the reference answers.
    """

    task: QuestionAnswering
    mesh: Mesh
    data: Dataset
    answers: str = "answers"

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return "loss" (of windows) and fractions in [0, 1].

        v1.1: "exact_match" and "f1". v2: "exact" and "f1"; both again for the questions that have answers, "HasAns_*",
        and for those that have none, "NoAns_*", where there are some; and what the best threshold would give:
        "best_exact", "best_f1", with the thresholds "best_exact_thresh" and "best_f1_thresh".
        """
        data, means = self.dataset, []
        outputs: dict[int, dict[int, Any]] = collections.defaultdict(dict)
        for mean, batch in batches.run(self._batch, params, data, self.mesh, check):
            means.append(mean)
            for i in np.flatnonzero(batch["mask"]):
                row = {name: value[i] for name, value in batch.items()}
                outputs[int(row["example"])][int(row["window"])] = row
        answered = [self._answered(data, number, windows) for number, windows in sorted(outputs.items())]
        loss = {"loss": float(merge(means)["loss"].compute())}
        if self.task.null_threshold is None:
            return loss | score([text for text, *_ in answered], [gold for *_, gold in answered])
        return loss | score_v2(*zip(*answered))

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data as it is read, each example with its number."""
        return numbered(self.data, "window")

    def _batch(self, params: Params, batch: Batch) -> tuple[dict[str, Mean], dict[str, jax.Array]]:
        rows = {name: batch[name] for name in ("example", "window", "mask")}
        return self.task.metrics(params, batch), rows | self.task.predict(params, batch, jax.random.key(0))

    def _answered(
        self, data: Dataset, number: int, windows: dict[int, dict[str, np.ndarray]]
    ) -> tuple[str, str, float, list[str]]:
        """Return the answer, the best non-null answer, the margin of the null score over it, and the references."""
        example = data.source[number]
        if self.answers not in example:
            raise UserError(f"answers: examples have no '{self.answers}'{nearest(self.answers, example)}")
        rows = data.transform(example)
        spans, null_score = self.task.spans(rows, [windows[i] for i in range(len(rows))])
        best, lead = (spans[0].text, null_score - spans[0].score) if spans else ("", np.inf)
        return self.task.answer(spans, null_score), best, lead, [str(text) for text in example[self.answers]["text"]]


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return "exact_match" and "f1", means over questions of the best over the references (v1.1)."""
    return {
        name: float(np.mean([_best(compare, *pair) for pair in zip(predictions, answers)]))
        for name, compare in (("exact_match", text_scores.same), ("f1", text_scores.overlap))
    }


def score_v2(
    predictions: Sequence[str], bests: Sequence[str], leads: Sequence[float], answers: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the scores of SQuAD v2, see `Squad`.

    Args:
      predictions: "" where no answer is predicted.
      bests: the best non-empty answers, which a higher threshold would give.
      leads: the margin of "no answer" over these.
      answers: the references; empty for unanswerable questions.
    """
    answerable = np.array([len(each) > 0 for each in answers])
    # Answers of only articles and punctuation are dropped.
    answers = [[text for text in each if text_scores.normalise(text)] or [""] for each in answers]
    result, best = {}, {}
    for name, compare in (("exact", text_scores.same), ("f1", text_scores.overlap_v2)):
        values = np.array([_best(compare, *pair) for pair in zip(predictions, answers)])
        result[name] = float(values.mean())
        for part, kept in (("HasAns", answerable), ("NoAns", ~answerable)):
            if kept.any():
                result[f"{part}_{name}"] = float(values[kept].mean())
        full = np.array([_best(compare, *pair) for pair in zip(bests, answers)])
        best[f"best_{name}"], best[f"best_{name}_thresh"] = best_threshold(full, np.array(leads), answerable)
    return result | best


def best_threshold(values: np.ndarray, leads: np.ndarray, answerable: np.ndarray) -> tuple[float, float]:
    """Return the best mean score that a threshold on the leads gives, and the threshold.

    Args:
      values: [N], the scores where the questions are answered.
      leads: [N]; questions above the threshold are not answered.
      answerable: [N], bool; where false, abstaining scores 1.
    """
    finite = np.isfinite(leads)
    order = np.argsort(np.where(finite, leads, np.inf), kind="stable")
    # Sums if the first 0, 1, 2, ... in this order are answered; those without candidates never are.
    gains = np.where(finite, values - ~answerable, 0.0)[order]
    sums = (~answerable).sum() + np.concatenate([[0.0], np.cumsum(gains)])
    ascending = leads[order]
    # A threshold cannot separate equal margins.
    possible = np.concatenate([[True], ascending[1:] != ascending[:-1], [True]]) if len(order) else np.array([True])
    chosen = int(np.where(possible, sums, -np.inf).argmax())
    lowest = float(ascending[0]) - 1 if finite.any() else 0.0
    return float(sums[chosen] / len(values)), float(ascending[chosen - 1]) if chosen else lowest


def _best(compare: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max((compare(prediction, answer) for answer in answers), default=0.0)
