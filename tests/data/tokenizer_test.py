import dataclasses
import hashlib
import json
import pathlib
import random
import re
import subprocess
import sys

import pytest

from research.data import tokenizer, tokenizer_training
from research.data.source import examples
from research.errors import UserError

TEXTS = ["Hello, world!", "  naïve  café\n\n映画 🎬 x", "a [MASK] b", "", "It's 3.14 o'clock…", "\tDON'T\r\nstop"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi & <b>you</b>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def corpus(count=300, seed=0):
    draw = random.Random(seed)
    stems = ["walk", "talk", "jump", "paint", "read", "Über", "naïv", "look", "film", "good"]
    endings = ["", "s", "ed", "ing", "er", "ers"]
    sentence = lambda: " ".join(draw.choice(stems) + draw.choice(endings) for _ in range(12))  # noqa: E731
    return examples([{"text": sentence() + ".", "other": "zzz qqq zzz qqq"} for _ in range(count)])


@pytest.fixture(scope="module", params=tokenizer_training.KINDS)
def trained(request):
    options = {"byte_fallback": True, "vocab_size": 600} if request.param == "unigram" else {"vocab_size": 400}
    return tokenizer_training.train(corpus(), request.param, sentinels=3, special_tokens=("<|im_end|>",), **options)


def test_trained(trained):
    assert trained.vocab_size <= 600
    ids = trained.backend.encode("walking painters looked", add_special_tokens=False).ids
    assert len(ids) <= 8  # the endings are tokens
    assert trained.decode(ids) == "walking painters looked"
    assert trained.sentinels == tuple(trained.vocab_size - 1 - i for i in range(3))
    assert trained.backend.encode("walk<|im_end|>", add_special_tokens=False).tokens[-1] == "<|im_end|>"
    assert trained.backend.token_to_id("<|im_end|>") in trained.special_ids
    assert trained.eos_id is not None


def test_kinds_have_their_special_tokens():
    bpe = tokenizer_training.train(corpus(20), "bpe", 300)
    assert bpe.bos_id == bpe.eos_id == bpe.pad_id == 0
    assert bpe.backend.id_to_token(0) == "<|endoftext|>"
    assert (bpe.cls_id, bpe.mask_id, bpe.unk_id) == (None, None, None)
    wordpiece = tokenizer_training.train(corpus(20), "wordpiece", 120, lowercase=True)
    roles = [wordpiece.pad_id, wordpiece.unk_id, wordpiece.cls_id, wordpiece.sep_id, wordpiece.mask_id]
    assert roles == [0, 1, 2, 3, 4]
    assert (wordpiece.bos_id, wordpiece.eos_id) == (2, 3)
    pair = wordpiece.backend.encode("Walks", "ÜBER talk")
    assert (pair.tokens[0], pair.tokens[-1]) == ("[CLS]", "[SEP]")
    assert set(pair.type_ids) == {0, 1}
    assert wordpiece.decode(pair.ids) == "walks uber talk"
    unigram = tokenizer_training.train(corpus(20), "unigram", 100)
    assert [unigram.pad_id, unigram.eos_id, unigram.unk_id, unigram.bos_id] == [0, 1, 2, None]
    assert unigram.backend.encode("walks").tokens[-1] == "</s>"
    assert 2 in unigram.backend.encode("映").ids
    assert unigram.sentinels == ()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_comes_back(kind):
    options = {"byte_fallback": True, "vocab_size": 400} if kind == "unigram" else {"vocab_size": 400}
    trained = tokenizer_training.train(corpus(), kind, **options)
    for text in ("naïve café — 映画 🎬 <b>", "x y"):
        assert trained.decode(trained.backend.encode(text, add_special_tokens=False).ids) == text
    if kind == "bpe":
        for text in TEXTS:
            assert trained.decode(trained.backend.encode(text, add_special_tokens=False).ids) == text


def fingerprints():
    trained = [tokenizer_training.train(corpus(), kind, 300).backend.to_str() for kind in tokenizer_training.KINDS]
    return [hashlib.sha256(text.encode()).hexdigest() for text in trained]


def test_the_same_text_gives_the_same_tokenizer():
    """In another process, where the hash tables of the trainers are in another order."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tokenizer_test; print(*tokenizer_test.fingerprints())"
    )
    command = [sys.executable, "-c", program, str(pathlib.Path(__file__).parent)]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert other == fingerprints() == fingerprints()


def test_all_fields_and_all_examples_are_read(capsys):
    both = tokenizer_training.train(corpus(), "bpe", 300, field=("text", "other"))
    assert "Ġqqq" in both.backend.get_vocab()
    assert "training a bpe tokenizer on 300 examples: 300 tokens" in capsys.readouterr().err
    assert "Ġqqq" not in tokenizer_training.train(corpus(), "bpe", 300).backend.get_vocab()
    last = examples([{"text": "a b c"}] * 99 + [{"text": "zebra zebra zebra"}])
    assert "zebra" in tokenizer_training.train(last, "bpe", 270).backend.get_vocab()
    assert "zebra" in tokenizer_training.train(last, "bpe", 270, max_examples=2).backend.get_vocab()
    lowercase = tokenizer_training.train(examples([{"text": "LOUD loud"}] * 5), "bpe", 270, lowercase=True)
    assert lowercase.backend.encode("Loud LOUD").tokens == ["loud", "Ġloud"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bep"}, "kind: there is no 'bep'; did you mean 'bpe'?"),
        ({"vocab_size": 200}, "vocab_size: 200 tokens, without sentinels, are too few; 257 special tokens and bytes"),
        ({"kind": "wordpiece", "vocab_size": 20}, "vocab_size: 20 tokens, without sentinels, are too few; "),
        ({"kind": "unigram", "vocab_size": 8}, "vocab_size: 8 tokens, without sentinels, are too few; "),
        ({"kind": "unigram", "vocab_size": 27}, "vocab_size: 27 tokens, without sentinels, are too few; "),
        ({"field": "txet"}, "field: an example has no text 'txet'; did you mean 'text'?"),
        ({"byte_fallback": True}, "byte_fallback: only unigram takes it"),
        ({"max_examples": 0}, "max_examples: 0 is less than 1"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        tokenizer_training.train(corpus(30), **options)


def test_a_text_that_is_missing_later_and_no_text():
    with pytest.raises(UserError, match="has no text 'text'"):
        tokenizer_training.train(examples([{"text": "a"}, {"text": "b"}, {"text": 3}]), "bpe", 300)
    with pytest.raises(UserError, match="source: there is no text"):
        tokenizer_training.train(examples([]), "bpe", 300)


def described(tokens):
    roles = {role: getattr(tokens, f"{role}_id") for role in tokenizer.WELL_KNOWN}
    return roles | {
        "pad": tokens.pad_id,
        "size": tokens.vocab_size,
        "special": tokens.special_ids,
        "template": tokens.chat_template,
        "ids": [tokens.backend.encode(text).ids for text in TEXTS],
        "pair": tokens.backend.encode("a", "b").type_ids,
        "text": [tokens.decode(tokens.backend.encode(text).ids) for text in TEXTS],
    }


def test_what_is_saved_loads_back(trained, tmp_path):
    tokens = dataclasses.replace(trained, chat_template=TEMPLATE)
    files = tokens.save(tmp_path / "first")
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json"]
    loaded = tokenizer.load(str(tmp_path / "first"))
    assert described(loaded) == described(tokens)
    loaded.save(tmp_path / "second")
    assert described(tokenizer.load(str(tmp_path / "second"))) == described(tokens)


def test_bytes(tmp_path):
    tokens = tokenizer.byte_level()
    assert tokens.vocab_size == 260
    assert [tokens.pad_id, tokens.bos_id, tokens.eos_id, tokens.mask_id, tokens.cls_id, tokens.sep_id] == [
        *(0, 1, 2, 3, 1, 2)
    ]
    for text in TEXTS[:2]:
        plain = tokens.backend.encode(text, add_special_tokens=False).ids
        assert len(plain) == len(text.encode())
        assert tokens.backend.encode(text).ids == [1, *plain, 2]
        assert tokens.decode([1, *plain, 2]) == text
    assert tokens.decode([1, *tokens.backend.encode("a").ids, 9999], skip_special=False) == "[CLS][CLS]a[SEP]"
    tokens.save(tmp_path)
    assert described(tokenizer.load(str(tmp_path))) == described(tokens)
    more = tokenizer.byte_level(sentinels=5)
    assert more.sentinels == (264, 263, 262, 261, 260)
    assert described(more) | {"size": 0, "special": 0} == described(tokens) | {"size": 0, "special": 0}


def merges_folder(folder, roberta):
    """Writes vocab.json and merges.txt as GPT-2 and RoBERTa have them."""
    trained = tokenizer_training.train(corpus(), "bpe", 300)
    trained.backend.model.save(str(folder))
    if roberta:
        vocabulary = json.loads((folder / "vocab.json").read_text())
        shift = {t: i + 3 for t, i in vocabulary.items() if t != "<|endoftext|>"}
        vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | shift
        vocabulary["<mask>"] = len(vocabulary)
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return trained


@pytest.mark.parametrize("roberta", [False, True])
def test_vocab_and_merges(roberta, tmp_path):
    trained = merges_folder(tmp_path, roberta)
    tokens = tokenizer.load(str(tmp_path))
    pieces = trained.backend.encode("walking painters").tokens
    if roberta:
        assert tokens.backend.encode("walking painters").tokens == ["<s>", *pieces, "</s>"]
        roles = [tokens.bos_id, tokens.pad_id, tokens.eos_id, tokens.unk_id, tokens.cls_id, tokens.sep_id]
        assert roles == [0, 1, 2, 3, 0, 2]
        assert tokens.backend.encode("a <mask>").ids[-2] == tokens.mask_id == tokens.vocab_size - 1
    else:
        assert tokens.backend.encode("walking painters<|endoftext|>").tokens == [*pieces, "<|endoftext|>"]
        assert tokens.bos_id == tokens.eos_id == tokens.pad_id == 0
    tokens.save(tmp_path / "saved")
    assert described(tokenizer.load(str(tmp_path / "saved"))) == described(tokens)


def test_roles_come_from_the_folder(tmp_path):
    tokenizer.byte_level().save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings = {"eos_token": {"content": "[MASK]"}, "bos_token": None, "pad_token": None, "chat_template": "x"}
    config.write_text(json.dumps(settings))
    tokens = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert (tokens.eos_id, tokens.bos_id, tokens.pad_id, tokens.chat_template) == (3, None, 0, "x")
    config.write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "[SEP]", "pad_token": "[MASK]"}))
    (tmp_path / "chat_template.jinja").write_text("y")
    tokens = tokenizer.load(str(tmp_path))
    assert (tokens.eos_id, tokens.bos_id, tokens.pad_id, tokens.chat_template) == (None, 2, 3, "y")
    tokens.save(tmp_path / "copy")
    assert described(tokenizer.load(str(tmp_path / "copy"))) == described(tokens)
    config.write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]})
    )
    (tmp_path / "chat_template.jinja").unlink()
    assert tokenizer.load(str(tmp_path)).chat_template == "d"


def test_a_padding_id_of_the_model_is_kept(tmp_path):
    """A run's folder has no config.json of the model."""
    (tmp_path / "model").mkdir()
    merges_folder(tmp_path / "model", roberta=False)
    (tmp_path / "model" / "config.json").write_text('{"pad_token_id": 7}')
    tokens = tokenizer.load(str(tmp_path / "model"))
    assert tokens.pad_id == 7
    tokens.save(tmp_path / "run")
    assert tokenizer.load(str(tmp_path / "run")).pad_id == 7


@pytest.mark.parametrize(
    ("generation", "model", "ends"),
    [
        ({"eos_token_id": [7, 2, 9]}, {"eos_token_id": 5}, (2, 7, 9)),
        ({"temperature": 0.6}, {"eos_token_id": [2, 5]}, (2, 5)),
        (None, {"eos_token_id": 5}, (2, 5)),
        (None, {"eos_token_id": 2}, (2,)),
        (None, {}, (2,)),
    ],
)
def test_a_text_ends_where_the_folder_says(generation, model, ends, tmp_path):
    tokenizer.byte_level().save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokens = tokenizer.load(str(tmp_path))
    assert (tokens.eos_id, tokens.end_ids) == (2, ends)
    tokens.save(tmp_path / "run")
    assert tokenizer.load(str(tmp_path / "run")).end_ids == ends


def test_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer.json, no vocab.txt, and no vocab.json with merges.txt in"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer: "):
        tokenizer.load(str(tmp_path))


