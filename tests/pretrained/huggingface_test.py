"""Hugging Face folders written and read here; what is wrong in them is named."""

import importlib
import json
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from research.errors import UserError
from research.models import bert, layers
from research.pretrained import huggingface

SIZES = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 20,
    "max_positions": 17,
}
MODELS = {
    "bert": bert.SequenceClassifier(
        bert.Encoder(**SIZES, num_token_types=3, layer_norm_epsilon=1e-3, dropout=0.2, activation="silu"), 3
    ),
    "roberta": bert.SequenceClassifier(
        bert.Encoder(**SIZES, num_token_types=1, position_offset=5, layer_norm_epsilon=1e-5),
        3,
        head_dropout=0.3,
        head_input_dropout=0.3,
    ),
    "distilbert": bert.SequenceClassifier(
        bert.Encoder(**SIZES, num_token_types=0, attention_dropout=0.3), 3, head_activation="relu", head_dropout=0.2
    ),
}
FAMILIES = sorted(MODELS)
HEADS = {
    "masked_lm": lambda encoder: bert.MaskedLM(encoder, encoder.activation if encoder.num_token_types != 1 else "gelu"),
    "masked_lm, untied": lambda encoder: HEADS["masked_lm"](encoder).clone(tie_embeddings=False),
    "question_answerer": bert.QuestionAnswerer,
    "token_classifier": lambda encoder: bert.TokenClassifier(encoder, 4),
}


def shapes(model):
    return jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes(model))


def load(path, model=None, **options):
    model = model or huggingface.sequence_classifier(str(path))
    return huggingface.load_params(str(path), model, shapes(model), **options)


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def assert_equal(one, other):
    assert flat(one).keys() == flat(other).keys()
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, tmp_path):
    """A saved model of the family."""
    return huggingface.save(tmp_path / "model", MODELS[family], random_params(MODELS[family]))


@pytest.fixture
def bert_folder(tmp_path):
    return huggingface.save(tmp_path / "model", MODELS["bert"], random_params(MODELS["bert"]))


