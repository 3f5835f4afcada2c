"""CLIP and SigLIP: folders written and read here, and logits and exports against Transformers."""

import json

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models.clip import Clip, SigLip, TextEncoder
from research.models.vit import Encoder
from research.pretrained import huggingface

TOLERANCE = 5e-5  # of the largest logit
IMAGE = {"image_size": 8, "patch_size": 4, "hidden_size": 12, "num_layers": 2, "num_heads": 3, "intermediate_size": 20}
TEXT = {"vocab_size": 31, "hidden_size": 8, "num_layers": 3, "num_heads": 2, "intermediate_size": 10}
CLIP = {"activation": "quick_gelu", "layer_norm_epsilon": 1e-5}
SIGLIP = {"activation": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-6}
MODELS = {
    "clip": Clip(
        Encoder(**IMAGE, **CLIP, patch_bias=False, embedding_norm=True),
        TextEncoder(**TEXT, **CLIP, max_positions=7),
        projection_size=6,
        end_id=30,
    ),
    "siglip": SigLip(
        Encoder(**IMAGE, **SIGLIP, prefix_tokens=0), TextEncoder(**TEXT, **SIGLIP, max_positions=7, causal=False)
    ),
}


def batch(model, size=4, seed=0):
    """Returns images, and texts that end at different places."""
    rng = np.random.default_rng(seed)
    length, vocabulary = model.text.max_positions, model.text.vocab_size
    ends = rng.integers(2, length, (size, 1))
    places = np.arange(length)
    ids = np.where(places < ends, rng.integers(3, vocabulary - 1, (size, length)), 1)
    ids = np.where(places == ends, vocabulary - 1, ids)
    side = model.image.image_size
    return {
        "image": rng.normal(size=(size, side, side, model.image.num_channels)).astype(np.float32),
        "input_ids": ids.astype(np.int32),
        "attention_mask": (places <= ends).astype(np.int32),
    }


def shapes(model):
    arrays = [batch(model)[name] for name in model.inputs]
    return jax.eval_shape(lambda key: model.init(key, *arrays)["params"], jax.random.key(0))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes(model))


def our_logits(model, params, arrays):
    return np.asarray(jax.jit(model.apply)({"params": params}, *[arrays[name] for name in model.inputs]))


def load(path):
    model = huggingface.load_model(str(path), "dual_encoder")
    return model, *huggingface.load_params(str(path), model, shapes(model))


def edit_config(folder, name, **changes):
    config = json.loads((folder / "config.json").read_text())
    config[name] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    return huggingface.save(tmp_path / "model", MODELS[name], random_params(MODELS[name]))


def test_save_then_load_gives_the_same_bits(name, folder, tmp_path):
    model, params, report = load(folder)
    assert report == huggingface.Report((), ())
    expected = random_params(MODELS[name])
    assert flax.traverse_util.flatten_dict(params).keys() == flax.traverse_util.flatten_dict(expected).keys()
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    arrays = batch(model)
    np.testing.assert_array_equal(our_logits(model, params, arrays), our_logits(MODELS[name], expected, arrays))
    again = huggingface.save(tmp_path / "again", model, params)
    for file in ("config.json", "model.safetensors"):
        assert (folder / file).read_bytes() == (again / file).read_bytes()


