"""ModernBERT: folders written and read here, and logits and exports against Transformers."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models.modernbert import Encoder, MaskedLM, SequenceClassifier
from research.pretrained import huggingface

TOLERANCE = 5e-5  # of the largest logit
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_layers": 4, "num_heads": 3, "intermediate_size": 10}
ENCODER = Encoder(**SIZES, max_positions=40, local_window=4, global_every=2, local_theta=100.0)
MODELS = {
    "masked_lm": MaskedLM(ENCODER),
    "masked_lm, untied": MaskedLM(
        ENCODER.clone(norm_bias=True, attention_bias=True, mlp_bias=True, num_layers=1), tie_embeddings=False
    ),
    "sequence_classifier": SequenceClassifier(ENCODER, 3, pooling="mean"),
}


def shapes(model):
    return jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes(model))


def batch(size=5, length=21, vocabulary=31, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(3, length + 1, (size, 1))
    mask[0] = True
    ids = np.where(mask, rng.integers(3, vocabulary, (size, length)), 0)
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}


def our_logits(model, params, arrays):
    return np.asarray(jax.jit(model.apply)({"params": params}, arrays["input_ids"], arrays["attention_mask"]))


def load(path, kind):
    fields = {"num_outputs": 3} if kind == "sequence_classifier" else {}
    model = huggingface.load_model(str(path), kind, **fields)
    return model, *huggingface.load_params(str(path), model, shapes(model))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    return huggingface.save(tmp_path / "model", MODELS[name], random_params(MODELS[name]))


def test_save_then_load_gives_the_same_bits(name, folder, tmp_path):
    model, params, report = load(folder, name.partition(",")[0])
    assert (model, report) == (MODELS[name], huggingface.Report((), ()))
    expected = random_params(MODELS[name])
    assert flax.traverse_util.flatten_dict(params).keys() == flax.traverse_util.flatten_dict(expected).keys()
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    again = huggingface.save(tmp_path / "again", model, params)
    for file in ("config.json", "model.safetensors"):
        assert (folder / file).read_bytes() == (again / file).read_bytes()


def test_names_are_those_of_the_published_checkpoints(tmp_path):
    folder = huggingface.save(tmp_path / "m", MODELS["masked_lm"], random_params(MODELS["masked_lm"]))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    every = ("attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo")
    want = {f"model.layers.{i}.{part}.weight" for i in range(4) for part in every}
    want |= {f"model.layers.{i}.attn_norm.weight" for i in (1, 2, 3)}
    want |= {"model.embeddings.tok_embeddings.weight", "model.embeddings.norm.weight", "model.final_norm.weight"}
    assert set(tensors) == want | {"head.dense.weight", "head.norm.weight", "decoder.bias"}


def test_a_classifier_begins_with_the_language_models_first_head_layer(tmp_path):
    params = random_params(MODELS["masked_lm"])
    folder = huggingface.save(tmp_path / "m", MODELS["masked_lm"], params)
    _, loaded, report = load(folder, "sequence_classifier")
    np.testing.assert_array_equal(loaded["head_dense"]["kernel"], params["head_dense"]["kernel"])
    assert report == huggingface.Report(("head_output/bias", "head_output/kernel"), ("decoder.bias",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_bias": False}, "decoder_bias=False"),
        ({"layer_types": ["sliding_attention"] * 4}, "only every n-th may be of full_attention"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
    ],
)
def test_what_we_do_not_implement_is_refused(changes, message, tmp_path):
    folder = huggingface.save(tmp_path / "m", MODELS["masked_lm"], random_params(MODELS["masked_lm"]))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load(folder, "masked_lm")


def test_only_near_tokens_and_layers_that_attend_to_all_carry_a_change():
    model = ENCODER.clone(num_layers=3, global_every=3)  # all, near, near
    params = random_params(model)
    arrays = batch(size=1, length=16)
    other = arrays["input_ids"].copy()
    other[0, 0] = 7 if other[0, 0] != 7 else 8
    apply = jax.jit(model.apply)

    def moved(params):
        one, two = (apply({"params": params}, ids) for ids in (arrays["input_ids"], other))
        return np.flatnonzero(np.abs(one - two).max(axis=-1)[0] > 1e-6)

    assert len(moved(params)) == 16
    silent = jax.tree.map(jnp.zeros_like, params["first"]["attention"])
    near = params | {"first": params["first"] | {"attention": silent}}
    np.testing.assert_array_equal(moved(near), np.arange(5))  # two layers reach two places each


def test_packed_texts_are_as_they_are_alone():
    model, lengths = MODELS["masked_lm"].clone(encoder=ENCODER.clone(num_layers=2)), (9, 12)
    params, apply = random_params(model), jax.jit(model.apply)
    ids = np.random.default_rng(0).integers(3, 31, (2, 12)).astype(np.int32)
    mask = (np.arange(12) < np.array(lengths)[:, None]).astype(np.int32)
    alone = apply({"params": params}, ids, mask)
    real = mask.astype(bool)
    numbers = np.repeat([1, 2], lengths)[None].astype(np.int32)
    places = np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int32)
    packed = apply({"params": params}, ids[real][None], numbers, None, places)
    np.testing.assert_allclose(packed[0], alone[real], atol=1e-4)


# Transformers


PEER = {
    "vocab_size": 101,
    "hidden_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 52,
    "max_position_embeddings": 64,
    "local_attention": 8,
    "norm_eps": 1e-3,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
}
PEERS = {
    "masked_lm": {},
    "masked_lm, every second, with biases": {
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_activation": "silu",
    },
    "sequence_classifier": {"num_labels": 3, "num_hidden_layers": 1},
    "sequence_classifier, mean": {"num_labels": 3, "classifier_pooling": "mean"},
}


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_and_exports_load(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = name.partition(",")[0]
    head = {"masked_lm": "ForMaskedLM", "sequence_classifier": "ForSequenceClassification"}[kind]
    torch.manual_seed(0)
    reference = getattr(transformers, f"ModernBert{head}")(transformers.ModernBertConfig(**PEER | PEERS[name])).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model, params, report = load(tmp_path / "theirs", kind)
    assert report == huggingface.Report((), ())
    arrays = batch(length=40, vocabulary=101)

    def their_logits(model):
        with torch.no_grad():
            return model(**{key: torch.tensor(array).long() for key, array in arrays.items()}).logits.numpy()

    ours = our_logits(model, params, arrays)
    real = arrays["attention_mask"].astype(bool) if kind == "masked_lm" else slice(None)
    folder = huggingface.save(tmp_path / "ours", model, params)
    loaded, info = getattr(transformers, f"ModernBert{head}").from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for what, theirs in (("read", their_logits(reference)), ("exported", their_logits(loaded.eval()))):
        error = np.abs(ours - theirs)[real].max() / np.abs(theirs[real]).max()
        print(f"{name}, {what}: {error:.2e} of the largest logit")
        assert error < TOLERANCE
    for implementation in ("xla", "chunked"):
        other = model.clone(encoder=model.encoder.clone(attention=implementation))
        np.testing.assert_allclose(our_logits(other, params, arrays)[real], ours[real], rtol=1e-3, atol=1e-3)
