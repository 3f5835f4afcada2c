"""--mode=generate: of a run, of published weights, one prompt or many, and what can be wrong."""

import io
import json
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from research import generate, main, train
from research.data import tokenizer
from research.errors import UserError
from research.generation import sampling
from research.generation.decoding import Decoding
from research.generation.detokenizer import completion
from research.models.encoder_decoder import EncoderDecoder
from research.models.gpt import Decoder
from research.pretrained import huggingface
from research.reporting.record import load_config

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    cache = str(tmp_path_factory.getbasetemp().parent / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
        yield


def config(**changes):
    """Learns the alphabet."""
    model = {"call": "research.models.gpt.Decoder", "vocab_size": 260, **SIZES, "max_positions": 64}
    records = [{"text": LETTERS[start : start + 12]} for start in range(15)]
    settings = {
        "seed": 0,
        "batch_size": 4,
        "num_steps": 60,
        "tokenizer": {"call": "research.data.tokenizer.byte_level"},
        "task": {"call": "research.tasks.causal_lm.CausalLM", "model": model | {"initializer_range": 0.1}},
        "data": {
            "call": "research.data.dataset.Dataset",
            "source": {"call": "research.data.source.examples", "records": records},
            "ops": [{"call": "research.data.language.CausalTokens", "max_length": 16}],
            "features": ["input_ids", "targets", "target_mask", "attention_mask"],
            "length_buckets": 1,
        },
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every_steps": 60},
    }
    return ConfigDict(settings | changes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    train.run(config(), folder)
    return folder


@pytest.fixture
def generated(workdir, capsys):
    """Runs the command line and returns what it wrote."""

    def run(*flags, status=0):
        capsys.readouterr()
        assert main.main(["--mode=generate", f"--workdir={workdir}", *flags]) == status
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err

    return run


def test_a_prompt_is_gone_on_with(generated):
    assert generated("--prompt=cdef", "--config.decoding.max_new_tokens=6") == "ghijkl\n"
    assert generated("--prompt=cdef", "--config.decoding.stop=j,xyz", "--config.decoding.max_new_tokens=9") == "ghi\n"
    assert (
        generated("--prompt=cdef", "--config.decoding.num_beams=3", "--config.decoding.max_new_tokens=6") == "ghijkl\n"
    )


def test_text_is_written_as_it_comes(workdir, monkeypatch):
    written = []

    class File(io.StringIO):
        def flush(self):
            written.append(self.getvalue())

    monkeypatch.setattr("sys.stdout", File())
    settings = load_config(workdir)
    settings.decoding = {"max_new_tokens": 4}
    generate.run(settings, workdir, prompt="cdef")
    assert written == ["g", "gh", "ghi", "ghij", "ghij\n"]


def test_samples_are_repeatable_and_those_of_a_file_are_those_of_a_prompt(generated, tmp_path):
    drawn = ["--config.decoding.temperature=3.0", "--config.decoding.max_new_tokens=12", "--config.decoding.top_k=40"]
    one = generated("--prompt=a", *drawn)
    assert one == generated("--prompt=a", *drawn)
    assert one != generated("--prompt=a", *drawn, "--config.seed=1")
    (tmp_path / "in.txt").write_text("a\nbc\n\na\na\na\na\n")
    generated(f"--input={tmp_path}/in.txt", f"--output={tmp_path}/out.jsonl", *drawn)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "bc", "a", "a", "a", "a"]
    assert rows[0]["completion"] + "\n" == one
    assert len({row["completion"] for row in rows}) > 2  # equal prompts in other places draw anew


def test_lines_of_a_file(generated, monkeypatch):
    chat = {"messages": [{"role": "user", "content": "abcdef"}], "id": 3}
    lines = ["abcdef", '{"prompt": "efgh", "id": 7}', json.dumps(chat), '["x']
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(lines).encode())))
    found = [json.loads(line) for line in generated("--input=-", "--config.decoding.max_new_tokens=3").splitlines()]
    assert found[0] == {"prompt": "abcdef", "completion": "ghi"}
    assert found[1] == {"prompt": "efgh", "id": 7, "completion": "ijk"}
    assert {name: found[2][name] for name in chat} == chat
    assert found[3]["prompt"] == '["x'


def test_how_a_prompt_is_framed():
    bytes_, prompt = tokenizer.byte_level(), {"prompt": "hi"}

    def framed(fields, source=False, **settings):
        ids, before = generate._encode(bytes_, fields, Decoding(**settings), source)
        return bytes_.decode(ids, skip_special=False), bytes_.decode(before)

    assert framed(prompt) == ("[CLS]hi", "hi")
    assert framed(prompt, bos=False) == ("hi", "hi")
    assert framed(prompt, source=True) == ("hi[SEP]", "")
    messages = [{"role": "user", "content": "hi"}]
    assert framed(prompt, chat=True) == framed({"messages": messages}) == (bytes_.chat(messages, True), "")
    assert framed(prompt, source=True, prefix="say: ") == ("say: hi[SEP]", "")
    assert framed({"messages": messages}, prefix="say: ") == (bytes_.chat(messages, True), "")
    with pytest.raises(UserError, match="the prompt is empty"):
        framed({"prompt": ""}, prefix="say: ")


