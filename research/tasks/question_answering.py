"""Extractive question answering: the answer is a span of the passage, or there is none."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

from research.errors import UserError
from research.metrics import Mean
from research.task import Batch, Params, Question, Spec
from research.tasks import encoders


class Span(NamedTuple):
    """A span of a passage, in characters, and the sum of its start's and its end's logit."""

    text: str
    start: int
    end: int
    score: float


@dataclasses.dataclass(frozen=True)
class QuestionAnswering:
    """A model of (input_ids, attention_mask, token_type_ids) -> logits [B, T, 2] of where the answer starts and ends.

    Batches hold windows as `research.data.question_answering.Windows` makes them. Both distributions are over the
    passage's tokens and the first token of the window, which stands for "no answer here" (Devlin 2018, sections 4.2
    and 4.3).

    Attributes:
      model: the Linen module.
      max_answer_length: tokens of an answer, at most.
      n_best: spans that are kept of each window, and of each question.
      null_threshold: None: every question has an answer (SQuAD v1.1). A number: there is none where the score of "no
        answer", least over the windows, exceeds that of the best span by more than this (SQuAD v2).
    """

    model: nn.Module
    max_answer_length: int = 30
    n_best: int = 20
    null_threshold: float | None = None

    def __post_init__(self):
        for name in ("max_answer_length", "n_best"):
            if getattr(self, name) < 1:
                raise UserError(f"config.task.{name}: {getattr(self, name)} must be at least 1")

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new float32 parameters.

        Raises:
          UserError: a feature that the task needs is missing.
        """
        return encoders.init(self.model, spec, rng, ("context_mask", "start", "end"))

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the mean cross-entropy of start and end over real windows, with dropout, and the accuracies."""
        logits_2xBxT = self._logits(params, batch, {"dropout": rng})
        return _loss(logits_2xBxT, batch), _accuracies(logits_2xBxT, batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the loss, without dropout, and "start_accuracy" and "end_accuracy", all of windows."""
        logits_2xBxT = self._logits(params, batch, {})
        return {"loss": _loss(logits_2xBxT, batch)} | _accuracies(logits_2xBxT, batch)

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the best spans of each window: N of them, the best first.

        Returns:
          "start", "end": int32 [B, N], tokens of the window. "score": float32 [B, N], the sum of the two logits; -inf
          fills up where there are fewer spans. "null_score": float32 [B], the same sum at the first token.
        """
        del rng  # nothing is drawn
        start_BxT, end_BxT = self._logits(params, batch, {})
        null_score = start_BxT[:, 0] + end_BxT[:, 0]
        inside_BxT = batch["context_mask"] != 0
        start_BxT, end_BxT = (jnp.where(inside_BxT, x, -jnp.inf) for x in (start_BxT, end_BxT))
        length = start_BxT.shape[1]
        most = min(self.max_answer_length, length)
        # Row t holds the ends that may follow a start at t: t, t + 1, ..., t + most - 1.
        ends_TxL = jnp.arange(length)[:, None] + jnp.arange(most)
        padded_BxT = jnp.pad(end_BxT, ((0, 0), (0, most)), constant_values=-jnp.inf)
        score_BxTxL = start_BxT[:, :, None] + padded_BxT[:, ends_TxL]
        flat_BxM = score_BxTxL.reshape(len(null_score), -1)
        score_BxN, chosen_BxN = jax.lax.top_k(flat_BxM, min(self.n_best, flat_BxM.shape[1]))
        start_BxN = chosen_BxN // most
        return {
            "start": start_BxN,
            "end": start_BxN + chosen_BxN % most,
            "score": score_BxN,
            "null_score": null_score,
        }

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return the best spans of one window, in tokens; `describe_rows` knows the passage's words."""
        spans = [
            {"start": int(start), "end": int(end), "score": float(score)}
            for start, end, score in zip(output["start"], output["end"], output["score"])
            if np.isfinite(score)
        ]
        return {"n_best": spans, "null_score": float(output["null_score"])}

    def describe_rows(
        self, rows: Sequence[Mapping[str, Any]], outputs: Sequence[dict[str, np.ndarray]]
    ) -> dict[str, Any]:
        """Answer one question from all its windows.

        Args:
          rows: the windows, as `Windows` made them.
          outputs: what `predict` says of each.

        Returns:
          "answer", "" where there is none; "score", its probability among the `n_best`; and these, each with "answer",
          "score", and "start" and "end", the characters of the passage.
        """
        spans, null_score = self.spans(rows, outputs)
        entries: list[Span] = list(spans)
        if self.null_threshold is not None or not spans:
            entries.append(Span("", 0, 0, null_score))
        entries = sorted(entries, key=lambda span: -span.score)[: self.n_best]
        probabilities = scipy.special.softmax([span.score for span in entries])
        n_best = [
            {"answer": span.text, "score": float(probability), "start": span.start, "end": span.end}
            for span, probability in zip(entries, probabilities)
        ]
        answer = self.answer(spans, null_score)
        score = next((entry["score"] for entry in n_best if entry["answer"] == answer), 0.0)
        return {"answer": answer, "score": score, "n_best": n_best}

    def answer(self, spans: Sequence[Span], null_score: float) -> str:
        """Return the text of the best of the `spans`, or "" where that is the better answer."""
        if not spans:
            return ""
        none = self.null_threshold is not None and null_score - spans[0].score > self.null_threshold
        return "" if none else spans[0].text

    def spans(
        self, rows: Sequence[Mapping[str, Any]], outputs: Sequence[dict[str, np.ndarray]]
    ) -> tuple[list[Span], float]:
        """Return the `n_best` spans of all windows of a question, best first, and its least null score.

        A span that two windows see has the better of its two scores.
        """
        best: dict[tuple[int, int], float] = {}
        for row, output in zip(rows, outputs, strict=True):
            for start, end, score in zip(output["start"], output["end"], output["score"]):
                if np.isfinite(score):
                    place = (int(row["offsets"][start, 0]), int(row["offsets"][end, 1]))
                    best[place] = max(float(score), best.get(place, -np.inf))
        ranked = sorted(best.items(), key=lambda item: -item[1])[: self.n_best]
        passage = rows[0]["passage"]
        spans = [Span(passage[start:end], start, end, score) for (start, end), score in ranked]
        return spans, min(float(output["null_score"]) for output in outputs)

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Ask for the logits of where the best answer in the window starts and ends, "no answer" among them."""
        del params
        if target:
            raise UserError("--target: the answer that is predicted is explained, and no other can be named")
        start, end = int(output["start"][0]), int(output["end"][0])
        if not np.isfinite(output["score"][0]) or (
            self.null_threshold is not None and output["null_score"] - output["score"][0] > self.null_threshold
        ):
            start = end = 0
        title = "the logits of the answer's start and end" if end else "the logits of 'no answer'"
        choice = {"start": start, "end": end}
        return [Question(title, batch, encoders.inputs(self.model), _span, choice, ("start", "end"), start)]

    def _logits(self, params: Params, batch: Batch, rngs: dict[str, jax.Array]) -> jax.Array:
        """Return [2, B, T]: the logits of start and end, -inf where no answer can be."""
        logits_BxTx2 = encoders.logits(self.model, params, batch, rngs)
        possible_BxT = (batch["context_mask"] != 0).at[:, 0].set(True)
        return jnp.where(possible_BxT, jnp.moveaxis(logits_BxTx2, -1, 0), -jnp.inf)


def _span(model: nn.Module, inputs: Sequence[jax.Array | None], choice: Mapping[str, jax.Array]) -> jax.Array:
    """Return the logits of a start and of an end, float32 [B, 2]: see `Question.score`."""
    logits_BxTx2: Any = model(*inputs)
    found = [logits_BxTx2[:, choice[name], i] for i, name in enumerate(("start", "end"))]
    return jnp.stack(found, axis=1).astype(jnp.float32)


def _loss(logits_2xBxT: jax.Array, batch: Batch) -> Mean:
    targets_2xB = jnp.stack([batch["start"], batch["end"]])
    each_2xB = optax.softmax_cross_entropy_with_integer_labels(logits_2xBxT, targets_2xB)
    return Mean.of(each_2xB.mean(axis=0), batch["mask"])


def _accuracies(logits_2xBxT: jax.Array, batch: Batch) -> dict[str, Mean]:
    return {
        f"{name}_accuracy": Mean.of(logits_BxT.argmax(axis=-1) == batch[name], batch["mask"])
        for name, logits_BxT in zip(("start", "end"), logits_2xBxT)
    }
