import collections
import inspect

import numpy as np
import pytest

from research.data import language, tokenizer, tokenizer_training
from research.data.source import examples
from research.data.spans import noise_counts
from research.errors import UserError

DOCUMENTS = [
    "Call me Ishmael. Some years ago - never mind how long precisely.",
    "  Naïve café\n\n映画 🎬👩‍👩‍👧 x ",
    "a",
    "ﬁne  ﬁtting\t\u200bodd Å \uff21",
    "words <|endoftext|> and [SEP] more </s>  ",
] * 2
DTYPES = {"input_ids": np.int32, "targets": np.int32, "target_mask": np.float32, "attention_mask": np.int32}


@pytest.fixture(scope="module")
def tokenizers():
    source = examples([{"text": text} for text in DOCUMENTS] * 3)
    made = {kind: tokenizer_training.train(source, kind, 340, sentinels=30) for kind in tokenizer_training.KINDS}
    made["fallback"] = tokenizer_training.train(source, "unigram", 420, byte_fallback=True)
    return made | {"bytes": tokenizer.byte_level(sentinels=30)}


KINDS = (*tokenizer_training.KINDS, "fallback", "bytes")
kinds = pytest.mark.parametrize("kind", KINDS)


def plain(tokens, text):
    return tokens.backend.encode(text, add_special_tokens=False).ids


@kinds
def test_causal_targets_are_what_comes_next(kind, tokenizers):
    tokens = tokenizers[kind]
    (made,) = language.CausalTokens(tokens)({"text": DOCUMENTS[0], "id": 7})
    ids = plain(tokens, DOCUMENTS[0])
    begin = tokens.eos_id if tokens.bos_id is None else tokens.bos_id
    assert made["input_ids"].tolist() == [begin, *ids]
    assert made["targets"].tolist() == [*ids, tokens.eos_id]
    assert made["target_mask"].tolist() == made["attention_mask"].tolist() == [1] * len(made["targets"])
    assert made["id"] == 7
    assert {name: made[name].dtype for name in DTYPES} == DTYPES
    (bare,) = language.CausalTokens(tokens, bos=False, eos=False)({"text": DOCUMENTS[0]})
    assert (bare["input_ids"].tolist(), bare["targets"].tolist()) == (ids[:-1], ids[1:])


@kinds
@pytest.mark.parametrize("length", [1, 3, 7, 1000])
def test_causal_pieces_have_every_target_once(kind, length, tokenizers):
    whole = language.CausalTokens(tokenizers[kind], target_bytes=True)
    cut = language.CausalTokens(tokenizers[kind], max_length=length, target_bytes=True)
    assert cut.max_length == length
    for document in DOCUMENTS[:5]:
        (expected,) = whole({"text": document})
        pieces = cut({"text": document})
        assert all(len(piece["targets"]) == length for piece in pieces[:-1])
        for name in whole.padding:
            np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), expected[name])
        for piece in pieces:
            np.testing.assert_array_equal(piece["input_ids"][1:], piece["targets"][:-1])


@kinds
def test_target_bytes_are_those_of_the_document(kind, tokenizers):
    op = language.CausalTokens(tokenizers[kind], target_bytes=True)
    for document in DOCUMENTS[:5]:
        (made,) = op({"text": document})
        assert made["target_bytes"].sum() == len(document.encode())
        assert made["target_bytes"].dtype == np.int32
        assert made["target_bytes"][-1] == 0
        if kind == "bytes":
            assert (made["target_bytes"][:-1] == 1)[: len(document.encode()) - 30].all()
    (words,) = op({"text": "Call me"})
    if kind == "bpe":
        ids = [tokenizers[kind].backend.id_to_token(int(i)) for i in words["targets"][:-1]]
        assert words["target_bytes"].tolist() == [*map(len, ids), 0]
    assert op({"text": ""}) == []


def test_bytes_of_tokens():
    offsets = np.array([(1, 2), (2, 3), (2, 3), (2, 3), (5, 5), (5, 6)])
    found = language.token_bytes(" aé🎬b c ", offsets)
    # " a", then é shared by three, what lies between, and the rest with the last one
    assert found.tolist() == [2, 1, 1, 0, 5, 3]
    assert language.token_bytes("é", np.array([(0, 1), (0, 1)])).tolist() == [1, 1]


def test_what_causal_tokens_need(tokenizers):
    with pytest.raises(UserError, match=r"an example has no text field 'body'; did you mean 'bod'\?"):
        language.CausalTokens(tokenizers["bpe"], field="body")({"bod": "x"})
    with pytest.raises(UserError, match="target_bytes: "):
        language.CausalTokens(tokenizers["bpe"], bos=False, target_bytes=True)
    with pytest.raises(UserError, match="max_length: 0 is less than 1"):
        language.CausalTokens(tokenizers["bpe"], max_length=0)
    nothing = tokenizer.Tokenizer(tokenizers["bpe"].backend, 0)
    with pytest.raises(UserError, match="bos: the tokenizer has no token"):
        language.CausalTokens(nothing)
    with pytest.raises(UserError, match="eos: the tokenizer has no such token"):
        language.CausalTokens(nothing, bos=False)
    assert len(language.CausalTokens(nothing, bos=False, eos=False)({"text": "walk on"})) == 1


