"""Labels of words at the first token of each, whatever the tokenizer does with spaces."""

import numpy as np
import pytest
import tokenizers

from research.data import tokenizer
from research.data.token_classification import AlignLabels
from research.errors import UserError

WORDS = ["Zoë", "lives", "in", "Cape-Town", "."]
LABELS = [1, 0, 0, 5, 0]


def wordpiece():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"zoe li ##ves in cape - town .".split()]
    backend = tokenizers.BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)})._tokenizer
    return tokenizer.Tokenizer(backend, 0)


def prefixed():
    """Words carry the space before them, as GPT-2's and RoBERTa's tokens do."""
    alphabet = [*"ZlivesnCapTow.-", "Ġ", "Ã", "«"]
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet, "in", "Ġin"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("i", "n"), ("Ġ", "in")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return tokenizer.Tokenizer(backend, 0)


KINDS = {"wordpiece": wordpiece, "prefixed": prefixed, "bytes": tokenizer.byte_level}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_every_word_carries_its_label(kind):
    kind = KINDS[kind]()
    row = AlignLabels(kind, max_length=64)({"tokens": WORDS, "ner": np.array(LABELS), "id": 7})
    encoding = kind.backend.encode(" ".join(WORDS))
    np.testing.assert_array_equal(row["input_ids"], encoding.ids)
    np.testing.assert_array_equal(row["targets"][row["target_mask"] == 1], LABELS)
    assert row["targets"][row["target_mask"] == 0].sum() == 0
    text = " ".join(WORDS)
    for word, token in zip(WORDS, row["first_tokens"]):
        start, end = encoding.offsets[token]
        assert word.startswith(text[start:end].strip())
        assert text[start:end].strip()
    assert (row["words"], row["id"]) == (WORDS, 7)


def test_wordpieces_are_those_of_words_that_are_split_before():
    row = AlignLabels(wordpiece(), max_length=64)({"tokens": WORDS})
    encoding = wordpiece().backend.encode(WORDS, is_pretokenized=True)
    assert list(row["input_ids"]) == encoding.ids
    assert list(row["first_tokens"]) == [encoding.word_ids.index(i) for i in range(len(WORDS))]
    assert "targets" not in row


def test_words_that_leave_no_token():
    row = AlignLabels(wordpiece(), max_length=64)({"tokens": ["zoe", "\u200b", "in"], "ner": [1, 2, 3]})
    assert list(row["first_tokens"]) == [1, -1, 2]
    assert list(row["targets"]) == [0, 1, 3, 0]
    row = AlignLabels(wordpiece(), max_length=5)({"tokens": WORDS, "ner": LABELS})
    assert list(row["first_tokens"]) == [1, 2, -1, -1, -1]
    assert len(row["input_ids"]) == 5
    assert list(row["target_mask"]) == [0, 1, 1, 0, 0]


def test_no_words():
    assert AlignLabels(wordpiece())({"tokens": [], "ner": []})["target_mask"].sum() == 0


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"token": ["a"]}, "an example has no list of words 'tokens'; did you mean 'token'"),
        ({"tokens": "a b"}, "an example has no list of words 'tokens'"),
        ({"tokens": ["a", 3]}, "an example has no list of words 'tokens'"),
        ({"tokens": ["a", "b"], "ner": [1]}, "'ner' has 1 labels for 2 words"),
        ({"tokens": ["a"], "ner": ["O"]}, "'ner' holds .*'O'.*, not the number of a class"),
    ],
)
def test_examples_that_are_wrong(example, message):
    with pytest.raises(UserError, match=message):
        AlignLabels(wordpiece())(example)
