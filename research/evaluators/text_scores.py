"""Metrics of generated texts against references, as functions of lists.

BLEU (Papineni 2002) and chrF (Popović 2015) are sacreBLEU's, between 0 and 100, and to be quoted with its signature
(Post 2018). ROUGE (Lin 2004), exact match and F1 of words are fractions in [0, 1].
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sacrebleu

Texts = Sequence[str]
References = Sequence[Sequence[str]]  # one or more per text

PUNCTUATION = str.maketrans("", "", string.punctuation)


def bleu(predictions: Texts, references: References) -> float:
    """Return the BLEU of a whole corpus, by sacreBLEU's defaults (13a tokens, mixed case, exponential smoothing)."""
    return sacrebleu.BLEU().corpus_score(predictions, _streams(references)).score


def chrf(predictions: Texts, references: References) -> float:
    """Return the chrF2 of a whole corpus, by sacreBLEU's defaults (character 6-grams, no words)."""
    return sacrebleu.CHRF().corpus_score(predictions, _streams(references)).score


def rouge1(predictions: Texts, references: References) -> float:
    """Return the mean F1 of common words, the best over a text's references; words are not stemmed."""
    return _mean(lambda text, reference: _rouge_n(text, reference, 1), predictions, references)


def rouge2(predictions: Texts, references: References) -> float:
    """Return the mean F1 of common pairs of words."""
    return _mean(lambda text, reference: _rouge_n(text, reference, 2), predictions, references)


def rouge_l(predictions: Texts, references: References) -> float:
    """Return the mean F1 of the longest common subsequence of words, with the text as one sentence."""
    return _mean(lambda text, reference: _rouge_lcs([text], [reference]), predictions, references)


def rouge_lsum(predictions: Texts, references: References) -> float:
    """Return the mean F1 of the union of longest common subsequences of sentences, which are lines."""
    return _mean(lambda text, reference: _rouge_lcs(text.split("\n"), reference.split("\n")), predictions, references)


def exact_match(predictions: Texts, references: References) -> float:
    """Return the share of texts that equal a reference but for case, punctuation, articles and space (SQuAD's)."""
    return _mean(same, predictions, references)


def token_f1(predictions: Texts, references: References) -> float:
    """Return the mean F1 of words, normalised as for `exact_match`; two empty texts agree."""
    return _mean(overlap_v2, predictions, references)


def normalise(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without punctuation, articles and superfluous space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def same(prediction: str, answer: str) -> float:
    """Return 1 if two texts are the same when normalised, else 0."""
    return float(normalise(prediction) == normalise(answer))


def overlap(prediction: str, answer: str) -> float:
    """Return the F1 of the normalised words of two texts; 0 where none is common."""
    predicted, right = normalise(prediction).split(), normalise(answer).split()
    common = collections.Counter(predicted) & collections.Counter(right)
    return _f1(common.total(), len(predicted), len(right))


def overlap_v2(prediction: str, answer: str) -> float:
    """Return `overlap`, but 1 for two texts that are empty when normalised."""
    return overlap(prediction, answer) or float(not normalise(prediction) and not normalise(answer))


SCORES: dict[str, Callable[[Texts, References], float]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge1": rouge1,
    "rouge2": rouge2,
    "rougeL": rouge_l,
    "rougeLsum": rouge_lsum,
    "exact_match": exact_match,
    "f1": token_f1,
}


def signature(name: str, references: References) -> str:
    """Return sacreBLEU's signature of "bleu" or "chrf" on such references; "" for the other scores."""
    kinds = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}
    if name not in kinds:
        return ""
    metric = kinds[name]()
    metric.corpus_score([""] * len(references), _streams(references))
    return str(metric.get_signature())


def _streams(references: References) -> list[list[Any]]:
    """Return the first references of all texts, the second ones, ...; None where a text has no more."""
    most = max(map(len, references))
    return [[each[i] if i < len(each) else None for each in references] for i in range(most)]


def _mean(each: Callable[[str, str], float], predictions: Texts, references: References) -> float:
    """Return the mean over texts of the best score over their references."""
    return float(np.mean([max(each(text, one) for one in those) for text, those in zip(predictions, references)]))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _f1(common: int, predicted: int, right: int) -> float:
    return 2 * common / (predicted + right) if common else 0.0


def _rouge_n(text: str, reference: str, n: int) -> float:
    predicted, right = (
        collections.Counter(zip(*(words[i:] for i in range(n)))) for words in (_words(text), _words(reference))
    )
    return _f1((predicted & right).total(), predicted.total(), right.total())


def _rouge_lcs(text: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of the words that are on a longest common subsequence, given sentences."""
    predicted, right = [_words(line) for line in text], [_words(line) for line in reference]
    left = collections.Counter(word for line in predicted for word in line)
    common = 0
    for line in right:
        places = set().union(*(_common_places(line, other) for other in predicted))
        # A predicted word matches at most one word of the reference.
        matched = collections.Counter(line[i] for i in places) & left
        left -= matched
        common += matched.total()
    return _f1(common, sum(map(len, predicted)), sum(map(len, right)))


def _common_places(words: Sequence[str], others: Sequence[str]) -> set[int]:
    """Return where in `words` a longest common subsequence with `others` is; of several, the last."""
    lengths = np.zeros((len(words) + 1, len(others) + 1), int)
    same = np.asarray(words, object)[:, None] == np.asarray(others, object)[None]
    for i in range(len(words)):
        # Lengths never decrease along a row, so the left neighbour is a running maximum.
        lengths[i + 1, 1:] = np.maximum.accumulate(np.maximum(lengths[i, 1:], (lengths[i, :-1] + 1) * same[i]))
    places, i, j = set(), len(words), len(others)
    while i and j:
        if same[i - 1, j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif lengths[i, j - 1] > lengths[i - 1, j]:
            j -= 1
        else:
            i -= 1
    return places
