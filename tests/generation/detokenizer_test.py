"""Text out of tokens as they come: nothing is shown that a later token would change."""

import dataclasses

import pytest

from research.data import tokenizer, tokenizer_training
from research.generation.detokenizer import Detokenizer, completion

BYTES = tokenizer.byte_level()
TEXT = "naïve 映画 🎬, done. STOP here"


def ids(text):
    return BYTES.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("stop", [(), ("STOP",), ("STOP", ", done"), ("映画",), ("🎬, d", "nowhere"), ("SS", "STOPS")])
def test_pieces_make_the_text_before_the_first_stop(stop):
    detokenizer = Detokenizer(BYTES, stop)
    pieces = []
    for id in ids(TEXT):
        pieces.append(detokenizer.add([id]))
        assert "\ufffd" not in pieces[-1]
        if detokenizer.ended:
            break
    pieces.append(detokenizer.close())
    expected = TEXT[: min([TEXT.find(text) for text in stop if text in TEXT], default=len(TEXT))]
    assert "".join(pieces) == expected == completion(BYTES, ids(TEXT), stop)
    assert detokenizer.ended == (expected != TEXT)
    assert detokenizer.add(ids("more")) == ("" if detokenizer.ended else "more")


@pytest.mark.parametrize("stop", [("b", "abcd"), ("abcd", "bc", "cd"), ("ab", "b"), ("abcx", "d", "cde")])
def test_of_stops_that_overlap_the_same_one_counts_however_tokens_come(stop):
    detokenizer = Detokenizer(BYTES, stop)
    assert "".join(detokenizer.add([id]) for id in ids("xabcde")) == completion(BYTES, ids("xabcde"), stop)


def test_text_is_held_back_no_longer_than_it_must_be():
    detokenizer = Detokenizer(BYTES, ("abc",))
    assert [detokenizer.add(ids(letter)) for letter in "xababd"] == ["x", "", "", "ab", "", "abd"]
    assert detokenizer.add(ids("a")) == ""
    assert detokenizer.close() == "a"


def test_bytes_that_are_no_text_come_at_the_end():
    detokenizer = Detokenizer(BYTES)
    half = ids("é")[:1]
    assert detokenizer.add(half) == ""
    assert detokenizer.close() == "\ufffd"


def test_an_end_token_ends_the_text():
    assert completion(BYTES, [*ids("ab"), BYTES.eos_id, *ids("c")]) == "ab"
    several = dataclasses.replace(BYTES, more_ends=(ids("d")[0],))
    assert completion(several, ids("abdc")) == "ab"


def test_a_special_token_may_be_a_stop_text():
    end = BYTES.backend.token_to_id("[MASK]")
    assert completion(BYTES, [*ids("ab"), end, *ids("c")]) == "abc"
    assert completion(BYTES, [*ids("ab"), end, *ids("c")], ("[MASK]",)) == "ab"
    assert completion(BYTES, [*ids("abc"), end], ("[MASK]", "b")) == "a"
    detokenizer = Detokenizer(BYTES, ("[MASK]", "abc"))
    assert [detokenizer.add([id]) for id in (*ids("xab"), end)] == ["x", "", "", "ab"]
    assert detokenizer.ended
    assert detokenizer.add(ids("more")) == detokenizer.close() == ""


def test_the_space_after_the_prompt():
    trained = tokenizer_training.train([{"text": "some words and more words"}] * 3, kind="unigram", vocab_size=40)
    prompt, rest = (trained.backend.encode(t, add_special_tokens=False).ids for t in ("some words", "and more words"))
    assert completion(trained, rest, prompt=prompt) == " and more words"
    assert completion(trained, rest) == "and more words"