def test_chat():
    tokens = tokenizer.byte_level()
    rendered = tokens.chat(MESSAGES[:2], add_generation_prompt=True)
    turns = ["<|im_start|>system\nBe brief.<|im_end|>", "<|im_start|>user\nHi & <b>you</b><|im_end|>"]
    assert rendered == "\n".join([*turns, "<|im_start|>assistant\n"])
    own = dataclasses.replace(tokens, chat_template=TEMPLATE)
    assert own.chat(MESSAGES) == ("[CLS]<system>Be brief.<user>Hi & <b>you</b><assistant>Hello.[SEP]<user>Bye")
    with pytest.raises(UserError, match="the chat template: no tools"):
        own.chat([{"role": "tool", "content": "x"}])
    for template in ("{% if %}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages + 1 }}"):
        with pytest.raises(UserError, match="the chat template: "):
            dataclasses.replace(tokens, chat_template=template).chat(MESSAGES)


@pytest.mark.peers
def test_transformers_loads_what_is_saved(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, tokens in (("trained", trained), ("bytes", tokenizer.byte_level())):
        tokens = dataclasses.replace(tokens, chat_template=TEMPLATE)
        tokens.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(theirs) == tokens.vocab_size
        for role in (*tokenizer.WELL_KNOWN, "pad"):
            assert getattr(theirs, f"{role}_token_id") == getattr(tokens, f"{role}_id"), role
        for text in TEXTS:
            ids = tokens.backend.encode(text).ids
            assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids, skip_special_tokens=True) == tokens.decode(ids)
        assert theirs("a", "b c")["input_ids"] == tokens.backend.encode("a", "b c").ids
        for prompt in (False, True):
            rendered = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
            assert rendered == tokens.chat(MESSAGES, prompt)


@pytest.mark.peers
@pytest.mark.parametrize("roberta", [False, True])
def test_transformers_reads_vocab_and_merges_alike(roberta, tmp_path):
    transformers = pytest.importorskip("transformers")
    merges_folder(tmp_path, roberta)
    tokens = tokenizer.load(str(tmp_path))
    theirs = (transformers.RobertaTokenizer if roberta else transformers.GPT2Tokenizer).from_pretrained(tmp_path)
    for text in TEXTS[:3]:
        assert theirs(text)["input_ids"] == tokens.backend.encode(text).ids
    assert theirs.eos_token_id == tokens.eos_id
    assert theirs.bos_token_id == tokens.bos_id
