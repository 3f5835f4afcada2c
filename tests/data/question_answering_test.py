"""Windows of a passage: what a window leaves out another one holds, and its targets point at the answer."""

import numpy as np
import pytest
import tokenizers

from research.data import tokenizer
from research.data.question_answering import Windows
from research.errors import UserError

QUESTION, CONTEXT = "who jumps?", "the quick brown fox jumps over the naïve 映画 dog"


@pytest.fixture(scope="module")
def bytes_():
    return tokenizer.byte_level()


@pytest.fixture(scope="module")
def wordpiece():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"who jump ##s ? the quick brown fox over dog na ##ive .".split()]
    vocabulary = {word: i for i, word in enumerate(words)}
    return tokenizer.Tokenizer(tokenizers.BertWordPieceTokenizer(vocabulary)._tokenizer, 0)


def example(text="fox", **fields):
    answers = {"text": [text], "answer_start": [CONTEXT.index(text)]}
    return {"question": QUESTION, "context": CONTEXT, "answers": answers, "id": "x"} | fields


def read(window, begin=None, end=None):
    """What the passage's tokens from `begin` to `end` stand for."""
    inside = window["offsets"][window["context_mask"] == 1] if begin is None else window["offsets"][begin : end + 1]
    return CONTEXT[inside[0, 0] : inside[-1, 1]]


def test_one_window_is_the_pair_as_the_tokenizer_encodes_it(wordpiece):
    (window,) = Windows(wordpiece, max_length=96, max_question_length=16, stride=8)(example())
    pair = wordpiece.backend.encode(QUESTION, CONTEXT)
    np.testing.assert_array_equal(window["input_ids"], pair.ids)
    np.testing.assert_array_equal(window["token_type_ids"], pair.type_ids)
    np.testing.assert_array_equal(window["attention_mask"], 1)
    assert read(window) == CONTEXT
    assert read(window, window["start"], window["end"]) == "fox"
    assert window["id"] == "x"
    assert {window[k].dtype for k in ("input_ids", "token_type_ids", "context_mask", "start", "end")} == {
        np.dtype(np.int32)
    }


@pytest.mark.parametrize(("max_length", "stride"), [(24, 4), (20, 0), (31, 7), (200, 3)])
def test_windows_are_those_of_the_tokenizers_own_truncation(max_length, stride, bytes_):
    windows = Windows(bytes_, max_length=max_length, stride=stride, max_question_length=10)(example())
    backend = tokenizers.Tokenizer.from_str(bytes_.backend.to_str())
    backend.enable_truncation(max_length, stride=stride, strategy="only_second")
    first = backend.encode(QUESTION, CONTEXT)
    expected = [first, *first.overflowing]
    assert [list(w["input_ids"]) for w in windows] == [e.ids for e in expected]
    assert [list(w["token_type_ids"]) for w in windows] == [e.type_ids for e in expected]
    assert [int(w["window"]) for w in windows] == list(range(len(windows)))
    inside = [[n == 1 for n in e.sequence_ids] for e in expected]
    assert [list(w["context_mask"]) for w in windows] == inside
    for window, encoding in zip(windows, expected):
        offsets = np.asarray(encoding.offsets) * window["context_mask"][:, None]
        np.testing.assert_array_equal(window["offsets"], offsets)


def test_targets_are_the_answer_where_it_is_whole_and_nothing_elsewhere(bytes_):
    windows = Windows(bytes_, max_length=28, stride=8, max_question_length=10)(example("brown fox"))
    held = ["brown fox" in read(window) for window in windows]
    assert sum(held) >= 1
    assert not all(held)
    for window, whole in zip(windows, held):
        if whole:
            assert read(window, window["start"], window["end"]) == "brown fox"
        else:
            assert (window["start"], window["end"]) == (0, 0)


@pytest.mark.parametrize("text", ["the", "naïve", "映画", "dog", CONTEXT, "s over", "jumps"])
def test_targets_read_back_as_the_answer(text, bytes_, wordpiece):
    for kind in (bytes_, wordpiece):
        (window,) = Windows(kind, max_length=128, stride=16)(example(text))
        assert read(window, window["start"], window["end"]) == text


def test_no_answer_and_unknown_answer(bytes_):
    op = Windows(bytes_, max_length=128, stride=16)
    (window,) = op(example(answers={"text": [], "answer_start": []}))
    assert (window["start"], window["end"]) == (0, 0)
    (window,) = op({"question": QUESTION, "context": CONTEXT})
    assert "start" not in window


def test_of_several_answers_the_first_counts(bytes_):
    answers = {"text": np.array(["dog", "fox"]), "answer_start": np.array([CONTEXT.index("dog"), 16])}
    (window,) = Windows(bytes_, max_length=128, stride=16)(example(answers=answers))
    assert read(window, window["start"], window["end"]) == "dog"


def test_a_long_question_is_cut_and_an_empty_passage_has_one_window(bytes_):
    op = Windows(bytes_, max_length=40, stride=5, max_question_length=12)
    windows = op(example(question="why " * 50))
    assert {len(w["input_ids"]) for w in windows[:-1]} == {40}
    for window in windows:
        frame = window["input_ids"][window["context_mask"] == 0]
        assert bytes_.backend.decode(list(frame), skip_special_tokens=True) == "why why why "
    (window,) = op({"question": QUESTION, "context": ""})
    assert window["context_mask"].sum() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": None}, "an example has no text 'question'"),
        ({"answers": {"text": ["fox"], "answer_start": [3]}}, "'answers': 'fox' does not stand at character 3 of"),
        ({"answers": {"text": ["fox"], "answer_start": [-3]}}, "does not stand at character -3"),
        ({"answers": "fox"}, "'answers' is not the two lists"),
    ],
)
def test_examples_that_are_wrong(fields, message, bytes_):
    with pytest.raises(UserError, match=message):
        Windows(bytes_, max_length=128, stride=16)(example(**fields))


def test_settings_that_do_not_go_together(bytes_):
    with pytest.raises(UserError, match="stride: 128 must be at least 0 and less than the 61 tokens"):
        Windows(bytes_, max_length=128, stride=128)
    with pytest.raises(UserError, match="max_question_length: 0"):
        Windows(bytes_, max_question_length=0)
    bare = tokenizers.Tokenizer.from_str(bytes_.backend.to_str())
    bare.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    with pytest.raises(UserError, match="no special token first"):
        Windows(tokenizer.Tokenizer(bare, 0))
