import numpy as np
import pytest

from research.data import tokenizer
from research.data.text import Tokenize, text_of
from research.errors import UserError


def test_one_text_and_pairs_are_framed_and_cut():
    tokens = tokenizer.byte_level()
    one = Tokenize(tokens, max_length=6)({"text": "abcdefgh", "label": 1})
    assert tokens.decode(one["input_ids"], skip_special=False) == "[CLS]abcd[SEP]"
    assert one["label"] == 1
    pair = Tokenize(tokens, ("premise", "hypothesis"), max_length=8)({"premise": "abcdefgh", "hypothesis": "xy"})
    assert tokens.decode(pair["input_ids"], skip_special=False) == "[CLS]abc[SEP]xy[SEP]"
    np.testing.assert_array_equal(pair["token_type_ids"], [0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(pair["attention_mask"], np.ones(8))


def test_mistakes():
    assert text_of({"text": "a"}, "text") == "a"
    with pytest.raises(UserError, match=r"an example has no text field 'text'; did you mean 'texts'\?"):
        text_of({"texts": "a"}, "text")
    with pytest.raises(UserError, match="an example's field 'text' must be text, not"):
        Tokenize(tokenizer.byte_level())({"text": 3})
    with pytest.raises(UserError, match="one field or a pair of fields"):
        Tokenize(tokenizer.byte_level(), ("a", "b", "c"))
