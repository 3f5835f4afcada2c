"""T5, Marian and BART: folders written and read here, and logits, exports and generation against Transformers."""

import json

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models.encoder_decoder import EncoderDecoder
from research.pretrained import huggingface

TOLERANCE = 5e-5  # of the largest logit
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_layers": 2, "num_heads": 3, "intermediate_size": 20}
T5 = {"positions": "relative", "norm": "rms", "norm_first": True, "use_bias": False, "embedding_scale": 1.0}
MODELS = {
    "t5": EncoderDecoder(
        **SIZES, **T5, num_decoder_layers=3, head_width=5, norm_epsilon=1e-3, logits_scale=12**-0.5, dropout=0.2
    ),
    "t5 v1.1": EncoderDecoder(
        **SIZES,
        **T5,
        num_decoder_layers=1,
        head_width=4,
        relative_buckets=8,
        relative_max_distance=20,
        activation="gelu_new",
        gated=True,
        tie_embeddings=False,
    ),
    "marian": EncoderDecoder(**SIZES, num_decoder_layers=3, activation="swish", logits_bias=True),
    "bart": EncoderDecoder(
        **SIZES,
        positions="learned",
        max_positions=9,
        embedding_norm=True,
        embedding_scale=1.0,
        activation="gelu",
        logits_bias=True,
        initializer_range=0.02,
    ),
    "transformer": EncoderDecoder(**SIZES),  # of Vaswani 2017, whose logits have no bias
}


def shapes(model):
    ids = np.zeros((1, 4), np.int32)
    return jax.eval_shape(lambda key: model.init(key, ids, ids)["params"], jax.random.key(0))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes(model))


def load(path):
    model = huggingface.load_model(str(path), "encoder_decoder")
    return model, *huggingface.load_params(str(path), model, shapes(model))


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def assert_equal(one, other):
    assert flat(one).keys() == flat(other).keys()
    jax.tree.map(np.testing.assert_array_equal, one, other)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, drop=(), **changes):
    config = {k: v for k, v in (read_config(folder) | changes).items() if k not in drop}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    return huggingface.save(tmp_path / "model", MODELS[name], random_params(MODELS[name]))


def save(tmp_path, name, model=None):
    model = model or MODELS[name]
    return huggingface.save(tmp_path / "model", model, random_params(model))


# Round trips


def test_save_then_load_gives_the_same_bits(name, folder):
    model, params, report = load(folder)
    assert_equal(params, random_params(MODELS[name]))
    assert report == huggingface.Report((), ())
    ids, targets = np.ones((2, 5), np.int32), np.ones((2, 3), np.int32)
    outputs = [jax.jit(one.apply)({"params": params}, ids, targets) for one in (model, MODELS[name])]
    np.testing.assert_array_equal(*outputs)


def test_load_then_save_gives_the_same_files(name, folder, tmp_path):
    model, params, _ = load(folder)
    again = huggingface.save(tmp_path / "again", model, params)
    for file in ("config.json", "model.safetensors"):
        assert (folder / file).read_bytes() == (again / file).read_bytes()


@pytest.mark.parametrize("name", ["t5", "t5 v1.1", "marian", "bart"])
def test_a_model_whose_fields_are_written_out_is_read_as_it_was(name, tmp_path):
    model, _, _ = load(save(tmp_path, name))
    fields = {"head_width": 4, "embedding_scale": 12**0.5} if name == "marian" else {}
    fields |= {"num_decoder_layers": 2} if name == "bart" else {}
    assert model.clone(dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, **fields) == MODELS[name].clone(
        dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, **fields
    )