def test_published_weights_need_no_run(tmp_path, capsys):
    model = Decoder(260, **SIZES, max_positions=64, initializer_range=0.3)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    files = tokenizer.byte_level().save(tmp_path / "tokenizer")
    folder = huggingface.save(tmp_path / "weights", model, params, tokenizer_files=files)
    call = {"call": "research.pretrained.huggingface.load_model", "path": str(folder), "kind": "causal_lm"}
    settings = config(
        tokenizer={"call": "research.data.tokenizer.load", "path": str(folder)},
        task={"call": "research.tasks.causal_lm.CausalLM", "model": call},
        data={"call": "research.data.dataset.Dataset", "source": {"call": "research.data.source.tfds", "dataset": "?"}},
        init={"path": str(folder)},
        num_steps=None,
        num_epochs=1.0,
        decoding={"max_new_tokens": 20},
    )
    generate.run(settings, tmp_path / "none", prompt="ab")
    captured = capsys.readouterr()
    assert "holds no checkpoints: taking the weights that config.init names" in captured.err
    assert len(captured.out) > 1
    generate.run(settings, tmp_path / "none", prompt="ab")
    assert capsys.readouterr().out == captured.out
    assert not (tmp_path / "none").exists()
    settings.init = None
    with pytest.raises(UserError, match=r"holds no checkpoints, and config.init names no weights"):
        generate.run(settings, tmp_path / "none", prompt="ab")


def test_encoder_decoders_read_the_prompt(tmp_path, capsys):
    t5 = {"positions": "relative", "norm": "rms", "norm_first": True, "use_bias": False, "embedding_scale": 1.0}
    model = EncoderDecoder(260, **SIZES, **t5, logits_scale=32**-0.5)
    params = jax.jit(model.init)(jax.random.key(0), *[np.zeros((1, 4), np.int32)] * 2)["params"]
    folder = huggingface.save(tmp_path / "weights", model, params)
    call = {"call": "research.pretrained.huggingface.load_model", "path": str(folder), "kind": "encoder_decoder"}
    settings = config(task={"call": "research.tasks.seq2seq.Seq2Seq", "model": call}, init={"path": str(folder)})
    settings.decoding = {"max_new_tokens": 5, "num_beams": 2}
    generate.run(settings, tmp_path / "none", prompt="hi")
    ids = np.array([[*tokenizer.byte_level().backend.encode("hi", add_special_tokens=False).ids, 2]], np.int32)
    beams = Decoding(max_new_tokens=5, num_beams=2)
    search = jax.jit(
        lambda params, ids: sampling.generate(model, params, {"input_ids": ids}, beams, tokenizer.byte_level())
    )
    tokens = search(params, ids)
    assert capsys.readouterr().out == completion(tokenizer.byte_level(), tokens[0]) + "\n"


MISTAKES = {
    "nothing": ([], "--prompt, --input: give a text to continue, or a file of texts"),
    "empty": (["--prompt="], "--prompt, --input: give a text"),
    "both": (["--prompt=a", "--input=x"], "--prompt, --input: give a text"),
    "no file": (["--input=nowhere.txt"], "--input: there is no file nowhere.txt"),
    "no folder": (["--prompt=a", "--output=nowhere/out"], "--output: there is no folder"),
    "long": ([f"--prompt={'a' * 70}"], "--prompt: the prompt has 71 tokens, but the model has 64 positions"),
    "too many": (["--prompt=abc"], "config.decoding.max_new_tokens: 64 are too many after a prompt of 4 tokens"),
    "setting": (["--prompt=a", "--config.decoding.top_p=2"], "config.decoding.top_p: 2 must lie in"),
    "misspelt": (["--prompt=a", "--config.decoding.temprature=2"], "config.decoding.temprature: .* 'temperature'"),
    "type": (
        ["--prompt=a", "--config.decoding.max_new_tokens=many"],
        "config.decoding.max_new_tokens: 'many' is a str",
    ),
    "checkpoint": (["--prompt=a", "--checkpoint=bets", "--config.decoding.max_new_tokens=3"], "--checkpoint: 'bets'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, generated):
    flags, message = MISTAKES[case]
    error = generated(*flags, status=2)
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "--input: line 2 is not JSON: "),
        (b'{"promt": "a"}', "--input: line 2: it needs a 'prompt' or 'messages'; it has neither; did you mean"),
        (b'{"prompt": 3}', "--input: line 2: its prompt is no text"),
        (b'{"prompt": ""}', "--input: line 2: the prompt is empty"),
        (b'{"prompt": "a", "messages": []}', "it has both"),
        (b'{"messages": 3}', "--input: line 2: "),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_lines_that_are_wrong(line, message, generated, tmp_path):
    (tmp_path / "in").write_bytes(b"a\n" + line)
    short = "--config.decoding.max_new_tokens=3"
    error = generated(f"--input={tmp_path}/in", f"--output={tmp_path}/out", short, status=2)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tasks_that_cannot_generate(tmp_path):
    encoder = {"call": "research.models.bert.Encoder", "vocab_size": 260, **SIZES}
    for task, model in (("masked_lm.MaskedLM", "MaskedLM"), ("classification.Classification", "SequenceClassifier")):
        node = {"call": f"research.models.bert.{model}", "encoder": encoder}
        node |= {"num_outputs": 2} if model == "SequenceClassifier" else {}
        settings = config(task={"call": f"research.tasks.{task}", "model": node})
        with pytest.raises(UserError, match=f"{model} cannot generate text; use a decoder"):
            generate.run(settings, tmp_path, prompt="a")
