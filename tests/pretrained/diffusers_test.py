"""DiT in Diffusers' folders, written and read here."""

import json

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models.dit import DiT
from research.pretrained import huggingface

SIZES = {"image_size": 12, "patch_size": 3, "num_channels": 2, "num_classes": 5}
SIZES |= {"hidden_size": 24, "num_layers": 3, "num_heads": 3, "intermediate_size": 96}
MODELS = {
    "published": DiT(**SIZES),
    "plain": DiT(**SIZES, learned_variance=False, use_bias=False, activation="silu", mlp_norm_epsilon=1e-3),
}


def arguments(model, batch=2):
    return np.zeros((batch, *model.shape), np.float32), np.zeros(batch), np.zeros(batch, np.int32)


def shapes(model):
    return jax.eval_shape(lambda key: model.init(key, *arguments(model))["params"], jax.random.key(0))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes(model))


@pytest.fixture
def folder(tmp_path):
    return huggingface.save(tmp_path / "dit", MODELS["published"], random_params(MODELS["published"]))


def edit_config(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_round_trip(name, shard_bytes, tmp_path):
    model, params = MODELS[name], random_params(MODELS[name])
    huggingface.save(tmp_path / "dit", model, params, max_shard_bytes=shard_bytes)
    loaded = huggingface.load_model(str(tmp_path / "dit"), "denoiser")
    assert loaded == model
    again, report = huggingface.load_params(str(tmp_path / "dit"), loaded, shapes(loaded))
    assert report == huggingface.Report((), ())
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_folder_is_one_of_diffusers(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel"
    assert "model_type" not in config
    tensors = safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")
    copies = [tensors[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] for i in range(3)]
    assert copies[0].shape == (6, 24)
    np.testing.assert_array_equal(copies[0], copies[2])


def test_the_older_class_is_read_too(folder):
    edit_config(folder, _class_name="Transformer2DModel", norm_num_groups=32)
    assert huggingface.load_model(str(folder), "denoiser") == MODELS["published"]


def test_embeddings_must_be_shared(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    tensors[name] = tensors[name] + 1
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError, match=rf"holds a {name} other than transformer_blocks\.0.*shared by the layers"):
        huggingface.load_params(str(folder), MODELS["published"], shapes(MODELS["published"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm_type": "layer_norm"}, "norm_type='layer_norm', of which only 'ada_norm_zero'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True, of which only False"),
        ({"activation_fn": "geglu"}, "unknown activation_fn 'geglu'; did you mean 'gelu'"),
        ({"out_channels": 3}, "out_channels=3 for in_channels=2"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=null"),
        ({"_class_name": "DiTTransformer3DModel"}, "unknown model_type 'DiTTransformer3DModel'; did you mean 'DiTTr"),
    ],
)
def test_what_is_not_implemented(keys, message, folder):
    edit_config(folder, **keys)
    with pytest.raises(UserError, match=message):
        huggingface.load_model(str(folder), "denoiser")


def test_what_diffusers_cannot_say(tmp_path):
    model = MODELS["published"].clone(intermediate_size=50)
    with pytest.raises(UserError, match="DiTTransformer2DModel needs intermediate_size=96, the model has 50"):
        huggingface.save(tmp_path / "dit", model, random_params(model))


# --- against Diffusers itself ---------------------------------------------------------------------

TOLERANCE = 5e-5  # of the largest output
PEERS = {
    "published": {},
    "fixed variance, no biases": {"out_channels": 2, "attention_bias": False, "norm_eps": 1e-3},
    "another activation": {"activation_fn": "gelu", "out_channels": None},
    "silu": {"activation_fn": "linear-silu"},
    "one patch": {"sample_size": 5, "patch_size": 5, "num_layers": 1},
}


def peer(**config):
    """Returns Diffusers' model with every parameter far from its initial value; the blocks share their embeddings."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 2, "out_channels": 4, "num_layers": 3}
    sizes |= {"sample_size": 15, "patch_size": 3, "num_embeds_ada_norm": 7}
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**(sizes | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def inputs(model, batch=6):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(batch, *model.shape)).astype(np.float32)
    label = rng.integers(0, model.num_classes + 1, batch).astype(np.int32)
    return image, np.array([0, 1, 13, 500, 998, 999], np.float32), label


def peer_output(reference, image, time, label):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        image = torch.tensor(image.transpose(0, 3, 1, 2))
        output = reference(image, timestep=torch.tensor(time), class_labels=torch.tensor(label).long()).sample
    return output.numpy().transpose(0, 2, 3, 1)


def difference(ours, theirs):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{error:.2e} of the largest output")
    return error


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_outputs_equal_those_of_diffusers(name, tmp_path):
    reference = peer(**PEERS[name])
    reference.save_pretrained(tmp_path)
    model = huggingface.load_model(str(tmp_path), "denoiser")
    params, report = huggingface.load_params(str(tmp_path), model, shapes(model))
    assert report == huggingface.Report((), ())
    arrays = inputs(model)
    ours = jax.jit(lambda params: model.apply({"params": params}, *arrays))(params)
    assert difference(np.asarray(ours), peer_output(reference, *arrays)) < TOLERANCE


@pytest.mark.peers
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_diffusers_loads_what_we_save(name, shard_bytes, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model, params = MODELS[name], random_params(MODELS[name])
    huggingface.save(tmp_path / "dit", model, params, max_shard_bytes=shard_bytes)
    reference = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "dit").eval()
    arrays = inputs(model)
    ours = jax.jit(lambda params: model.apply({"params": params}, *arrays))(params)
    assert difference(np.asarray(ours), peer_output(reference, *arrays)) < TOLERANCE


@pytest.mark.peers
def test_a_bin_file_of_diffusers_is_read(tmp_path):
    reference = peer()
    reference.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").is_file()
    model = huggingface.load_model(str(tmp_path), "denoiser")
    params, _ = huggingface.load_params(str(tmp_path), model, shapes(model))
    names = set(flax.traverse_util.flatten_dict(params, sep="/"))
    assert {"patches/kernel", "layers/attention/query/kernel", "label/embedding"} <= names