def test_names_are_those_of_the_published_checkpoints(name, folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    if name.startswith("t5"):
        wi = "wi_0 wi_1" if name == "t5 v1.1" else "wi"
        attention = [f"{letter}.weight" for letter in "qkvo"]
        block = "encoder.block.0.layer."
        want = {
            *(f"{block}0.SelfAttention.{part}" for part in [*attention, "relative_attention_bias.weight"]),
            *(f"{block}1.DenseReluDense.{part}.weight" for part in f"{wi} wo".split()),
            *(f"{block}{i}.layer_norm.weight" for i in range(2)),
        }
        assert {key for key in tensors if key.startswith(block)} == want
        assert {f"decoder.block.0.layer.1.EncDecAttention.{part}" for part in attention} < set(tensors)
        rest = {"shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
        assert rest | ({"lm_head.weight"} if name == "t5 v1.1" else set()) == {k for k in tensors if "block" not in k}
    else:
        want = {"model.shared.weight"} | ({"final_logits_bias"} if name != "transformer" else set())
        if name == "bart":
            parts = "embed_positions.weight layernorm_embedding.weight layernorm_embedding.bias".split()
            want |= {f"model.{side}.{part}" for side in ("encoder", "decoder") for part in parts}
            assert tensors["model.decoder.embed_positions.weight"].shape == (9 + 2, 12)
        assert {key for key in tensors if "layers" not in key} == want
        parts = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj self_attn_layer_norm fc1 fc2"
        parts += " final_layer_norm encoder_attn.q_proj encoder_attn.out_proj encoder_attn_layer_norm"
        want = {f"model.decoder.layers.1.{part}.{kind}" for part in parts.split() for kind in ("weight", "bias")}
        assert want < set(tensors)
        assert name == "transformer" or tensors["final_logits_bias"].shape == (1, 31)


# config.json


def test_t5_says_in_one_key_what_its_feed_forward_networks_are(tmp_path):
    folder = save(tmp_path, "t5")
    for written, activation, gated in [
        ("relu", "relu", False),
        ("gelu", "gelu", False),
        ("gated-gelu", "gelu_new", True),
        ("gated-silu", "silu", True),
    ]:
        edit_config(folder, feed_forward_proj=written)
        model = huggingface.load_model(str(folder), "encoder_decoder")
        assert (model.activation, model.gated) == (activation, gated)
        again = huggingface.save(tmp_path / written, model, random_params(model))
        assert read_config(again)["feed_forward_proj"] == written
    with pytest.raises(UserError, match="needs activation='gelu_new', the model has 'gelu'"):
        save(tmp_path / "other", "t5", MODELS["t5"].clone(activation="gelu", gated=True))


def test_t5_scales_logits_where_it_ties_embeddings(tmp_path):
    folder = save(tmp_path, "t5")
    for drop, changes, tied in [
        ((), {}, True),
        (("scale_decoder_outputs", "tie_word_embeddings"), {}, True),
        (("scale_decoder_outputs",), {"tie_word_embeddings": False}, False),  # as Transformers 4 writes version 1.1
        ((), {"scale_decoder_outputs": False}, False),  # as Transformers 5 writes it
    ]:
        before = (folder / "config.json").read_text()
        edit_config(folder, drop, **changes)
        model = huggingface.load_model(str(folder), "encoder_decoder")
        assert (model.tie_embeddings, model.logits_scale) == (tied, 12**-0.5 if tied else 1.0)
        (folder / "config.json").write_text(before)
    with pytest.raises(UserError, match=r"needs logits_scale=0.28.*, the model has 1.0"):
        save(tmp_path / "other", "t5", MODELS["t5"].clone(logits_scale=1.0))


def test_decoders_are_as_deep_as_encoders_where_t5_does_not_say(tmp_path):
    folder = save(tmp_path, "t5")
    edit_config(folder, num_decoder_layers=None)
    assert huggingface.load_model(str(folder), "encoder_decoder").num_decoder_layers == 2


def test_what_generation_needs_is_in_config_json(name, folder, tmp_path):
    config = read_config(folder)
    assert (config["decoder_start_token_id"], config["pad_token_id"]) == ((2, 1) if name == "bart" else (0, 0))
    assert config["is_encoder_decoder"] is True
    ids = {"pad_token_id": 3, "decoder_start_token_id": 4, "eos_token_id": 5, "vocab_size": 99}
    again = huggingface.save(tmp_path / "again", MODELS[name], random_params(MODELS[name]), config=ids)
    assert read_config(again) == config | ids | {"vocab_size": 31}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("marian", {"decoder_attention_heads": 6}, "decoder_attention_heads=6, of which only the encoder's 3"),
        ("marian", {"decoder_ffn_dim": 7}, "decoder_ffn_dim=7, of which only the encoder's 20"),
        ("marian", {"decoder_vocab_size": 7}, "decoder_vocab_size=7, of which only vocab_size 31"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=False"),
        ("marian", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("marian", {"normalize_before": True}, "normalize_before=True"),
        ("marian", {"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
        ("bart", {"normalize_embedding": False}, "normalize_embedding=False"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder=False"),
        ("t5", {"d_kv": None}, "d_kv=null"),
    ],
)
def test_what_we_do_not_implement_is_refused(name, change, message, tmp_path):
    folder = save(tmp_path, name)
    edit_config(folder, **change)
    with pytest.raises(UserError, match=message):
        huggingface.load_model(str(folder), "encoder_decoder")


def test_heads_that_do_not_divide_the_width_are_named(tmp_path):
    folder = save(tmp_path, "marian")
    edit_config(folder, encoder_attention_heads=5, decoder_attention_heads=5)
    with pytest.raises(UserError, match="hidden_size 12 is not a multiple of num_heads 5"):
        shapes(huggingface.load_model(str(folder), "encoder_decoder"))


def test_a_model_that_no_family_has_is_named_with_every_reason(tmp_path):
    model = MODELS["t5"].clone(positions="sinusoidal")
    with pytest.raises(
        UserError,
        match=r"MarianMTModel needs head_width=None, the model has 5.*T5ForConditionalGeneration needs positions",
    ):
        save(tmp_path, "t5", model)
    with pytest.raises(UserError, match="T5ForConditionalGeneration has neither labels nor a problem_type"):
        huggingface.save(tmp_path / "m", MODELS["t5"], random_params(MODELS["t5"]), labels=["a"])


# Tensors


def test_duplicates_of_the_word_table_are_unused(name, folder):
    copies = {"t5": ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]}
    copies["t5 v1.1"] = copies["t5"][:2]
    positions = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    copies["bart"] = copies["t5"][2:] + [f"model.{key}" for key in copies["t5"][:2]]
    copies["marian"] = copies["transformer"] = ["lm_head.weight", "model.encoder.embed_tokens.weight", *positions]
    word = random_params(MODELS[name])["word"]["embedding"]
    edit_tensors(folder, lambda tensors: tensors.update({key: word.copy() for key in copies[name]}))
    _, params, report = load(folder)
    assert report == huggingface.Report((), tuple(sorted(copies[name])))
    assert_equal(params, random_params(MODELS[name]))


def test_a_word_table_of_the_decoders_own_is_not_left_unread_silently(name, folder):
    ours = "decoder.embed_tokens.weight" if name.startswith("t5") else "model.decoder.embed_tokens.weight"
    edit_tensors(folder, lambda tensors: tensors.update({ours: np.zeros((31, 12), np.float32)}))
    with pytest.raises(UserError, match=rf"holds a {ours} other than (model\.)?shared\.weight"):
        load(folder)


def test_an_output_layer_that_is_left_out_is_the_word_table(tmp_path):
    folder = save(tmp_path, "t5 v1.1")
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    _, params, report = load(folder)
    assert report == huggingface.Report((), ())
    np.testing.assert_array_equal(params["head"]["kernel"].T, params["word"]["embedding"])


def test_a_marian_without_a_bias_begins_one(tmp_path):
    folder = save(tmp_path, "marian")
    edit_tensors(folder, lambda tensors: tensors.pop("final_logits_bias"))
    assert load(folder)[2].new == ("head_bias",)


def test_a_missing_layer_is_named(tmp_path):
    folder = save(tmp_path, "t5")
    edit_tensors(folder, lambda tensors: tensors.pop("decoder.block.2.layer.1.EncDecAttention.k.weight"))
    with pytest.raises(UserError, match=r"decoder\.block\.2\.layer\.1\.EncDecAttention\.k\.weight missing"):
        load(folder)


# Transformers


PEERS = {
    "t5 v1.0": {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 9},
    "t5 v1.0 default buckets": {"layer_norm_epsilon": 0.1, "num_decoder_layers": None},
    "t5 v1.1": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "relative_attention_num_buckets": 7,
        "relative_attention_max_distance": 100,
    },
    "t5 v1.1 silu": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "marian": {"scale_embedding": True, "activation_function": "swish"},
    "marian unscaled": {"scale_embedding": False, "activation_function": "relu"},
    "bart": {},
    "bart scaled": {"scale_embedding": True, "decoder_layers": 1, "activation_function": "relu"},
    "marian gelu": {"scale_embedding": True, "activation_function": "gelu", "decoder_layers": 1},
}
PEER_SIZES = {
    "t5": {
        "vocab_size": 101,
        "d_model": 36,
        "d_kv": 10,
        "d_ff": 52,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 3,
        "layer_norm_epsilon": 1e-3,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "marian": {
        "vocab_size": 101,
        "d_model": 36,
        "encoder_layers": 2,
        "decoder_layers": 3,
        **{
            f"{side}_{size}": n
            for side in ("encoder", "decoder")
            for size, n in [("ffn_dim", 52), ("attention_heads", 4)]
        },
        "max_position_embeddings": 40,
        "pad_token_id": 7,
        "eos_token_id": 2,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 7,
    },
}
PEER_SIZES["bart"] = PEER_SIZES["marian"] | {"pad_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 2}


def peer(name, noise=0.2):
    """Returns a Transformers model whose every parameter is far from its initial value."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family = name.split()[0]
    config = PEER_SIZES[family] | PEERS[name]
    torch.manual_seed(0)
    if family == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval()
    elif family == "bart":
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**config)).eval()
    else:
        model = transformers.MarianMTModel(transformers.MarianConfig(**config)).eval()
    if config.get("tie_word_embeddings") is False:  # which Transformers 5 ties until it has read them from a file
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.add_(noise * torch.randn_like(parameter))
        if family != "t5":
            model.final_logits_bias.add_(torch.randn_like(model.final_logits_bias))
    return model


def batch(seed=0, size=5, source=23, target=17):
    """Returns pairs that are padded to different lengths on both sides."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for prefix, length in (("", source), ("decoder_", target)):
        mask = np.arange(length) < rng.integers(3, length + 1, (size, 1))
        mask[0] = True
        ids = rng.integers(8, 101, (size, length))
        arrays |= {f"{prefix}input_ids": np.where(mask, ids, 0), f"{prefix}attention_mask": mask}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def peer_logits(model, arrays):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(**{name: torch.tensor(array).long() for name, array in arrays.items()}).logits.numpy()


def our_logits(model, params, arrays):
    named = {f"{name}_Bx{'T' if 'decoder' in name else 'S'}": array for name, array in arrays.items()}
    return np.asarray(jax.jit(lambda params: model.apply({"params": params}, **named))(params))


def assert_close(ours, theirs, arrays, what):
    real = arrays["decoder_attention_mask"].astype(bool)
    error = np.abs(ours - theirs)[real].max() / np.abs(theirs[real]).max()
    print(f"{what}: {error:.2e} of the largest logit")
    assert error < TOLERANCE


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_and_exports_load(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = peer(name)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model, params, report = load(tmp_path / "theirs")
    assert report == huggingface.Report((), ())
    arrays = batch(source=140 if name.endswith("buckets") else 23)
    ours, theirs = our_logits(model, params, arrays), peer_logits(reference, arrays)
    assert_close(ours, theirs, arrays, name)

    ids = {key: PEER_SIZES[name.split()[0]][key] for key in ("pad_token_id", "decoder_start_token_id")}
    folder = huggingface.save(tmp_path / "ours", model, params, config=ids | {"eos_token_id": 2})
    loaded, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(ours, peer_logits(loaded.eval(), arrays), arrays, f"{name}, exported")


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_exports_generate_what_our_logits_say(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peer(name).save_pretrained(tmp_path / "theirs")
    model, params, _ = load(tmp_path / "theirs")
    ids = {key: PEER_SIZES[name.split()[0]][key] for key in ("pad_token_id", "decoder_start_token_id")}
    folder = huggingface.save(tmp_path / "ours", model, params, config=ids | {"eos_token_id": 2})
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    arrays = {name: array for name, array in batch().items() if not name.startswith("decoder")}
    given = {name: torch.tensor(array).long() for name, array in arrays.items()}
    theirs = loaded.generate(**given, do_sample=False, num_beams=1, use_cache=False, max_new_tokens=8).numpy()
    assert (theirs[:, 0] == ids["decoder_start_token_id"]).all()
    logits = our_logits(model, params, arrays | {"decoder_input_ids": theirs[:, :-1].astype(np.int32)})
    ends = theirs[:, 1:] == 2  # the start token may be the end token
    begun = np.cumsum(ends, axis=1) - ends == 0
    np.testing.assert_array_equal(logits.argmax(-1)[begun], theirs[:, 1:][begun])
    assert begun.sum() > 20


@pytest.mark.peers
def test_a_transformer_without_a_bias_of_the_logits_is_exported_as_a_marian(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = EncoderDecoder(101, 36, 2, num_heads=4, intermediate_size=50)
    params = random_params(model)
    folder = huggingface.save(tmp_path / "ours", model, params)
    loaded = transformers.MarianMTModel.from_pretrained(folder).eval()
    arrays = batch()
    assert_close(our_logits(model, params, arrays), peer_logits(loaded, arrays), arrays, "Vaswani's, exported")
