"""A causal language model as a folder: its weights, its tokenizer, and the ids that generation needs."""

import dataclasses
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from research import export
from research.data import tokenizer
from research.generation.decoding import Decoding
from research.models import bert, vit
from research.models.encoder_decoder import EncoderDecoder
from research.models.gpt import Decoder
from research.pretrained import huggingface

MODEL = Decoder(vocab_size=260, hidden_size=12, num_layers=2, num_heads=2, intermediate_size=20, max_positions=32)


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenizer with the special ids of a decoder."""

    inner: Any
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    end_ids: tuple[int, ...] = (2, 7)

    def save(self, folder):
        return self.inner.save(folder)


def params():
    shapes = jax.eval_shape(lambda key: MODEL.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))
    rng = np.random.default_rng(0)
    return shapes, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    task = types.SimpleNamespace(model=MODEL)
    experiment = types.SimpleNamespace(
        plain_task=task,
        task=task,
        fixed=(),
        trained_task=task,
        merged=lambda params, plain: params,
        tokenizer=Text(tokenizer.byte_level()),
        label_names=(),
        decoding=Decoding(),
        spec={},
        config=ConfigDict(),
    )
    monkeypatch.setattr(export, "Experiment", lambda *_, **__: experiment)
    monkeypatch.setattr(export, "restore_trained", lambda *_: (7, params()[1]))
    return export.run(ConfigDict(), tmp_path)


def test_a_decoder_is_exported_whole(folder):
    shapes, want = params()
    model = huggingface.load_model(str(folder), "causal_lm")
    assert model == MODEL.clone(num_kv_heads=2, head_width=6)
    loaded, report = huggingface.load_params(str(folder), model, shapes)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)
    assert report == huggingface.Report((), ())
    config = json.loads((folder / "config.json").read_text())
    assert {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "model_type": "gpt2",
    }.items() <= config.items()
    text = "a cat"
    assert tokenizer.load(str(folder)).backend.encode(text).ids == tokenizer.byte_level().backend.encode(text).ids


def test_an_export_is_of_the_family_that_the_run_began_with(folder, tmp_path):
    assert export.first_family(ConfigDict({"init": {"path": str(folder)}})) == "gpt2"
    assert export.first_family(ConfigDict({"init": {"path": str(tmp_path / "gone")}})) == ""
    assert export.first_family(ConfigDict({"init": None})) == ""


def experiment_on_images(side: int, encoder: vit.Encoder, num_outputs: int = 3) -> types.SimpleNamespace:
    model = vit.ImageClassifier(encoder, num_outputs)
    spec = {"image": jax.ShapeDtypeStruct((2, side, side, 3), np.float32)}
    return types.SimpleNamespace(task=types.SimpleNamespace(model=model), spec=spec)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_an_encoder_of_images_is_exported_at_the_size_that_it_was_trained_at(positions):
    encoder = vit.Encoder(8, 4, 3, 8, 2, 2, 16, positions=positions)
    experiment = experiment_on_images(20, encoder)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 20, 20, 3)), jnp.float32)
    params = jax.device_get(jax.jit(experiment.task.model.init)(jax.random.key(0), images)["params"])
    model, fitted = export.at_trained_size(experiment, params)
    assert model.encoder.image_size == 20
    jax.tree.map(lambda a, b: None, jax.eval_shape(model.init, jax.random.key(0), images)["params"], fitted)
    want = experiment.task.model.apply({"params": jax.tree.map(jnp.asarray, params)}, images)
    found = model.apply({"params": jax.tree.map(jnp.asarray, fitted)}, images)
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.peers
def test_transformers_generates_from_the_export(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    text = transformers.AutoTokenizer.from_pretrained(folder)
    generation = model.generation_config
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, [2, 7])
    ids = np.array([text("a cat")["input_ids"]])
    want = model.generate(torch.tensor(ids), max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    got = []
    for _ in want:
        logits = MODEL.apply({"params": params()[1]}, np.concatenate([ids, np.array([got], ids.dtype)], axis=1))
        got.append(int(logits[0, -1].argmax()))
    assert got == want


@pytest.mark.parametrize(
    ("model", "start", "more"),
    [
        (bert.MaskedLM(bert.Encoder()), None, {}),
        (EncoderDecoder(), None, {"decoder_start_token_id": 3}),
        (EncoderDecoder(), 5, {"decoder_start_token_id": 5}),
    ],
)
def test_special_tokens_are_those_of_the_tokenizer(model, start, more):
    special = types.SimpleNamespace(pad_id=3, bos_id=None, eos_id=0, end_ids=(0,))
    assert export.special_tokens(model, special, start) == {"pad_token_id": 3, "eos_token_id": 0} | more