def edit_tensors(folder, change):
    """Rewrites the weights as `change(tensors)` leaves or returns them."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, drop=(), **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


# Round trips


def test_save_then_load_gives_the_same_model_and_bits(family, folder):
    model = MODELS[family]
    assert huggingface.sequence_classifier(str(folder)) == model
    params, report = load(folder, model)
    assert_equal(params, random_params(model))
    assert report == huggingface.Report(new=(), unused=())


def test_load_then_save_gives_the_same_files(family, folder, tmp_path):
    params, _ = load(folder)
    again = huggingface.save(tmp_path / "again", huggingface.sequence_classifier(str(folder)), params)
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_params_are_laid_out_as_init_lays_them_out(family, folder):
    params, _ = load(folder)
    want = shapes(MODELS[family])
    assert jax.tree.structure(params) == jax.tree.structure(want)
    assert all(type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, want)
    logits = jax.jit(MODELS[family].apply)({"params": params}, np.ones((2, 4), np.int32))
    assert logits.shape == (2, 3)
    assert np.isfinite(logits).all()


def test_kernels_are_transposed_and_layers_stacked(bert_folder):
    params, _ = load(bert_folder)
    tensors = safetensors.numpy.load_file(bert_folder / "model.safetensors")
    for layer in range(2):
        np.testing.assert_array_equal(
            params["encoder"]["layers"]["mlp"]["up"]["kernel"][layer],
            tensors[f"bert.encoder.layer.{layer}.intermediate.dense.weight"].T,
        )
    np.testing.assert_array_equal(params["head_output"]["kernel"], tensors["classifier.weight"].T)


NAMES = {
    "bert": """bert.embeddings.word_embeddings bert.embeddings.position_embeddings bert.embeddings.token_type_embeddings
        bert.embeddings.LayerNorm. bert.encoder.layer.0.attention.self.query. bert.encoder.layer.0.attention.self.key.
        bert.encoder.layer.0.attention.self.value. bert.encoder.layer.0.attention.output.dense.
        bert.encoder.layer.0.attention.output.LayerNorm. bert.encoder.layer.0.intermediate.dense.
        bert.encoder.layer.0.output.dense. bert.encoder.layer.0.output.LayerNorm. bert.pooler.dense. classifier.""",
    "distilbert": """distilbert.embeddings.word_embeddings distilbert.embeddings.position_embeddings
        distilbert.embeddings.LayerNorm. distilbert.transformer.layer.0.attention.q_lin.
        distilbert.transformer.layer.0.attention.k_lin. distilbert.transformer.layer.0.attention.v_lin.
        distilbert.transformer.layer.0.attention.out_lin. distilbert.transformer.layer.0.sa_layer_norm.
        distilbert.transformer.layer.0.ffn.lin1. distilbert.transformer.layer.0.ffn.lin2.
        distilbert.transformer.layer.0.output_layer_norm. pre_classifier. classifier.""",
}
NAMES["roberta"] = (
    NAMES["bert"]
    .replace("bert.", "roberta.")
    .replace("roberta.pooler.dense. classifier.", "classifier.dense. classifier.out_proj.")
)


def test_names_are_those_of_the_published_checkpoints(family, folder):
    # A name that ends with a dot stands for a weight and a bias.
    want = set()
    for name in NAMES[family].split():
        want |= {f"{name}weight", f"{name}bias"} if name.endswith(".") else {f"{name}.weight"}
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        assert {name for name in file.keys() if "layer.1." not in name} == want  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}


# Other heads


def save_head(folder, family, head):
    model = HEADS[head](MODELS[family].encoder)
    return huggingface.save(folder, model, random_params(model)), model


def load_head(folder, kind, **options):
    if kind in ("sequence_classifier", "token_classifier"):
        model = getattr(huggingface, kind)(str(folder), options.pop("num_outputs", None))
    else:
        model = huggingface.load_model(str(folder), kind)
    return huggingface.load_params(str(folder), model, shapes(model), **options)


def stored_names(folder):
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        return set(file.keys())


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_make_the_round_trip(family, head, tmp_path):
    folder, model = save_head(tmp_path / "model", family, head)
    kind = head.partition(",")[0]
    rates = {"dropout": model.encoder.dropout, "attention_dropout": model.encoder.attention_dropout}
    read = huggingface.load_model(str(folder), kind, **({"num_outputs": 4} if kind == "token_classifier" else {}))
    assert read.clone(encoder=read.encoder.clone(**rates), **head_rate(model)) == model
    params, report = load_head(folder, kind)
    assert_equal(params, random_params(model))
    assert report == huggingface.Report((), ())
    again = huggingface.save(tmp_path / "again", read, params)
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def head_rate(model):
    return {"head_dropout": model.head_dropout} if hasattr(model, "head_dropout") else {}


HEAD_NAMES = {
    ("bert", "masked_lm"): "cls.predictions.bias cls.predictions.transform.dense. cls.predictions.transform.LayerNorm.",
    ("bert", "question_answerer"): "qa_outputs.",
    ("bert", "token_classifier"): "classifier.",
    ("roberta", "masked_lm"): "lm_head.bias lm_head.dense. lm_head.layer_norm.",
    ("roberta", "question_answerer"): "qa_outputs.",
    ("roberta", "token_classifier"): "classifier.",
    ("distilbert", "masked_lm"): "vocab_transform. vocab_layer_norm. vocab_projector.bias",
    ("distilbert", "question_answerer"): "qa_outputs.",
    ("distilbert", "token_classifier"): "classifier.",
}
for name, own in {"bert": "cls.predictions.decoder.", "roberta": "lm_head.decoder."}.items():
    HEAD_NAMES[name, "masked_lm, untied"] = f"{HEAD_NAMES[name, 'masked_lm']} {own}"
HEAD_NAMES["distilbert", "masked_lm, untied"] = "vocab_transform. vocab_layer_norm. vocab_projector."


@pytest.mark.parametrize("head", HEADS)
def test_names_of_other_heads_are_those_of_the_published_checkpoints(family, head, tmp_path):
    folder, _ = save_head(tmp_path / "model", family, head)
    want = set()
    for name in HEAD_NAMES[family, head].split():
        want |= {f"{name}weight", f"{name}bias"} if name.endswith(".") else {name}
    assert {name for name in stored_names(folder) if not name.startswith(f"{family}.")} == want
    config = json.loads((folder / "config.json").read_text())
    assert ("id2label" in config) == (head == "token_classifier")
    assert config["architectures"][0].endswith(
        {"masked_lm": "MaskedLM", "question": "QuestionAnswering", "token": "TokenClassification"}[
            "masked_lm" if head.startswith("masked_lm") else head.partition("_")[0]
        ]
    )


@pytest.mark.parametrize("kind", ["sequence_classifier", "question_answerer", "token_classifier"])
@pytest.mark.parametrize("head", ["masked_lm", "masked_lm, untied"])
def test_a_pretrained_masked_lm_is_fine_tuned_with_a_new_head(family, head, kind, tmp_path):
    folder, _ = save_head(tmp_path / "model", family, head)
    params, report = load_head(folder, kind, **({} if kind == "question_answerer" else {"num_outputs": 3}))
    assert report.unused == tuple(sorted(name for name in stored_names(folder) if not name.startswith(f"{family}.")))
    layers = ["head_dense", "head_output"] if kind == "sequence_classifier" else ["head_output"]
    assert report.new == tuple(f"{layer}/{part}" for layer in layers for part in ("bias", "kernel"))
    assert_equal(params["encoder"], random_params(HEADS[head](MODELS[family].encoder))["encoder"])


def test_a_classifier_begins_a_new_masked_lm_and_a_new_question_answerer(family, folder):
    for kind in ("masked_lm", "question_answerer"):
        _, report = load_head(folder, kind)
        assert report.new
        assert all(name.startswith("head_") for name in report.new)
        assert set(last_layer(family, "weight")) < set(report.unused)


def test_heads_of_the_same_names_are_told_apart_by_the_architecture(tmp_path):
    folder, _ = save_head(tmp_path / "bert", "bert", "token_classifier")
    with pytest.raises(UserError, match="is that of BertForTokenClassification, not of BertForSequenceClassification"):
        load_head(folder, "sequence_classifier")
    assert "head_output/bias" in load_head(folder, "sequence_classifier", new_head=True)[1].new
    folder, _ = save_head(tmp_path / "roberta", "roberta", "token_classifier")
    assert "head_dense/bias" in load_head(folder, "sequence_classifier")[1].new
    folder, _ = save_head(tmp_path / "masked", "bert", "masked_lm")
    edit_config(folder, architectures=["BertForPreTraining"])
    assert load_head(folder, "masked_lm")[1].new == ()
    assert "head_bias" in load_head(folder, "masked_lm", new_head=True)[1].new


TIED = {
    "bert": ["cls.predictions.decoder.bias", "cls.predictions.decoder.weight", "cls.seq_relationship.bias"],
    "roberta": ["lm_head.decoder.bias", "lm_head.decoder.weight", "roberta.pooler.dense.bias"],
    "distilbert": ["vocab_projector.weight"],
}
TIED["bert"] = ["bert.pooler.dense.weight", *TIED["bert"]]


def test_tied_weights_and_the_pooler_are_unused_by_a_masked_lm(family, tmp_path):
    folder, model = save_head(tmp_path / "model", family, "masked_lm")
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(3, np.float32) for name in TIED[family]}))
    params, report = load_head(folder, "masked_lm")
    assert report == huggingface.Report((), tuple(TIED[family]))
    assert_equal(params, random_params(model))


def test_a_question_answerer_has_two_outputs(tmp_path):
    folder, model = save_head(tmp_path / "model", "bert", "question_answerer")
    edit_tensors(folder, lambda tensors: tensors.update({"qa_outputs.weight": np.zeros((3, 12), np.float32)}))
    with pytest.raises(UserError, match=r"has 3 outputs \(qa_outputs.weight\), the model 2"):
        load_head(folder, "question_answerer")
    with pytest.raises(UserError, match="BertForQuestionAnswering has neither labels"):
        huggingface.save(tmp_path / "other", model, random_params(model), labels=["a", "b"])


def test_a_token_classifier_has_as_many_outputs_as_the_checkpoint_has_labels(tmp_path):
    folder, _ = save_head(tmp_path / "model", "bert", "token_classifier")
    assert huggingface.token_classifier(str(folder)).num_outputs == 4
    edit_config(folder, drop=["id2label", "label2id"])
    assert huggingface.token_classifier(str(folder)).num_outputs == 2


# Layouts of the hub


def test_sharded(family, folder, tmp_path):
    sharded = huggingface.save(
        tmp_path / "sharded", MODELS[family], random_params(MODELS[family]), max_shard_bytes=4000
    )
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == 4 * sum(
        leaf.size for leaf in jax.tree.leaves(random_params(MODELS[family]))
    )
    assert_equal(load(sharded)[0], load(folder)[0])
    shard = sorted(set(index["weight_map"].values()))[1]
    (sharded / shard).unlink()
    with pytest.raises(UserError, match=rf"index\.json names the shard {shard}, which is missing"):
        load(sharded)


def test_without_the_prefix_and_without_a_head(family, folder):
    want, _ = load(folder)
    heads = ("classifier", "pre_classifier")
    edit_tensors(
        folder,
        lambda tensors: {
            name.removeprefix(f"{family}."): array for name, array in tensors.items() if not name.startswith(heads)
        },
    )
    params, report = load(folder)
    new = [name for name in flat(want) if name.startswith("head_output" if family == "bert" else "head_")]
    assert report.new == tuple(sorted(new))
    want, params = flat(want), flat(params)
    assert all(isinstance(params[name], jax.ShapeDtypeStruct) for name in new)
    assert_equal({name: want[name] for name in want if name not in new}, {n: params[n] for n in params if n not in new})


def test_a_bert_without_pooler_gets_a_new_head(bert_folder):
    edit_tensors(bert_folder, lambda tensors: {n: a for n, a in tensors.items() if "pooler" not in n})
    _, report = load(bert_folder)
    assert report.new == ("head_dense/bias", "head_dense/kernel")


def test_gamma_and_beta(folder):
    want, _ = load(folder)

    def old(name):
        norm = re.fullmatch(r"(.*(?:LayerNorm|layer_norm))\.(weight|bias)", name)
        return f"{norm[1]}.{'gamma' if norm[2] == 'weight' else 'beta'}" if norm else name

    edit_tensors(folder, lambda tensors: {old(name): array for name, array in tensors.items()})
    assert_equal(load(folder)[0], want)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(bert_folder, dtype):
    want = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), load(bert_folder)[0])
    edit_tensors(bert_folder, lambda tensors: {name: array.astype(dtype) for name, array in tensors.items()})
    assert_equal(load(bert_folder)[0], want)


UNUSED = {
    "bert": ["bert.embeddings.position_ids", "cls.predictions.bias", "cls.seq_relationship.weight"],
    "roberta": ["roberta.embeddings.position_ids", "lm_head.dense.weight", "roberta.pooler.dense.bias"],
    "distilbert": ["vocab_projector.weight", "vocab_layer_norm.bias", "distilbert.embeddings.position_ids"],
}


def test_known_leftovers_are_reported_as_unused(family, folder):
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(3, np.int64) for name in UNUSED[family]}))
    assert load(folder)[1] == huggingface.Report(new=(), unused=tuple(sorted(UNUSED[family])))


# What does not fit is named


def test_every_missing_surplus_and_misshapen_tensor_is_named(bert_folder):
    def spoil(tensors):
        del tensors["bert.encoder.layer.1.attention.self.key.bias"]
        tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(12, np.float32)
        tensors["adapter.down"] = np.zeros(3, np.float32)
        tensors["bert.embeddings.word_embeddings.weight"] = np.zeros((30, 12), np.float32)
        tensors["bert.embeddings.LayerNorm.bias"] = np.zeros(12, np.int8)

    edit_tensors(bert_folder, spoil)
    with pytest.raises(UserError) as error:
        load(bert_folder)
    message = str(error.value)
    assert "\n" not in message
    assert "bert.encoder.layer.1.attention.self.key.bias missing" in message
    assert "adapter.down, bert.encoder.layer.2.output.dense.bias unknown" in message
    assert "bert.embeddings.word_embeddings.weight (30, 12) instead of (31, 12) of the wrong shape" in message
    assert "bert.embeddings.LayerNorm.bias (I8) not floating" in message


def test_many_missing_tensors_are_counted(bert_folder):
    edit_tensors(bert_folder, lambda tensors: {n: a for n, a in tensors.items() if ".layer.1." not in n})
    with pytest.raises(
        UserError, match=r"bert\.encoder\.layer\.1\.attention\.self\.query\.weight, .* and 6 more missing"
    ):
        load(bert_folder)


def test_half_a_head_is_missing_the_other_half(family, folder):
    edit_tensors(folder, lambda tensors: {n: a for n, a in tensors.items() if n not in last_layer(family, "bias")})
    with pytest.raises(UserError, match=rf"{last_layer(family, 'bias')[0]} missing"):
        load(folder)


def last_layer(family, name):
    return [f"classifier.out_proj.{name}" if family == "roberta" else f"classifier.{name}"]


def test_a_tensor_held_twice_is_named(bert_folder):
    edit_tensors(bert_folder, lambda t: t.update({"pooler.dense.bias": np.zeros(12, np.float32)}))
    with pytest.raises(UserError, match=r"hold bert\.pooler\.dense\.bias twice, once as "):
        load(bert_folder)


def test_a_head_with_other_labels_is_not_replaced_silently(family, folder):
    model = huggingface.sequence_classifier(str(folder), num_outputs=2)
    with pytest.raises(UserError, match=r"has 3 outputs \(classifier.*\), the model 2; new_head=True"):
        load(folder, model)
    params, report = load(folder, model, new_head=True)
    head = {
        "bert": ["head_output"],
        "roberta": ["head_dense", "head_output"],
        "distilbert": ["head_dense", "head_output"],
    }
    assert report.new == tuple(f"{name}/{part}" for name in head[family] for part in ("bias", "kernel"))
    assert set(last_layer(family, "weight")) < set(report.unused)
    assert isinstance(params["head_output"]["bias"], jax.ShapeDtypeStruct)


def test_a_head_for_another_task_is_not_taken_for_ours(bert_folder):
    edit_config(bert_folder, architectures=["BertForTokenClassification"])
    with pytest.raises(UserError, match=r"is that of BertForTokenClassification, not of BertForSequenceClassification"):
        load(bert_folder)
    assert "head_output/bias" in load(bert_folder, new_head=True)[1].new


def test_a_model_that_computes_something_else_is_named(bert_folder):
    for name, value in (("num_heads", 4), ("activation", "gelu"), ("layer_norm_epsilon", 1e-12)):
        other = MODELS["bert"].clone(encoder=MODELS["bert"].encoder.clone(**{name: value}))
        with pytest.raises(UserError, match=f"the model has {name}={value!r}, the weights in .* are for "):
            load(bert_folder, other)
    with pytest.raises(UserError, match="not a Dense"):
        huggingface.load_params(str(bert_folder), layers.Dense(3), {})


def test_missing_and_broken_files_are_named(bert_folder, tmp_path):
    (bert_folder / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load(bert_folder)
    (bert_folder / "model.safetensors").rename(bert_folder / "tf_model.h5")
    with pytest.raises(
        UserError, match=r"neither model\.safetensors nor pytorch_model\.bin.*config\.json, tf_model\.h5"
    ):
        load(bert_folder)
    (bert_folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load(bert_folder)
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path)


# config.json


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_what_we_do_not_implement_is_refused(bert_folder, key, value):
    edit_config(bert_folder, **{key: value})
    with pytest.raises(UserError, match=re.escape(f"config.json has {key}={value!r}, of which only ")):
        huggingface.sequence_classifier(str(bert_folder))


def test_wrong_values_are_named(bert_folder):
    for change, message in [
        ({"hidden_act": "gelu_nwe"}, "unknown activation 'gelu_nwe'; did you mean 'gelu_new'"),
        ({"num_attention_heads": 5}, "hidden_size 12 is not a multiple of num_heads 5"),
        ({"hidden_size": "12"}, "hidden_size='12' is of the wrong type"),
        ({"hidden_size": None}, "hidden_size=null"),
        ({"type_vocab_size": 0}, "type_vocab_size=0"),
        (
            {"model_type": "brt"},
            r"model_type 'brt'; did you mean 'bert'\? \(there are: bart, bert, .*distilbert, .*roberta.*\)$",
        ),
        ({"model_type": "huggingface"}, "model_type 'huggingface'; there are: .*bert, clip, deit, .*distilbert, "),
    ]:
        before = (bert_folder / "config.json").read_text()
        edit_config(bert_folder, **change)
        with pytest.raises(UserError, match=message):
            shapes(huggingface.sequence_classifier(str(bert_folder)))
        (bert_folder / "config.json").write_text(before)


def test_a_roberta_without_padding_id_is_refused(tmp_path):
    folder = huggingface.save(tmp_path / "model", MODELS["roberta"], random_params(MODELS["roberta"]))
    edit_config(folder, pad_token_id=None)
    with pytest.raises(UserError, match="pad_token_id=null"):
        huggingface.sequence_classifier(str(folder))


def test_overrides(family, folder):
    model = huggingface.sequence_classifier(
        str(folder), dropout=0, dtype="bfloat16", unroll=2, remat="full", head_dropout=0.5
    )
    assert model.encoder == MODELS[family].encoder.clone(dropout=0, dtype="bfloat16", unroll=2, remat="full")
    assert model.head_dropout == 0.5
    load(folder, model)
    for override, message in [
        ({"dropuot": 0.0}, "'dropuot' is not an option; did you mean 'dropout'"),
        ({"hidden_size": 8}, "'hidden_size' is fixed by the pretrained weights"),
        ({"remat": True}, "remat=True is of the wrong type"),
    ]:
        with pytest.raises(UserError, match=message):
            huggingface.sequence_classifier(str(folder), **override)
    with pytest.raises(UserError, match="has no 'masked_llm'"):
        huggingface.load_model(str(folder), "masked_llm")


def test_the_number_of_outputs_is_the_checkpoints_unless_given(bert_folder):
    def num_outputs(**options):
        return huggingface.sequence_classifier(str(bert_folder), **options).num_outputs

    assert num_outputs() == 3
    assert num_outputs(num_outputs=7) == 7
    edit_config(bert_folder, drop=["id2label", "label2id"])
    assert num_outputs() == 2
    edit_config(bert_folder, num_labels=4)
    assert num_outputs() == 4
    edit_config(bert_folder, drop=["num_labels"], architectures=["BertModel"])
    with pytest.raises(UserError, match="num_outputs must be given"):
        num_outputs()


def test_dropouts_fall_back_as_they_do_in_transformers(tmp_path):
    for name in ("bert", "roberta"):
        folder = huggingface.save(tmp_path / name, MODELS[name], random_params(MODELS[name]))
        edit_config(folder, hidden_dropout_prob=0.25, classifier_dropout=None)
        assert huggingface.sequence_classifier(str(folder)).head_dropout == 0.25
        edit_config(folder, classifier_dropout=0.0)
        model = huggingface.sequence_classifier(str(folder))
        assert (model.encoder.dropout, model.head_dropout, model.head_input_dropout) == (0.25, 0.0, 0.0)


def test_distilbert_understands_the_common_names_of_sizes(tmp_path):
    folder = huggingface.save(tmp_path / "model", MODELS["distilbert"], random_params(MODELS["distilbert"]))
    edit_config(folder, drop=["dim", "n_heads", "n_layers"], hidden_size=12, num_attention_heads=3, num_hidden_layers=2)
    assert huggingface.sequence_classifier(str(folder)) == MODELS["distilbert"]


# Saving


def test_config_json(tmp_path):
    model = MODELS["bert"]
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    folder = huggingface.save(
        tmp_path / "deep" / "model",
        model,
        random_params(model),
        labels=["bad", "so-so", "good"],
        problem_type="multi_label_classification",
        tokenizer_files=[tokenizer],
        config={"pad_token_id": 4},
    )
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "id2label": {"0": "bad", "1": "so-so", "2": "good"},
        "label2id": {"bad": 0, "so-so": 1, "good": 2},
        "problem_type": "multi_label_classification",
        "torch_dtype": "float32",
        "dtype": "float32",
        "pad_token_id": 4,
        "num_hidden_layers": 2,
        "layer_norm_eps": 1e-3,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.2,
        "classifier_dropout": 0.1,
    }
    assert config | expected == config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_wrong_labels_and_problems_are_named(tmp_path):
    model, params = MODELS["bert"], random_params(MODELS["bert"])
    for options, message in [
        ({"labels": ["a", "b"]}, "3 outputs, which 2 different labels cannot name"),
        ({"labels": ["a", "b", "b"]}, "3 outputs, which 2 different labels cannot name"),
        ({"problem_type": "regresion"}, "did you mean 'regression'"),
    ]:
        with pytest.raises(UserError, match=message):
            huggingface.save(tmp_path / "model", model, params, **options)
    single = model.clone(num_outputs=1)
    with pytest.raises(UserError, match="needs two outputs or more"):
        huggingface.save(tmp_path / "m", single, random_params(single), problem_type="single_label_classification")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        huggingface.save(tmp_path, MODELS["bert"], random_params(MODELS["bert"]))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        huggingface.save(
            tmp_path / "model", MODELS["bert"], random_params(MODELS["bert"]), tokenizer_files=[tmp_path / "absent"]
        )
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_family_has_is_named(tmp_path):
    model = MODELS["bert"].clone(head_activation="gelu")
    with pytest.raises(
        UserError, match=r"BertForSequenceClassification needs head_activation='tanh', the model has 'gelu'"
    ):
        huggingface.save(tmp_path / "model", model, random_params(model))
    with pytest.raises(UserError, match="none has a Dense"):
        huggingface.save(tmp_path / "model", layers.Dense(3), {})


def test_parameters_without_a_name_are_named(tmp_path, bert_folder):
    params = random_params(MODELS["bert"]) | {"adapter": {"kernel": np.zeros(3, np.float32)}}
    with pytest.raises(UserError, match="no name in a Hugging Face folder: adapter/kernel"):
        huggingface.save(tmp_path / "other", MODELS["bert"], params)
    with pytest.raises(UserError, match="no name in a Hugging Face folder: adapter/kernel"):
        huggingface.load_params(str(bert_folder), MODELS["bert"], params)


def test_training_options_never_stand_in_the_way_of_an_export(family, folder, tmp_path):
    model = huggingface.sequence_classifier(str(folder), dropout=0.0, head_dropout=0.4, dtype="bfloat16", unroll=2)
    again = huggingface.save(tmp_path / "again", model, load(folder)[0])
    assert huggingface.sequence_classifier(str(again)).head_dropout == 0.4


def test_every_field_of_the_models_is_accounted_for(family):
    kinds = importlib.import_module(f"research.pretrained.{family}").FAMILY.kinds
    models = {head: make(MODELS[family].encoder) for head, make in HEADS.items() if head in kinds}
    for name, model in (models | {"sequence_classifier": MODELS[family]}).items():
        untold = set(kinds[name].fields(model)) - set(kinds[name].keys) - set(kinds[name].constants)
        free = {"num_outputs"} if name.endswith("classifier") else set()
        free |= {"head_dropout"} if name == "question_answerer" and family != "distilbert" else set()
        assert untold - {"sinusoidal_start"} == {"dtype", "unroll", "remat", "attention"} | free
