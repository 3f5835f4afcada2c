"""Explanations as the command line makes them, of tiny runs of every kind of model."""

import html.parser
import json
import pathlib
import re
import types

import flax.linen as nn
import jax
import numpy as np
import PIL.Image
import pytest

from research import explain as explain_mode
from research import main
from research.analysis.explanation import Explainer
from research.data.shapes import shapes
from research.evaluate import restore_params
from research.experiment import Experiment
from research.reporting.record import load_config

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
QUICK = [
    "--config.num_epochs=null",
    "--config.num_steps=2",
    "--config.evals={}",
    "--config.checkpoint.best=null",
    "--config.optimizer.warmup=1",
]
HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    cache = str(tmp_path_factory.getbasetemp().parent / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes a tiny run, once, and returns its folder."""
    folders = {}

    def make(config):
        if config not in folders:
            folders[config] = tmp_path_factory.mktemp("run")
            flags = [f"--config={CONFIGS}/{config}", f"--workdir={folders[config]}", *QUICK]
            assert main.main(flags) == 0
        return folders[config]

    return make


class Page(html.parser.HTMLParser):
    """What a page holds: its elements, what they refer to, and its text."""

    def __init__(self, path):
        super().__init__()
        self.names, self.addresses, self.ids, self.described, words = [], [], set(), True, []
        self.handle_data = words.append
        source = path.read_text()
        assert not re.search(r"https?:|@import|url\(|<link|<iframe", source)
        self.feed(source)
        self.text = " ".join(words)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names.append(tag)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        self.ids.add(given.get("id"))
        self.described &= tag != "img" or bool(given.get("alt"))


def explain(workdir, source, tmp_path, *flags):
    """Explains as the command line does; returns the page, which is checked, and the numbers."""
    if isinstance(source, list):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source))
        source = tmp_path / "in.jsonl"
    command = ["--mode=explain", f"--workdir={workdir}", f"--input={source}", f"--output={tmp_path}/page.html"]
    assert main.main([*command, *flags]) == 0
    page = Page(tmp_path / "page.html")
    assert "script" not in page.names
    assert page.described
    for address in page.addresses:
        assert address.startswith("data:image/") or address.removeprefix("#") in page.ids
    with np.load(tmp_path / "page.npz") as arrays:
        return page, dict(arrays)


def check_completeness(arrays, question, share=0.05):
    total = sum(x.sum() for name, x in arrays.items() if name.startswith(f"{question}/integrated_gradients/"))
    difference = arrays[f"{question}/output"] - arrays[f"{question}/baseline_output"]
    assert total == pytest.approx(difference, rel=share, abs=1e-5)


def predicted(workdir, row):
    """Returns what the run's model predicts for one example, as the task gives it."""
    experiment = Experiment(load_config(workdir), workdir=workdir)
    _, params = restore_params(experiment, workdir, "")
    ((_, batch),) = experiment.data.rows([row])
    return experiment, batch, lambda batch: experiment.task.predict(params, batch, jax.random.key(0))


def test_a_classifier_of_texts(trained, tmp_path):
    workdir = trained("movie_snippets.py:tiny")
    texts = [f"a good film {HOSTILE}", "odd & bad"]
    page, arrays = explain(workdir, [{"text": text, "label": 7} for text in texts], tmp_path)
    assert texts[0] in page.text
    assert page.names.count("section") == 2
    assert "#s2" in page.addresses
    assert "Attention rollout" in page.text
    experiment, batch, predict = predicted(workdir, {"text": texts[1]})
    assert arrays["2/1/output"] == pytest.approx(float(predict(batch)["logits"].max()), abs=1e-5)
    ids = arrays["2/1/ids/input_ids"]
    for place in range(1, len(ids) - 1):
        hidden = {**batch, "input_ids": batch["input_ids"].copy()}
        hidden["input_ids"][0, place] = experiment.tokenizer.mask_id or experiment.tokenizer.unk_id
        chosen = int(predict(batch)["logits"].argmax())
        fall = float(predict(batch)["logits"][0, chosen] - predict(hidden)["logits"][0, chosen])
        assert arrays["2/1/occlusion/input_ids"][place] == pytest.approx(fall, abs=1e-5)
    for question in ("1/1", "2/1"):
        check_completeness(arrays, question)
    rollout = arrays["1/1/attention_rollout/encoder/layers/attention"]
    assert rollout.sum() == pytest.approx(1)


def test_a_class_can_be_chosen(trained, tmp_path, capsys):
    workdir = trained("movie_snippets.py:tiny")
    pages = [explain(workdir, [{"text": "good"}], tmp_path, f"--target={name}") for name in ("negative", "positive")]
    for (page, _), name in zip(pages, ("negative", "positive")):
        assert f"Explained: the logit of the class '{name}'" in page.text
    assert pages[0][1]["1/1/output"] != pages[1][1]["1/1/output"]


def test_a_causal_language_model(trained, tmp_path):
    page, arrays = explain(trained("jane_austen_gpt.py:tiny"), [{"text": "the cat <b>"}], tmp_path, "--target=s")
    assert "Explained: the log-likelihood of 's' as the next token" in page.text
    assert "Logit lens" in page.text
    assert "b" not in page.names
    check_completeness(arrays, "1/1")
    length = len(arrays["1/1/ids/input_ids"])
    assert length == len("the cat <b>") + 1
    layers = arrays["1/1/attention/layers/attention"].shape[0]
    assert arrays["1/1/logit_lens/tokens"].shape == (layers + 1, length, 5)
    assert arrays["1/1/residual_norms/layers"].shape == (layers + 1, length)


def test_an_encoder_decoder(trained, tmp_path):
    workdir = trained("libreoffice_translation.py:tiny")
    page, arrays = explain(workdir, [{"source": "the cat"}], tmp_path, "--target=cat")
    assert "Part by part: tokens that are read" in page.text
    assert arrays["1/1/outputs"].shape == (4,)  # with the end
    assert arrays["1/1/outputs"].sum() == pytest.approx(arrays["1/1/output"])
    assert arrays["1/1/gradient_x_input_of_parts/input_ids"].shape == (4, 8)
    check_completeness(arrays, "1/1")
    page, arrays = explain(workdir, [{"source": "the cat"}], tmp_path)
    assert "the log-likelihood of what is written" in page.text
    assert "decoder cross attention" in page.text


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, example in enumerate(shapes(count=2, size=48)):
        PIL.Image.fromarray(np.asarray(example["image"], np.uint8)).save(folder / f"{i}<b>.png")
    return folder


def test_a_vision_transformer(trained, pictures, tmp_path):
    page, arrays = explain(trained("finetune_images.py:tiny"), pictures, tmp_path)
    assert page.names.count("section") == 2
    assert "b" not in page.names
    assert page.names.count("img") > 8
    assert "The strongest of 7 x 7 squares" in page.text
    assert arrays["1/1/occlusion/image"].shape == arrays["1/1/integrated_gradients/image"].shape == (28, 28)
    for question in ("1/1", "2/1"):
        check_completeness(arrays, question)


def test_a_detector(trained, pictures, tmp_path):
    page, arrays = explain(trained("detr_garments.py:tiny"), pictures / "0<b>.png", tmp_path)
    assert re.search(r"Explained: the logit of '\w+' of query \d+, whose score is 0\.\d\d", page.text)
    assert "with the box of the query" in page.text
    weights = arrays["1/1/attention/decoder/layers/cross_attention"]
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    check_completeness(arrays, "1/1", share=0.5)  # rectifiers and a grey image's norms take many points


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"text": "a"}], ["--target=positve"], "--target: there is no class 'positve'; did you mean 'positive'?"),
        ([{"text": "a"}], ["--output=page.htm"], "--output: page.htm does not end in .html"),
        ([{"text": "a"}], ["--output=nowhere/page.html"], "--output: there is no folder"),
        ([{"text": "a"}], ["--checkpoint=7"], "--checkpoint: '7' is not among"),
        ([{"text": "a"}] * 33, [], "--input: it holds 33 examples; a page explains from 1 to 32"),
        ([], [], "--input: it holds 0 examples"),
        ([{"txt": "a"}], [], "--input: line 1: an example has no text field 'text'; did you mean 'txt'?"),
        ([{"text": "a"}], ["--prompt=a"], "--prompt: --mode=explain takes no such flag"),
    ],
)
def test_mistakes(trained, tmp_path, capsys, rows, flags, message):
    workdir = trained("movie_snippets.py:tiny")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--mode=explain", f"--workdir={workdir}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/x.html"]
    capsys.readouterr()
    assert main.main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_a_token_to_explain_is_one(trained, tmp_path, capsys):
    workdir = trained("jane_austen_gpt.py:tiny")
    (tmp_path / "in.jsonl").write_text('{"text": "the"}\n')
    command = ["--mode=explain", f"--workdir={workdir}", f"--input={tmp_path}/in.jsonl"]
    assert main.main([*command, "--target=cat"]) == 2
    assert "--target: 'cat' is 3 tokens, ['c', 'a', 't']; name one, such as --target='c'" in capsys.readouterr().err
    assert main.main(command) == 0
    assert (workdir / "explain.html").exists()
    assert (workdir / "explain.npz").exists()


