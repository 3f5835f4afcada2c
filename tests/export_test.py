"""What an exported folder says of its tokenizer; `modes_test.py` exports whole runs."""

import types

import pytest

from research import export
from research.models import bert
from research.models.encoder_decoder import EncoderDecoder

TOKENIZER = types.SimpleNamespace(pad_id=3, bos_id=None, eos_id=0)


@pytest.mark.parametrize(
    ("model", "more"), [(bert.MaskedLM(bert.Encoder()), {}), (EncoderDecoder(), {"decoder_start_token_id": 3})]
)
def test_special_tokens_are_those_of_the_tokenizer(model, more):
    assert export.special_tokens(model, TOKENIZER) == {"pad_token_id": 3, "eos_token_id": 0} | more