def test_names_are_those_of_the_published_checkpoints(name, folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    want = {
        "vision_model.embeddings.patch_embedding.weight": (12, 3, 4, 4),
        "vision_model.embeddings.position_embedding.weight": (5 if name == "clip" else 4, 12),
        "text_model.embeddings.position_embedding.weight": (7, 8),
        "vision_model.encoder.layers.1.self_attn.out_proj.bias": (12,),
        "text_model.encoder.layers.2.layer_norm2.weight": (8,),
        "logit_scale": () if name == "clip" else (1,),
    }
    if name == "clip":
        want |= {"text_projection.weight": (6, 8), "vision_model.embeddings.class_embedding": (12,)}
        want |= {"vision_model.pre_layrnorm.bias": (12,)}
    else:
        want |= {"text_model.head.weight": (12, 8), "vision_model.head.attention.in_proj_weight": (36, 12)}
        want |= {"vision_model.head.probe": (1, 1, 12), "logit_bias": (1,)}
    assert want.items() <= {key: array.shape for key, array in tensors.items()}.items()


def test_overrides_name_their_tower(folder):
    model = huggingface.load_model(str(folder), "dual_encoder", text_dtype="bfloat16", image_drop_path=0.1)
    assert (model.text.dtype, model.image.dtype, model.image.drop_path) == ("bfloat16", "float32", 0.1)
    with pytest.raises(UserError, match="'text_num_layers' is fixed by the pretrained weights"):
        huggingface.load_model(str(folder), "dual_encoder", text_num_layers=4)


def test_old_files_have_a_second_section_that_counts(name, folder):
    config = json.loads((folder / "config.json").read_text())
    edited = config | {"text_config": {}, "text_config_dict": config["text_config"], "vision_config_dict": None}
    (folder / "config.json").write_text(json.dumps(edited))
    assert load(folder)[0] == load(folder)[0].clone(text=MODELS[name].text)


def test_an_end_token_from_before_it_was_recorded_is_the_highest_id(tmp_path):
    folder = huggingface.save(tmp_path / "model", MODELS["clip"], random_params(MODELS["clip"]))
    edit_config(folder, "text_config", eos_token_id=2)
    assert load(folder)[0].end_id == 30
    with pytest.raises(UserError, match="takes an end_id of 2 for the highest id"):
        huggingface.save(tmp_path / "other", MODELS["clip"].clone(end_id=2), random_params(MODELS["clip"]))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("text_config", {"projection_size": 5}, "projects texts to 5, images to 12"),
        ("vision_config", {"vision_use_head": False}, "vision_use_head=false"),
        ("vision_config", {"patch_size": [4, 2]}, "of which only squares"),
    ],
)
def test_what_we_do_not_implement_is_refused(section, change, message, tmp_path):
    folder = huggingface.save(tmp_path / "model", MODELS["siglip"], random_params(MODELS["siglip"]))
    edit_config(folder, section, **change)
    with pytest.raises(UserError, match=message):
        load(folder)


# Transformers


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 52, "layer_norm_eps": 1e-3}
PEER_IMAGE = SIZES | {"hidden_size": 36, "image_size": 20, "patch_size": 5}
PEER_TEXT = SIZES | {"hidden_size": 24, "vocab_size": 101, "max_position_embeddings": 11, "num_hidden_layers": 3}
PEERS = {
    "clip": ("CLIP", {"eos_token_id": 100}, {"projection_dim": 18}),
    "clip, as it was": ("CLIP", {"eos_token_id": 2, "hidden_act": "gelu"}, {"projection_dim": 40}),
    "siglip": ("Siglip", {"projection_size": 36}, {}),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_and_exports_load(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, text, both = PEERS[name]
    config = getattr(transformers, f"{kind}Config")(text_config=PEER_TEXT | text, vision_config=PEER_IMAGE, **both)
    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model, params, report = load(tmp_path / "theirs")
    assert report == huggingface.Report((), ())
    arrays = batch(model, size=6)

    def their_logits(model):
        given = {"input_ids": torch.tensor(arrays["input_ids"]).long()}
        if kind == "CLIP":
            given["attention_mask"] = torch.tensor(arrays["attention_mask"])
        with torch.no_grad():
            return model(pixel_values=torch.tensor(arrays["image"].transpose(0, 3, 1, 2)), **given).logits_per_image

    ours = our_logits(model, params, arrays)
    folder = huggingface.save(tmp_path / "ours", model, params)
    loaded, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for what, theirs in (("read", their_logits(reference)), ("exported", their_logits(loaded.eval()))):
        error = np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
        print(f"{name}, {what}: {error:.2e} of the largest logit")
        assert error < TOLERANCE