def test_text_that_is_none(trained, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "a \\ud800 b"}\n')
    command = ["--mode=explain", f"--workdir={trained('movie_snippets.py:tiny')}", f"--input={tmp_path}/in.jsonl"]
    assert main.main(command) == 2
    assert "--input: line 2 is not JSON: 'utf-8' codec can't encode" in capsys.readouterr().err


def test_a_task_that_says_nothing_of_that_kind(trained, pictures, tmp_path, capsys):
    command = ["--mode=explain", f"--workdir={trained('dit_fashion_mnist.py:tiny')}", f"--input={pictures}/0<b>.png"]
    assert main.main(command) == 2
    error = capsys.readouterr().err
    assert "config.task: a Diffusion says nothing that could be explained" in error


def test_of_a_task_without_questions_the_largest_output_is_explained():
    class Sums(nn.Module):
        inputs = ("image",)

        @nn.compact
        def __call__(self, image):
            return nn.Dense(3)(image.reshape(len(image), -1))

    model, image = Sums(), np.ones((1, 2, 2, 1), np.float32)
    params = model.init(jax.random.key(0), image)["params"]
    experiment = types.SimpleNamespace(plain_task=types.SimpleNamespace(model=model))
    (question,) = explain_mode._questions(experiment, params, {"image": image}, {}, "")
    largest = float(model.apply({"params": params}, image).max())
    assert Explainer(model, params).explain(question).output == pytest.approx(largest, abs=1e-6)
