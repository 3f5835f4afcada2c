"""Masked autoencoders against Transformers: masks, predictions, losses and exported folders, given the same noise."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from research.models import vit
from research.models.mae import MaskedAutoencoder
from research.pretrained import huggingface
from research.tasks.reconstruction import Reconstruction

pytestmark = pytest.mark.peers

TOLERANCE = 5e-5  # of the largest output
PLAIN = {
    "image_size": 20,
    "patch_size": 4,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 52,
    "layer_norm_eps": 1e-3,
    "decoder_hidden_size": 28,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 30,
}
CASES = {
    "plain": PLAIN,
    "normalised": PLAIN | {"norm_pix_loss": True},
    "half": PLAIN | {"norm_pix_loss": True, "mask_ratio": 0.5, "num_channels": 1, "qkv_bias": False},
    "nearly all": PLAIN | {"mask_ratio": 0.93, "hidden_act": "gelu_new", "patch_size": 2, "num_channels": 4},
    "deep decoder": PLAIN
    | {"decoder_num_hidden_layers": 4, "num_hidden_layers": 1, "decoder_hidden_size": 40, "layer_norm_eps": 1e-12}
    | {"decoder_num_attention_heads": 4, "hidden_act": "relu", "image_size": 30, "patch_size": 5},
}


def peer(case, kind="ViTMAEForPreTraining", **config):
    """Returns a Transformers model whose every parameter is far from its initial value, but for its positions."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.ViTMAEConfig(**CASES[case] | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos" in name:
                parameter.copy_(torch.tensor(table(model.config, parameter.shape[-1])))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def table(config, width):
    """Returns the positions that published weights hold; those of models made by some versions are zeros."""
    module = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    rows = config.image_size // config.patch_size
    if hasattr(module, "build_2d_sinusoidal_position_embedding"):
        made = module.build_2d_sinusoidal_position_embedding(rows, rows, width, cls_token=True).numpy()
        return np.concatenate([made[:, width // 2 :], made[:, : width // 2]], axis=1)[None]
    return module.get_2d_sincos_pos_embed(width, rows, add_cls_token=True)[None].astype(np.float32)


def save(model, folder):
    """Saves a model under the names that published weights have; some versions call the decoder's layers otherwise."""
    model.save_pretrained(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    named = {k.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): v for k, v in tensors.items()}
    safetensors.numpy.save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def inputs(case, size=4):
    config, rng = CASES[case], np.random.default_rng(0)
    side = config["image_size"]
    images = rng.normal(0.5, 2.0, (size, side, side, config.get("num_channels", 3))).astype(np.float32)
    return images, rng.random((size, (side // config["patch_size"]) ** 2)).astype(np.float32)


def their_outputs(model, images, noise):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(images.transpose(0, 3, 1, 2)), noise=torch.tensor(noise))


def load(folder, kind, arrays, **options):
    model = huggingface.load_model(str(folder), kind, **options)
    shapes = jax.eval_shape(lambda key: model.init(key, *arrays)["params"], jax.random.key(0))
    return model, *huggingface.load_params(str(folder), model, shapes)


def assert_close(ours, theirs, what):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{what}: {error:.2e} of the largest output")
    assert error < TOLERANCE


def assert_equal_outputs(model, params, theirs, arrays, what):
    """Compares masks, predictions, and the loss that the task makes of them."""
    images, noise = arrays
    predictions, masked = jax.jit(lambda params: model.apply({"params": params}, images, noise))(params)
    np.testing.assert_array_equal(masked, theirs.mask.numpy().astype(bool))
    assert_close(np.asarray(predictions), theirs.logits.numpy(), f"{what}, predictions")
    task = Reconstruction(model)
    batch = {"image": images, "noise": noise, "mask": np.ones(len(images), np.float32)}
    found = jax.jit(task.predict)(params, batch, jax.random.key(0))
    assert_close(np.mean(found["loss"]), theirs.loss.numpy(), f"{what}, loss")
    return found


@pytest.mark.parametrize("case", CASES)
def test_masks_predictions_and_losses_are_equal(case, tmp_path):
    reference, arrays = peer(case), inputs(case)
    save(reference, tmp_path)
    model, params, report = load(tmp_path, "masked_autoencoder", arrays)
    assert report == huggingface.Report((), ())
    assert model.normalize_targets == CASES[case].get("norm_pix_loss", False)
    theirs = their_outputs(reference, *arrays)
    found = assert_equal_outputs(model, params, theirs, arrays, case)
    if not model.normalize_targets:
        size = CASES[case]["patch_size"]
        painted = np.asarray(vit.cut(reference.unpatchify(theirs.logits).numpy().transpose(0, 2, 3, 1), size))
        ours = np.asarray(vit.cut(found["reconstruction"], size))
        assert_close(ours[found["masked"]], painted[found["masked"]], f"{case}, images")


def test_the_tolerance_tells_one_epsilon_from_another(tmp_path):
    reference, arrays = peer("plain"), inputs("plain")
    save(reference, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    model, params, _ = load(tmp_path, "masked_autoencoder", arrays)
    theirs = their_outputs(reference, *arrays).logits.numpy()
    ours = np.asarray(model.apply({"params": params}, *arrays)[0])
    assert np.abs(ours - theirs).max() > TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_exports_load_with_from_pretrained(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    arrays = inputs(case)
    save(peer(case), tmp_path / "theirs")
    model, params, _ = load(tmp_path / "theirs", "masked_autoencoder", arrays)
    huggingface.save(tmp_path / "ours", model, params, max_shard_bytes=50_000)
    loaded, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(model, params, their_outputs(loaded.eval(), *arrays), arrays, f"{case}, exported")


@pytest.mark.parametrize("case", ["plain", "half", "nearly all"])
def test_bodies_are_equal(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    (images, noise), body = inputs(case), {"mask_ratio": 0.0}
    reference = peer(case, "ViTMAEModel", **body)
    reference.save_pretrained(tmp_path / "theirs")
    model, params, report = load(tmp_path / "theirs", "encoder", [images])
    assert report == huggingface.Report((), ())
    ours = np.asarray(jax.jit(lambda params: model.apply({"params": params}, images))(params))
    ascending = np.broadcast_to(np.linspace(0, 1, noise.shape[1], dtype=np.float32), noise.shape)
    theirs = their_outputs(reference, images, ascending).last_hidden_state.numpy()
    assert_close(ours, theirs, f"{case}, body")

    huggingface.save(tmp_path / "ours", model, params)
    loaded, info = transformers.ViTMAEModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    exported = their_outputs(loaded.eval(), images, ascending).last_hidden_state.numpy()
    assert_close(ours, exported, f"{case}, body exported")


def test_a_body_that_masks_is_equal(tmp_path):
    (images, noise), reference = inputs("half"), peer("half", "ViTMAEModel")
    reference.save_pretrained(tmp_path)
    model, params, report = load(tmp_path, "masked_autoencoder", (images, noise))
    assert report.new
    assert all(name.startswith("decoder/") for name in report.new)
    states, _ = MaskedAutoencoder(model.encoder, mask_ratio=0.5).apply(
        {"params": {"encoder": params["encoder"]}}, images, noise, method="encode"
    )
    theirs = their_outputs(reference, images, noise).last_hidden_state.numpy()
    assert_close(np.asarray(states), theirs, "body, half of the patches")


@pytest.mark.parametrize(("size", "fields"), [("base", (768, 12, 12, 3072)), ("huge", (1280, 32, 16, 5120))])
def test_published_sizes_have_as_many_parameters(size, fields):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    patch_size = 14 if size == "huge" else 16
    config = transformers.ViTMAEConfig(patch_size=patch_size, **dict(zip(names, fields)))
    with torch.device("meta"):
        theirs = sum(p.numel() for p in transformers.ViTMAEForPreTraining(config).parameters() if p.requires_grad)
    width, layers, heads, inner = fields
    encoder = vit.Encoder(224, patch_size, 3, width, layers, heads, inner, positions="sinusoidal")
    model, patches = MaskedAutoencoder(encoder), (224 // patch_size) ** 2
    arrays = np.zeros((1, 224, 224, 3), np.float32), np.zeros((1, patches), np.float32)
    shapes = jax.eval_shape(lambda key: model.init(key, *arrays)["params"], jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == theirs