@kinds
def test_pieces_are_framed_and_lose_nothing(kind, tokenizers):
    tokens = tokenizers[kind]
    pieces = language.Pieces(tokens, max_length=8)({"text": DOCUMENTS[0]})
    frame = set(tokens.backend.encode("").ids)
    inside = []
    for piece in pieces:
        assert len(piece["input_ids"]) <= 8
        framed = piece["words"] == -1
        assert set(piece["input_ids"][framed].tolist()) == frame
        assert framed.sum() == len(tokens.backend.encode("").ids)
        inside += piece["input_ids"][~framed].tolist()
        assert piece["attention_mask"].tolist() == [1] * len(framed)
        assert piece["token_type_ids"].tolist() == [0] * len(framed)
    assert inside == plain(tokens, DOCUMENTS[0])
    assert all(len(piece["input_ids"]) == 8 for piece in pieces[:-1])
    if kind in ("wordpiece", "bytes"):
        first = pieces[0]["input_ids"]
        assert (first[0], first[-1]) == (tokens.cls_id, tokens.sep_id)
    assert language.Pieces(tokens, max_length=8)({"text": ""}) == []


def test_pieces_need_room(tokenizers):
    with pytest.raises(UserError, match="max_length: 2 has no room for text"):
        language.Pieces(tokenizers["wordpiece"], max_length=2)


def masked(tokens, text, seed, **options):
    (piece,) = language.Pieces(tokens, max_length=4096)({"text": text})
    return piece, language.MaskTokens(tokens, **options)(piece, np.random.default_rng(seed))


def test_masks_are_80_10_10(tokenizers):
    tokens = tokenizers["bytes"]
    ids = np.random.default_rng(1).integers(4, 260, 20_000).astype(np.int32)
    ids[::10] = tokens.sep_id
    made = language.MaskTokens(tokens, share=0.2)({"input_ids": ids}, np.random.default_rng(0))
    chosen = made["target_mask"] == 1
    assert chosen.sum() == 0.2 * 18_000
    assert not (chosen & (ids == tokens.sep_id)).any()
    np.testing.assert_array_equal(made["targets"], ids)
    np.testing.assert_array_equal(made["input_ids"][~chosen], ids[~chosen])
    became, was = made["input_ids"][chosen], ids[chosen]
    assert (became == tokens.mask_id).mean() == pytest.approx(0.8, abs=0.03)
    assert (became == was).mean() == pytest.approx(0.1, abs=0.02)
    others = became[(became != tokens.mask_id) & (became != was)]
    assert len(others) / len(was) == pytest.approx(0.1, abs=0.02)
    assert not set(others.tolist()) & tokens.special_ids
    assert len(set(others.tolist())) > 150  # of all the vocabulary
    halves = np.array_split(chosen[ids != tokens.sep_id], 2)
    assert halves[0].mean() == pytest.approx(halves[1].mean(), abs=0.02)


def test_masks_are_a_function_of_the_generator(tokenizers):
    tokens = tokenizers["wordpiece"]
    first, again, other = (masked(tokens, DOCUMENTS[0], seed)[1] for seed in (0, 0, 1))
    for name in ("input_ids", "target_mask"):
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["target_mask"] != other["target_mask"]).any()
    assert first["target_mask"].sum() == round(0.15 * len(plain(tokens, DOCUMENTS[0])))
    _, short = masked(tokens, "a", 0)
    assert short["target_mask"].tolist() == [0, 1, 0]
    alone = language.MaskTokens(tokens)({"input_ids": np.array([2, 3])}, np.random.default_rng(0))
    assert alone["target_mask"].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "bytes"])
def test_whole_words(kind, tokenizers):
    tokens = tokenizers[kind]
    if tokens.mask_id is None:
        with pytest.raises(UserError, match="the tokenizer has no mask token"):
            language.MaskTokens(tokens, whole_word=True)
        return
    shares = []
    for seed in range(30):
        piece, made = masked(tokens, "unbelievable zealous quixotic paragraphs by them " * 4, seed, whole_word=True)
        chosen, words = made["target_mask"] == 1, piece["words"]
        for word in set(words.tolist()) - {-1}:
            assert len(set(chosen[words == word].tolist())) == 1
        assert not chosen[words == -1].any()
        shares.append(chosen.sum() / (words >= 0).sum())
    assert 0.1 < np.mean(shares) <= 0.155
    assert len(set(words.tolist())) > 20


