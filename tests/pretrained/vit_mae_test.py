"""Masked autoencoders in Hugging Face folders, written and read here; their tables of positions are checked."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models import vit
from research.models.mae import MaskedAutoencoder
from research.pretrained import huggingface

ENCODER = vit.Encoder(
    image_size=15,
    patch_size=5,
    num_channels=2,
    hidden_size=12,
    num_layers=2,
    num_heads=3,
    intermediate_size=20,
    positions="sinusoidal",
    activation="relu",
    use_bias=False,
    layer_norm_epsilon=1e-3,
    dropout=0.1,
)
MODELS = {
    "masked_autoencoder": MaskedAutoencoder(ENCODER, 8, 1, 2, 9, mask_ratio=0.6, normalize_targets=False),
    "encoder": ENCODER,
}
ARCHITECTURES = {"masked_autoencoder": "ViTMAEForPreTraining", "encoder": "ViTMAEModel"}
TABLES = {"vit.embeddings.position_embeddings": 12, "decoder.decoder_pos_embed": 8}


def shapes(model):
    inputs = [np.zeros((1, 15, 15, 2), np.float32)]
    if isinstance(model, MaskedAutoencoder):
        inputs.append(np.zeros((1, 9), np.float32))
    return jax.eval_shape(lambda key: model.init(key, *inputs)["params"], jax.random.key(0))


def random_params(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes(model))


def save(folder, kind="masked_autoencoder"):
    return huggingface.save(folder / kind, MODELS[kind], random_params(MODELS[kind]))


def load(folder, kind="masked_autoencoder", new_head=False, **options):
    model = huggingface.load_model(str(folder), kind, **options)
    return model, *huggingface.load_params(str(folder), model, shapes(model), new_head=new_head)


def edit(folder, change):
    tensors = change(safetensors.numpy.load_file(folder / "model.safetensors"))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", MODELS)
def test_save_then_load_gives_the_same_model_and_bits(kind, tmp_path):
    folder = save(tmp_path, kind)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[kind]]
    assert config["mask_ratio"] == (0.6 if kind == "masked_autoencoder" else 0.0)
    model, params, report = load(folder, kind)
    assert model == MODELS[kind]
    assert report == huggingface.Report((), ())
    jax.tree.map(np.testing.assert_array_equal, params, random_params(model))
    again = huggingface.save(tmp_path / "again", model, params)
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def waves(place, width):
    """Returns sines, then cosines, of a place at falling frequencies (He 2021, their code), one by one."""
    frequencies = [10000 ** -(i / (width / 4)) for i in range(width // 4)]
    return [np.sin(place * f) for f in frequencies] + [np.cos(place * f) for f in frequencies]


def test_tables_of_positions_are_written(tmp_path):
    tensors = safetensors.numpy.load_file(save(tmp_path) / "model.safetensors")
    for name, width in TABLES.items():
        table = tensors[name]
        assert table.shape == (1, 10, width)
        np.testing.assert_array_equal(table[0, 0], 0)
        for patch in range(9):
            row, column = divmod(patch, 3)
            np.testing.assert_allclose(table[0, 1 + patch], waves(column, width) + waves(row, width), atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("change", ["learned", "another grid", "missing"])
def test_other_tables_are_refused(name, change, tmp_path):
    folder = save(tmp_path)
    table = {
        "learned": lambda x: x + np.float32(0.01) * (np.arange(x.size).reshape(x.shape) == 40),
        "another grid": lambda x: x[:, :5],
    }
    if change == "missing":
        edit(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    else:
        edit(folder, lambda tensors: tensors | {name: table[change](tensors[name])})
    wrong = {
        "learned": f"{name} is not the sinusoids of He 2021, but off by 0.01; no other",
        "another grid": rf"{name} \(1, 5, {TABLES[name]}\) instead of \(1, 10, {TABLES[name]}\) of the wrong shape",
        "missing": f"{name} missing",
    }
    with pytest.raises(UserError, match=wrong[change]):
        load(folder)


def test_a_body_lacks_only_the_decoder(tmp_path):
    folder = save(tmp_path, "encoder")
    edit(folder, lambda tensors: {name.removeprefix("vit."): x for name, x in tensors.items()})
    model, params, report = load(folder, mask_ratio=0.75)
    assert model.encoder == ENCODER
    assert all(name.startswith("decoder/") for name in report.new)
    assert len(report.new) == len(jax.tree.leaves(params["decoder"]))
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], random_params(ENCODER))


@pytest.mark.parametrize("source", MODELS)
def test_an_encoder_becomes_a_classifier(source, tmp_path):
    options = {"num_outputs": 4, "pooling": "mean", "drop_path": 0.2}
    model, params, report = load(save(tmp_path, source), "image_classifier", **options)
    assert model == vit.ImageClassifier(ENCODER.clone(drop_path=0.2), 4, pooling="mean")
    assert report.new == ("head_output/bias", "head_output/kernel")
    assert all(name.startswith("decoder.") for name in report.unused)
    own = random_params(MODELS[source])
    own = own["encoder"] if source == "masked_autoencoder" else own
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], own)


def test_a_classifier_has_no_place_in_the_family(tmp_path):
    model = vit.ImageClassifier(ENCODER, 4)
    with pytest.raises(UserError, match="Transformers has no ViT-MAE with a classifier"):
        huggingface.save(tmp_path / "classifier", model, random_params(model))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"hidden_size": 10}, "hidden_size 10 must be a multiple of 4"),
        ({"positions": "learned"}, "ViTMAEModel needs positions='sinusoidal', the model has 'learned'"),
        ({"prefix_tokens": 2}, "ViTMAEModel needs prefix_tokens=1, the model has 2"),
        ({"layer_scale": 0.1}, "ViTMAEModel needs layer_scale=None, the model has 0.1"),
    ],
)
def test_what_transformers_lacks_is_not_written(changes, wrong, tmp_path):
    model = ENCODER.clone(num_heads=2, **changes)
    with pytest.raises(UserError, match=wrong):
        huggingface.save(tmp_path / "model", model, random_params(model))
