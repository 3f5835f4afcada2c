"""Spans: the loss against its formula, the best spans against brute force, answers from several windows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data import tokenizer
from research.data.question_answering import Windows
from research.errors import UserError
from research.tasks.question_answering import QuestionAnswering, Span

LENGTH = 12


class Given(nn.Module):
    """A model whose logits are its parameters: the first token picks a row."""

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        table = self.param("logits", nn.initializers.normal(2.0), (8, LENGTH, 2))
        return table[input_ids[:, 0]]


def setup(rows=4, **fields):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (8, LENGTH, 2)).astype(np.float32)
    context = np.zeros((rows, LENGTH), np.int32)
    context[:, 4:10] = 1
    batch = {
        "input_ids": jnp.arange(rows, dtype=jnp.int32)[:, None] * jnp.ones((1, LENGTH), jnp.int32),
        "attention_mask": jnp.ones((rows, LENGTH), jnp.int32),
        "context_mask": jnp.asarray(context),
        "start": jnp.array([4, 0, 6, 9], jnp.int32)[:rows],
        "end": jnp.array([5, 0, 6, 9], jnp.int32)[:rows],
        "mask": jnp.ones(rows),
    }
    task = QuestionAnswering(Given(), **fields)
    return task, {"logits": jnp.asarray(logits)}, batch, logits[:rows].astype(np.float64)


POSSIBLE = [0, 4, 5, 6, 7, 8, 9]


def test_loss_is_the_mean_cross_entropy_over_the_passage_and_the_first_token():
    task, params, batch, logits = setup()
    expected, hits = [], []
    for k, name in enumerate(("start", "end")):
        row = logits[:, POSSIBLE, k]
        log_probabilities = row - np.log(np.exp(row).sum(axis=1, keepdims=True))
        targets = [POSSIBLE.index(int(t)) for t in batch[name]]
        expected.append(-log_probabilities[np.arange(4), targets])
        hits.append((row.argmax(axis=1) == targets).mean())
    total, scores = task.loss(params, batch, jax.random.key(0))
    assert float(total.compute()) == pytest.approx(np.mean(expected), rel=1e-5)
    assert [float(scores[f"{name}_accuracy"].compute()) for name in ("start", "end")] == pytest.approx(hits)
    np.testing.assert_allclose(task.metrics(params, batch)["loss"].compute(), total.compute())


def test_what_is_masked_moves_nothing():
    task, params, batch, _ = setup()
    # The last row is one that fills a batch up: its passage is empty, its answer still that of another row.
    empty = batch["context_mask"].at[3].set(0)
    batch |= {"mask": jnp.array([1.0, 0.0, 1.0, 0.0]), "context_mask": empty}
    assert np.isfinite(task.metrics(params, batch)["loss"].compute())
    gradient = jax.grad(lambda p: task.loss(p, batch, jax.random.key(0))[0].compute())(params)["logits"]
    assert np.isfinite(gradient).all()
    assert not np.abs(gradient[jnp.array([1, 3])]).any()
    assert not np.abs(gradient[:, 1:4]).any()
    assert not np.abs(gradient[:, 10:]).any()
    assert np.abs(gradient[0, 4:10]).all()
    assert np.abs(gradient[0, 0]).all()


@pytest.mark.parametrize(("longest", "n_best"), [(1, 3), (3, 20), (30, 5), (30, 100)])
def test_best_spans_are_those_of_trying_all(longest, n_best):
    task, params, batch, logits = setup(max_answer_length=longest, n_best=n_best)
    outputs = jax.device_get(jax.jit(task.predict)(params, batch, jax.random.key(0)))
    for b in range(4):
        every = {
            (s, e): logits[b, s, 0] + logits[b, e, 1] for s in range(4, 10) for e in range(s, min(s + longest, 10))
        }
        ranked = sorted(every, key=every.get, reverse=True)[:n_best]
        finite = np.isfinite(outputs["score"][b])
        assert list(zip(outputs["start"][b][finite], outputs["end"][b][finite])) == ranked
        np.testing.assert_allclose(outputs["score"][b][finite], [every[span] for span in ranked], rtol=1e-5)
        assert outputs["null_score"][b] == pytest.approx(logits[b, 0].sum(), rel=1e-5)
        assert len(task.describe({name: value[b] for name, value in outputs.items()})["n_best"]) == len(ranked)


def output(spans, null_score):
    start, end, score = (np.array(column) for column in zip(*spans))
    return {"start": start, "end": end, "score": score.astype(np.float32), "null_score": np.float32(null_score)}


@pytest.fixture(scope="module")
def windows():
    op = Windows(tokenizer.byte_level(), max_length=17, max_question_length=2, stride=4)
    rows = op({"question": "?", "context": "abcdefghijklmnopqrstuvwxyz"})
    # "[CLS] ? [SEP]", then 13 letters, of which 4 come again
    assert ["".join(r["passage"][a:b] for a, b in r["offsets"]) for r in rows] == [
        "abcdefghijklm",
        "jklmnopqrstuv",
        "stuvwxyz",
    ]
    return rows


OUTPUTS = [
    output([(12, 13, 3.0), (3, 3, 1.0)], -1.0),  # "jk", "a"
    output([(3, 4, 5.0), (15, 15, 4.0)], -2.0),  # "jk" again, "v"
    output([(6, 10, 2.0), (0, 0, -np.inf)], 5.5),  # "vwxyz"
]


def test_answers_come_from_all_windows(windows):
    task = QuestionAnswering(Given(), n_best=3)
    spans, null_score = task.spans(windows, OUTPUTS)
    assert spans == [Span("jk", 9, 11, 5.0), Span("v", 21, 22, 4.0), Span("vwxyz", 21, 26, 2.0)]
    assert null_score == -2
    described = task.describe_rows(windows, OUTPUTS)
    assert described["answer"] == "jk"
    weights = np.exp([5, 4, 2])
    assert [entry["score"] for entry in described["n_best"]] == pytest.approx(weights / weights.sum())
    assert described["score"] == described["n_best"][0]["score"]
    assert described["n_best"][1] == {"answer": "v", "score": described["n_best"][1]["score"], "start": 21, "end": 22}


@pytest.mark.parametrize(("threshold", "answer"), [(0.0, "jk"), (-6.9, "jk"), (-7.1, "")])
def test_no_answer_where_it_scores_better_by_more_than_the_threshold(threshold, answer, windows):
    described = QuestionAnswering(Given(), null_threshold=threshold).describe_rows(windows, OUTPUTS)
    assert described["answer"] == answer
    assert "" in [entry["answer"] for entry in described["n_best"]]
    assert sum(entry["score"] for entry in described["n_best"]) == pytest.approx(1)
    assert described["score"] == next(e["score"] for e in described["n_best"] if e["answer"] == answer)


def test_nothing_to_choose_from(windows):
    nothing = output([(0, 0, -np.inf)], 1.0)
    described = QuestionAnswering(Given()).describe_rows(windows[:1], [nothing])
    assert described == {"answer": "", "score": 1.0, "n_best": [{"answer": "", "score": 1.0, "start": 0, "end": 0}]}


def test_mistakes():
    task, _, batch, _ = setup()
    spec = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()}
    assert task.init(jax.random.key(0), spec)["logits"].shape == (8, LENGTH, 2)
    spec.pop("context_mask")
    with pytest.raises(UserError, match=r"config\.data\.features: 'context_mask' is missing"):
        task.init(jax.random.key(0), spec)
    with pytest.raises(UserError, match=r"config\.task\.n_best: 0 must be at least 1"):
        QuestionAnswering(Given(), n_best=0)