def test_masks_that_are_there_are_the_ones_that_are_asked_for(tokenizers):
    tokens = tokenizers["wordpiece"]
    (piece,) = language.Pieces(tokens)({"text": "it is a [MASK] of the [MASK]."})
    made = language.MaskTokens(tokens)(piece, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(made["input_ids"], piece["input_ids"])
    np.testing.assert_array_equal(made["target_mask"] == 1, piece["input_ids"] == tokens.mask_id)
    assert made["target_mask"].sum() == 2


def test_each_text_is_an_example():
    split = language.Texts(("source", "target"))
    assert split({"source": "a", "target": "b", "id": 1}) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(UserError, match="an example has no text field 'target'"):
        split({"source": "a"})


def test_what_masking_needs(tokenizers):
    with pytest.raises(UserError, match=r"share: 1\.5 is not between 0 and 1"):
        language.MaskTokens(tokenizers["bytes"], share=1.5)
    op = language.MaskTokens(tokenizers["bytes"], whole_word=True)
    with pytest.raises(UserError, match="whole_word: the examples have no 'words'"):
        op({"input_ids": np.arange(10, 19)}, np.random.default_rng(0))


def restored(tokens, made):
    """Puts what the target holds back where it was taken from."""
    sentinels, spans = set(tokens.sentinels), {}
    for token in made["targets"].tolist():
        if token in sentinels:
            spans[token] = []
            last = token
        elif token != tokens.eos_id:
            spans[last].append(token)
    used = [token for token in made["input_ids"].tolist() if token in sentinels]
    assert used == list(spans) == list(tokens.sentinels[: len(used)])
    text = []
    for token in made["input_ids"].tolist():
        text += spans.get(token, [token])
    assert text.pop() == made["targets"][-1] == tokens.eos_id
    return text, spans


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_span_corruption_can_be_undone(kind, tokenizers):
    tokens = tokenizers[kind]
    op = language.SpanCorruption(tokens, max_length=40, noise_density=0.3, mean_span_length=2.5)
    for seed in range(20):
        text = "and so they went on to walk " * 9
        pieces = op({"text": text, "id": 1}, np.random.default_rng(seed))
        assert [token for piece in pieces for token in restored(tokens, piece)[0]] == plain(tokens, text)
        for piece in pieces:
            assert piece["id"] == 1
            assert len(piece["input_ids"]) <= 40
            assert len(piece["targets"]) <= op.decoder_max_length
            assert piece["decoder_input_ids"].tolist() == [tokens.pad_id, *piece["targets"][:-1]]
            for name in ("target_mask", "decoder_attention_mask"):
                assert piece[name].tolist() == [1] * len(piece["targets"])
            assert piece["attention_mask"].tolist() == [1] * len(piece["input_ids"])
            assert {name: piece[name].dtype for name in DTYPES} == DTYPES
            assert piece["decoder_input_ids"].dtype == np.int32
        assert all(len(piece["input_ids"]) == 40 for piece in pieces[:-1])
        assert all(len(piece["targets"]) == op.decoder_max_length for piece in pieces[:-1])


def test_noise_is_as_asked(tokenizers):
    tokens = tokenizers["bytes"]
    op = language.SpanCorruption(tokens, max_length=178)
    assert op.length == 197  # 30 of them noise, in 10 spans
    text = "x" * op.length
    lengths, places = collections.Counter(), np.zeros(op.length)
    for seed in range(800):
        (made,) = op({"text": text}, np.random.default_rng(seed))
        ids, position = set(tokens.sentinels), 0
        spans = [len(span) for span in restored(tokens, made)[1].values()]
        lengths.update(spans)
        assert sum(spans) == round(0.15 * op.length)
        for token in made["input_ids"][:-1].tolist():
            width = spans.pop(0) if token in ids else 1
            places[position : position + width] += token in ids
            position += width
    total = sum(lengths.values())
    assert sum(size * count for size, count in lengths.items()) / total == pytest.approx(3.0, abs=0.01)
    # All partitions of 30 into 10 are as likely: a span is of one token with probability 9/29.
    assert lengths[1] / total == pytest.approx(9 / 29, abs=0.02)
    assert lengths[2] / total == pytest.approx(9 / 29 * 20 / 28, abs=0.02)
    assert places[0] == 0
    assert places[20:180].mean() / 800 == pytest.approx(0.15, abs=0.01)


def test_lengths_are_those_of_t5():
    assert language.corrupted_lengths(512) == (568, 114)
    for density, span in ((0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.5, 1.0)):
        for max_length in (8, 64, 511):
            length, _ = language.corrupted_lengths(max_length, density, span)
            noise, spans = noise_counts(length, density, span)
            more, more_spans = noise_counts(length + 1, density, span)
            assert length - noise + spans + 1 <= max_length < length + 1 - more + more_spans + 1


def test_what_span_corruption_needs(tokenizers):
    with pytest.raises(UserError, match=r"max_length: 512 asks for 28 tokens <extra_id_i>, the tokenizer has 0"):
        language.SpanCorruption(tokenizers["fallback"])
    with pytest.raises(UserError, match="noise_density: 0 is not"):
        language.SpanCorruption(tokenizers["bytes"], noise_density=0)
    with pytest.raises(UserError, match="max_length: 2 has no room"):
        language.SpanCorruption(tokenizers["bytes"], max_length=2)
    assert language.SpanCorruption(tokenizers["bytes"], max_length=64)({"text": "a"}, np.random.default_rng(0)) == []


def test_prefixes_end_anywhere(tokenizers):
    tokens = tokenizers["unigram"]
    op = language.PrefixLM(tokens, max_length=6, decoder_start_id=9)
    text = DOCUMENTS[0]
    ends = collections.Counter()
    for seed in range(600):
        pieces = op({"text": text}, np.random.default_rng(seed))
        joined = []
        for piece in pieces:
            assert piece["input_ids"][-1] == piece["targets"][-1] == tokens.eos_id
            assert piece["decoder_input_ids"].tolist() == [9, *piece["targets"][:-1]]
            assert max(len(piece["input_ids"]), len(piece["targets"])) <= op.decoder_max_length == 6
            joined += [*piece["input_ids"][:-1].tolist(), *piece["targets"][:-1].tolist()]
        assert joined == plain(tokens, text)[: len(joined)]
        assert len(plain(tokens, text)) - len(joined) <= 1
        ends[len(pieces[0]["input_ids"]) - 1] += 1
    assert set(ends) == {1, 2, 3, 4, 5}
    assert min(ends.values()) > 80
    assert op({"text": "a"}, np.random.default_rng(0)) == []


def test_sequence_to_sequence(tokenizers):
    tokens, other = tokenizers["unigram"], tokenizers["bpe"]
    op = language.Seq2Seq(tokens, "en", "de", max_length=16, decoder_max_length=5, prefix="go: ")
    made = op({"en": "Call me", "de": "Call me Ishmael. Some"})
    assert made["input_ids"].tolist() == [*plain(tokens, "go: Call me"), tokens.eos_id]
    assert made["targets"].tolist() == [*plain(tokens, "Call me Ishmael. Some")[:4], tokens.eos_id]
    assert made["decoder_input_ids"].tolist() == [tokens.pad_id, *made["targets"][:-1]]
    assert made["target_mask"].dtype == np.float32
    bare = op({"en": "Call me"})
    assert bare.keys() == {"en", "input_ids", "attention_mask"}
    two = language.Seq2Seq(tokens, target_tokenizer=other, decoder_start_id=3)({"source": "a", "target": "Call me"})
    assert two["targets"].tolist() == [*plain(other, "Call me"), other.eos_id]
    assert two["decoder_input_ids"][0] == 3
    with pytest.raises(UserError, match=r"an example has no text field 'source'; did you mean 'sauce'\?"):
        language.Seq2Seq(tokens)({"sauce": "a"})
    with pytest.raises(UserError, match="an example's field 'target' must be text"):
        language.Seq2Seq(tokens)({"source": "a", "target": 3})
    with pytest.raises(UserError, match="decoder_max_length: 0 is less than 1"):
        language.Seq2Seq(tokens, decoder_max_length=0)


def test_a_text_that_names_special_tokens_is_not_cut_short(tokenizers):
    """As Transformers has it, what a text calls <|endoftext|> is that token; its bytes count."""
    (made,) = language.CausalTokens(tokenizers["bpe"], target_bytes=True)({"text": "a<|endoftext|>b"})
    assert made["targets"].tolist()[1:2] == [0]
    assert made["target_bytes"].tolist() == [1, 13, 1, 0]


def test_padding_names_features_that_are_made(tokenizers):
    tokens = tokenizers["bytes"]
    rng = np.random.default_rng(0)
    (piece,) = language.Pieces(tokens)({"text": "a b"})
    pairs = [
        (language.CausalTokens(tokens, target_bytes=True), {"text": "a b"}),
        (language.Pieces(tokens), {"text": "a b"}),
        (language.MaskTokens(tokens), piece),
        (language.SpanCorruption(tokens, max_length=64), {"text": "a b"}),
        (language.PrefixLM(tokens), {"text": "a b"}),
        (language.Seq2Seq(tokens), {"source": "a", "target": "b"}),
    ]
    for op, example in pairs:
        made = op(example, rng) if "rng" in inspect.signature(op).parameters else op(example)
        made = made[0] if isinstance(made, list) else made
        assert op.padding.keys() <= made.keys()
