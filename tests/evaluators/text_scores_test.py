"""Scores of texts: cases worked out by hand, and equality with the packages that everybody quotes."""

import numpy as np
import pytest
import sacrebleu

from research.evaluators import text_scores
from research.evaluators.text_scores import SCORES


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Cat, and an-other\tdog.", "cat and another dog"),
        ("A", ""),
        ("theatre a b", "theatre b"),
        ("“quoted”", "“quoted”"),
        ("U.S.A's", "usas"),
    ],
)
def test_normalise(text, normalised):
    assert text_scores.normalise(text) == normalised


@pytest.mark.parametrize(
    ("prediction", "answer", "same", "overlap"),
    [
        ("the Cat.", "cat", 1, 1),
        ("black cat", "the cat sat", 0, 2 * 1 / 4),
        ("cat cat", "cat", 0, 2 * 1 / 3),
        ("dog", "cat", 0, 0),
        ("", "the", 1, 0),
        ("", "cat", 0, 0),
    ],
)
def test_pairs(prediction, answer, same, overlap):
    assert text_scores.same(prediction, answer) == same
    assert text_scores.overlap(prediction, answer) == pytest.approx(overlap)
    assert text_scores.overlap_v2(prediction, answer) == pytest.approx(1 if not prediction and same else overlap)


TEXTS = ["the cat sat on the mat", "a dog", "nothing alike at all"]
REFERENCES = [["the cat lay on the mat", "cats sit"], ["a dog"], ["something else entirely here"]]


def test_bleu_and_chrf_are_sacrebleus():
    streams = [["the cat lay on the mat", "a dog", "something else entirely here"], ["cats sit", None, None]]
    assert SCORES["bleu"](TEXTS, REFERENCES) == sacrebleu.corpus_bleu(TEXTS, streams).score
    assert SCORES["chrf"](TEXTS, REFERENCES) == sacrebleu.corpus_chrf(TEXTS, streams).score
    assert SCORES["bleu"](TEXTS, [[text] for text in TEXTS]) == pytest.approx(100)
    assert text_scores.signature("bleu", [["x"]] * 2).startswith(
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    )
    assert text_scores.signature("chrf", [["x"]]).startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert text_scores.signature("bleu", REFERENCES).startswith("nrefs:var|")
    assert text_scores.signature("rouge1", REFERENCES) == ""


def test_rouge_by_hand():
    text, reference = ["the cat sat. the cat ran"], [["The cat ran! A cat sat"]]
    assert SCORES["rouge1"](text, reference) == pytest.approx(2 * 5 / 12)  # the, cat, cat, sat, ran
    assert SCORES["rouge2"](text, reference) == pytest.approx(2 * 3 / 10)  # the cat, cat sat, cat ran
    assert SCORES["rougeL"](text, reference) == pytest.approx(2 * 3 / 12)
    lines = [text[0].replace(". ", ".\n")]
    assert SCORES["rougeLsum"](lines, [[reference[0][0].replace("! ", "!\n")]]) == pytest.approx(2 * 5 / 12)
    assert SCORES["rouge1"]([""], [["x"]]) == SCORES["rouge2"](["x"], [["x"]]) == SCORES["rougeL"](["!"], [["x"]]) == 0
    assert SCORES["rouge1"](["b"], [["a", "b"]]) == 1


def test_of_several_references_the_best_counts():
    assert SCORES["exact_match"](["The dog", "cat"], [["a cat", "dog"], ["mouse"]]) == 0.5
    assert SCORES["f1"](["big dog", ""], [["dog", "cat"], [""]]) == pytest.approx((2 / 3 + 1) / 2)


def random_texts(rng, count):
    words = ["The", "cat,", "sat", "ran", "on", "mat", "naïve", "x-y", "9.5"]
    return [
        " ".join(rng.choice(words, rng.integers(0, 25))).replace("sat ", "sat\n").replace("ran ran", "ran\n\nran")
        for _ in range(count)
    ]


@pytest.mark.peers
def test_rouge_is_that_of_rouge_score():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    rng = np.random.default_rng(0)
    texts, references = random_texts(rng, 200), random_texts(rng, 200)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(names)
    for text, reference in zip(texts, references):
        theirs = {name: value.fmeasure for name, value in scorer.score(reference, text).items()}
        assert {name: SCORES[name]([text], [[reference]]) for name in names} == pytest.approx(theirs)
