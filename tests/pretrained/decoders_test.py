"""Decoders in Hugging Face folders, written and read here; what is wrong in them is named."""

import importlib
import json
import re

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from research.errors import UserError
from research.models.gpt import Decoder
from research.pretrained import families, huggingface

SIZES = {"vocab_size": 31, "hidden_size": 12, "num_layers": 2, "num_heads": 2, "intermediate_size": 20}
LLAMA = SIZES | {
    "num_kv_heads": 1,
    "head_width": 4,
    "positions": "rotary",
    "norm": "rms",
    "norm_epsilon": 1e-3,
    "activation": "silu",
    "gated": True,
    "attention_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": (1.5,),
    "long_factor": (4.0,),
    "factor": 2.0,
    "original_max_position_embeddings": 512,
}
GEMMA = LLAMA | {
    "tie_embeddings": True,
    "activation": "gelu_pytorch_tanh",
    "embedding_scale": 12**0.5,
    "norms": "around",
    "sliding_window": 3,
    "logits_softcap": 30.0,
}
MODELS = {
    "gpt2": Decoder(**SIZES, num_kv_heads=2, head_width=6, max_positions=17, norm_epsilon=1e-3, dropout=0.2),
    "llama": Decoder(**LLAMA | {"mlp_bias": True}, rope_theta=500.0, rope_scaling=LLAMA3, max_positions=4096),
    "mistral": Decoder(**LLAMA, sliding_window=3),
    "qwen2": Decoder(**LLAMA | {"attention_bias": True}, sliding_window=3),
    "qwen3": Decoder(**LLAMA, query_key_norm=True, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "gemma2": Decoder(**GEMMA, local_layers=(True, False), attention_softcap=50.0, query_scale=9.0),
    "gemma3_text": Decoder(
        **GEMMA | {"query_key_norm": True, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        local_layers=(False, True),
        query_scale=256.0,
        rope_theta=1e6,
        rope_local_theta=1e4,
    ),
    "olmo2": Decoder(**LLAMA, norms="after", query_key_norm=True, query_key_norm_whole=True, rope_scaling=YARN),
    "phi3": Decoder(**LLAMA, rope_scaling=LONGROPE, rope_share=0.5, sliding_window=3, max_positions=1024),
    "gemma": Decoder(**LLAMA | {"tie_embeddings": True, "activation": "gelu_pytorch_tanh"}, embedding_scale=12**0.5),
}
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def shapes(model):
    return jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))


def random_params(model):
    # Multiples of 1/64 below 32: adding one to them, as Gemma's norms do, rounds nothing.
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.integers(-999, 999, leaf.shape).astype(np.float32) / 64, shapes(model))


def save(path, family, model=None, **options):
    model = model or MODELS[family]
    return huggingface.save(path / family, model, random_params(model), **options)


def load(path, **options):
    model = huggingface.load_model(str(path), "causal_lm")
    return model, *huggingface.load_params(str(path), model, shapes(model), **options)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, drop=(), **changes):
    config = config_of(folder) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def edit_tensors(folder, change):
    tensors = change(safetensors.numpy.load_file(folder / "model.safetensors"))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


# Round trips


def test_save_then_load_gives_the_same_model_and_bits(family, tmp_path):
    folder = save(tmp_path, family)
    assert config_of(folder)["architectures"] == [ARCHITECTURES[family]]
    assert config_of(folder)["model_type"] == family
    model, params, report = load(folder)
    assert model == MODELS[family]
    assert report == huggingface.Report((), ())
    jax.tree.map(np.testing.assert_array_equal, params, random_params(model))
    again = huggingface.save(tmp_path / "again", model, params)
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_heads_that_are_not_given_are_derived(tmp_path):
    for family, names in (("gpt2", ("num_kv_heads", "head_width")), ("llama", ("num_kv_heads", "head_width"))):
        model = MODELS[family].clone(**dict.fromkeys(names))
        loaded, _, _ = load(save(tmp_path, family, model))
        assert loaded == MODELS[family].clone(num_kv_heads=2, head_width=6)


NAMES = {
    "gpt2": """transformer.wte.weight transformer.wpe.weight transformer.h.0.ln_1. transformer.h.0.attn.c_attn.
        transformer.h.0.attn.c_proj. transformer.h.0.ln_2. transformer.h.0.mlp.c_fc. transformer.h.0.mlp.c_proj.
        transformer.ln_f.""",
    "llama": """model.embed_tokens.weight model.layers.0.input_layernorm.weight
        model.layers.0.self_attn.q_proj.weight model.layers.0.self_attn.k_proj.weight
        model.layers.0.self_attn.v_proj.weight model.layers.0.self_attn.o_proj.weight
        model.layers.0.post_attention_layernorm.weight model.layers.0.mlp.gate_proj. model.layers.0.mlp.up_proj.
        model.layers.0.mlp.down_proj. model.norm.weight lm_head.weight""",
}


@pytest.mark.parametrize("family", NAMES)
def test_names_and_shapes_are_those_of_the_published_checkpoints(family, tmp_path):
    # A name that ends with a dot stands for a weight and a bias.
    tensors = safetensors.numpy.load_file(save(tmp_path, family) / "model.safetensors")
    want = set()
    for name in NAMES[family].split():
        want |= {f"{name}weight", f"{name}bias"} if name.endswith(".") else {name}
    assert {name for name in tensors if ".1." not in name} == want
    params = random_params(MODELS[family])
    attention = params["layers"]["attention"]
    if family == "gpt2":
        fused = np.concatenate([attention[name]["kernel"][1] for name in ("query", "key", "value")], axis=1)
        np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_attn.weight"], fused)
        np.testing.assert_array_equal(
            tensors["transformer.h.1.mlp.c_fc.weight"], params["layers"]["mlp"]["up"]["kernel"][1]
        )
    else:
        assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (4, 12)
        np.testing.assert_array_equal(
            tensors["model.layers.1.self_attn.q_proj.weight"], attention["query"]["kernel"][1].T
        )


def test_phi3_stacks_its_layers(tmp_path):
    tensors = safetensors.numpy.load_file(save(tmp_path, "phi3") / "model.safetensors")
    layer = jax.tree.map(lambda leaf: leaf[1], random_params(MODELS["phi3"])["layers"])
    for name, parts in {
        "self_attn.qkv_proj": [layer["attention"][part]["kernel"] for part in ("query", "key", "value")],
        "mlp.gate_up_proj": [layer["mlp"][part]["kernel"] for part in ("gate", "up")],
    }.items():
        np.testing.assert_array_equal(tensors[f"model.layers.1.{name}.weight"], np.concatenate([x.T for x in parts]))
    assert not [
        name
        for name in tensors
        if re.search(r"[qkv]_proj|[ne]_proj", name.replace("qkv_proj", "")) and "down" not in name
    ]


def test_gemma_keeps_its_norms_above_one(tmp_path):
    tensors = safetensors.numpy.load_file(save(tmp_path, "gemma") / "model.safetensors")
    params = random_params(MODELS["gemma"])
    np.testing.assert_array_equal(tensors["model.norm.weight"] + 1, params["norm_out"]["scale"])


def test_gpt2_without_prefix_with_masks_and_a_copy_of_the_word_table(tmp_path):
    folder = save(tmp_path, "gpt2")
    want = load(folder)[1]

    def old(tensors):
        tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
        masks = {f"h.{i}.attn.bias": np.ones((1, 1, 17, 17), np.float32) for i in range(2)}
        masks |= {f"h.{i}.attn.masked_bias": np.float32([-1e4]) for i in range(2)}
        return tensors | masks | {"lm_head.weight": tensors["wte.weight"].copy()}

    edit_tensors(folder, old)
    _, params, report = load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    masks = [f"transformer.h.{i}.attn.{name}" for i in range(2) for name in ("bias", "masked_bias")]
    assert report == huggingface.Report((), ("lm_head.weight", *masks))


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_an_output_layer_that_is_no_copy_of_the_word_table_is_named(family, tmp_path):
    folder = save(tmp_path, family)
    words = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    edit_tensors(folder, lambda tensors: tensors | {"lm_head.weight": tensors[words].copy()})
    assert load(folder)[2].unused == ("lm_head.weight",)
    edit_tensors(folder, lambda tensors: tensors | {"lm_head.weight": tensors[words] + 1})
    with pytest.raises(UserError, match=f"holds a lm_head.weight other than {words}, though its config.json says that"):
        load(folder)


def test_an_output_layer_that_the_file_lacks_is_new(tmp_path):
    folder = save(tmp_path, "llama")
    edit_tensors(folder, lambda tensors: {n: a for n, a in tensors.items() if n != "lm_head.weight"})
    assert load(folder)[2].new == ("head/kernel",)


# config.json


def test_rotary_positions_in_every_form_that_transformers_wrote(tmp_path):
    folder = save(tmp_path, "llama")
    want = load(folder)[0]
    parameters = {"rope_theta": 500.0} | LLAMA3
    old = {name: value for name, value in LLAMA3.items() if name != "rope_type"} | {"type": "llama3"}
    apart = {name: value for name, value in old.items() if name != "original_max_position_embeddings"}
    for changes in (
        {"rope_parameters": parameters, "rope_scaling": None, "rope_theta": None},
        {"rope_parameters": None, "rope_scaling": old, "rope_theta": 500},
        {"rope_scaling": apart, "original_max_position_embeddings": 512},
    ):
        before = (folder / "config.json").read_text()
        edit_config(folder, **changes)
        assert load(folder)[0] == want, changes
        (folder / "config.json").write_text(before)
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_scaling=None)
    model = load(folder)[0]
    assert (model.rope_theta, model.rope_scaling) == (7.0, None)
    edit_config(folder, drop=["rope_parameters", "rope_scaling", "rope_theta"])
    assert load(folder)[0].rope_theta == 10000.0


# Of config.json as it was published with Transformers 4, what says what the model is; and its number of parameters.
PUBLISHED = {
    "Llama-3.2-1B": (
        {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}
        | {"max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True, "mlp_bias": False}
        | {"rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}, "rms_norm_eps": 1e-5},
        1_235_814_400,
        {"tie_embeddings": True, "rope_theta": 500000.0},
    ),
    "Qwen2.5-0.5B with YaRN": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
        | {"max_position_embeddings": 32768, "max_window_layers": 24, "sliding_window": 32768}
        | {"use_sliding_window": False, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        494_032_768,
        {"sliding_window": None, "rope_scaling": YARN | {"original_max_position_embeddings": 32768}},
    ),
    "Phi-3-mini-128k": (
        {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False}
        | {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144}
        | {"rope_scaling": {"type": "su", "short_factor": 48 * [1.05], "long_factor": 48 * [2.0]}},
        3_821_079_552,
        {
            "rope_scaling": LONGROPE
            | {"short_factor": 48 * (1.05,), "long_factor": 48 * (2.0,), "factor": 32.0}
            | {"original_max_position_embeddings": 4096}
        },
    ),
    "OLMo-2-1B": (
        {"model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100352, "rope_theta": 500000},
        1_484_916_736,
        {"norms": "after"},
    ),
    "Gemma-2-2B": (
        {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096},
        2_614_341_888,
        {"local_layers": 13 * (True, False), "attention_softcap": 50.0, "logits_softcap": 30.0},
    ),
    "Gemma-3-1B": (
        {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 256}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1000000, "rope_local_base_freq": 10000},
        999_885_952,
        {"local_layers": (4 * (5 * (True,) + (False,)) + (True, True)), "rope_theta": 1e6, "rope_local_theta": 1e4},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_of_transformers_4(name, tmp_path):
    config, count, fields = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = huggingface.load_model(str(tmp_path), "causal_lm")
    assert {field: getattr(model, field) for field in fields} == fields
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(model))) == count


def test_gemma3_as_transformers_5_writes_it(tmp_path):
    folder = save(tmp_path, "gemma3_text")
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    old = ["rope_scaling", "rope_theta", "rope_local_base_freq"]
    edit_config(folder, drop=old, rope_parameters=parameters)
    assert load(folder)[0] == MODELS["gemma3_text"]
    parameters["sliding_attention"]["rope_type"] = "linear"
    edit_config(folder, rope_parameters=parameters)
    with pytest.raises(UserError, match="stretches the rotary positions of sliding_attention, which is not impl"):
        load(folder)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "longrope"}, "unknown rope_type 'longrope'; there are: default, dynamic, linear, llama3, yarn"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 7}, "original length other than"),
        ({"rope_type": "yarn", "factor": 2.0, "low_factor": 1}, "rope_type 'yarn' with unknown low_factor"),
        ({"rope_type": "linear"}, "rope_type 'linear' with factor missing"),
        ({"rope_type": "default", "beta_fast": 2}, "rope_type 'default' with unknown beta_fast"),
        ({"full_attention": {"rope_type": "default"}}, "rope_type 'default' with unknown full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, of which only 1.0 is implemented"),
    ],
)
def test_rotary_positions_that_we_do_not_implement_are_refused(parameters, message, tmp_path):
    folder = save(tmp_path, "llama")
    edit_config(folder, rope_scaling=parameters)
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "reorder_and_upcast_attn", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "add_cross_attention", True),
        ("llama", "pretraining_tp", 2),
        ("llama", "quantization_config", {"bits": 4}),
        ("mistral", "layer_types", ["full_attention", "sliding_attention"]),
        ("gemma", "use_bidirectional_attention", True),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("phi3", "layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_what_we_do_not_implement_is_refused(family, key, value, tmp_path):
    folder = save(tmp_path, family)
    edit_config(folder, **{key: value})
    with pytest.raises(UserError, match=re.escape(f"config.json has {key}={value!r}, of which only ")):
        load(folder)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_scaling_by_the_published_length_survives_training_at_another(family, tmp_path):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}
    scaling, longest = (LONGROPE, 1024) if family == "phi3" else (dynamic, 512)
    folder = save(tmp_path, family, MODELS[family].clone(rope_scaling=scaling, max_positions=128))
    assert load(folder)[0] == MODELS[family].clone(rope_scaling=scaling, max_positions=longest)


def test_windows_of_qwen(tmp_path):
    folder = save(tmp_path, "qwen2")

    def window(**changes):
        before = (folder / "config.json").read_text()
        edit_config(folder, **changes)
        try:
            return load(folder)[0].sliding_window
        finally:
            (folder / "config.json").write_text(before)

    assert window() == 3
    assert window(use_sliding_window=False) is None
    assert window(max_window_layers=28) is None
    assert window(layer_types=["sliding_attention"] * 2) == 3
    assert window(layer_types=["full_attention"] * 2) is None
    for mixed in ({"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"]}):
        edit_config(folder, **mixed)
        assert load(folder)[0] == MODELS["qwen2"].clone(local_layers=(False, True))
    again = save(tmp_path / "again", "qwen2", load(folder)[0])
    assert config_of(again)["layer_types"] == ["full_attention", "sliding_attention"]
    assert config_of(again)["max_window_layers"] == 1
    with pytest.raises(UserError, match="unknown layer_type 'chunked_attention'"):
        window(layer_types=["full_attention", "chunked_attention"])


def test_gemmas_old_name_of_its_activation(tmp_path):
    folder = save(tmp_path, "gemma")
    edit_config(folder, hidden_act="gelu")
    assert load(folder)[0] == MODELS["gemma"]
    edit_config(folder, hidden_act="relu")
    with pytest.raises(UserError, match="hidden_act='relu' and hidden_activation='gelu_pytorch_tanh'"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"n_head": 5}, "n_embd=12, which is not a multiple of n_head=5"),
        ("gpt2", {"n_embd": "12"}, "n_embd='12', which is not a multiple of n_head=2"),
        ("llama", {"head_dim": None, "num_attention_heads": 5}, "hidden_size=12, which is not a multiple of num_att"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 2}, "num_heads 3 is not a multiple of num_kv_h"),
        ("gemma", {"hidden_act": "sliu", "hidden_activation": None}, "activation 'sliu'; did you mean 'silu'"),
        ("qwen3", {"head_dim": "4"}, "head_width='4' is of the wrong type"),
        ("mistral", {"sliding_window": "5"}, "sliding_window='5' is of the wrong type"),
    ],
)
def test_wrong_values_are_named(family, changes, message, tmp_path):
    folder = save(tmp_path, family)
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_overrides(family, tmp_path):
    folder = save(tmp_path, family)
    model = huggingface.load_model(str(folder), "causal_lm", dropout=0.3, dtype="bfloat16", remat="full", unroll=2)
    assert model == MODELS[family].clone(dropout=0.3, dtype="bfloat16", remat="full", unroll=2)
    huggingface.load_params(str(folder), model, shapes(model))
    with pytest.raises(UserError, match="'num_kv_heads' is fixed by the pretrained weights"):
        huggingface.load_model(str(folder), "causal_lm", num_kv_heads=2)
    with pytest.raises(UserError, match=f"{family} has no 'sequence_classifier'; there are: causal_lm"):
        huggingface.load_model(str(folder), "sequence_classifier", num_outputs=2)


def test_the_text_part_of_a_model_of_text_and_images(tmp_path):
    folder = save(tmp_path, "gemma3_text")
    want = load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config_of(folder)}))
    image = {"vision_tower.embeddings.weight": np.ones((2, 3), np.float32)}
    edit_tensors(folder, lambda tensors: {f"language_model.{name}": x for name, x in tensors.items()} | image)
    model, params, report = load(folder)
    assert model == want[0]
    jax.tree.map(np.testing.assert_array_equal, params, want[1])
    assert report == huggingface.Report((), ("vision_tower.embeddings.weight",))


# Saving


@pytest.mark.parametrize(("preferred", "family"), [("", "llama"), ("phi3", "phi3"), ("gemma", "llama")])
def test_of_several_families_that_have_a_model_the_preferred_one_is_written(preferred, family, tmp_path):
    model = MODELS["phi3"].clone(rope_scaling=None, rope_share=1.0, sliding_window=None)
    folder = huggingface.save(tmp_path / "model", model, random_params(model), model_type=preferred)
    assert config_of(folder)["model_type"] == family == families.model_type(str(folder))
    assert load(folder)[0] == model


def test_a_decoder_that_no_family_has_is_named(tmp_path):
    model = MODELS["llama"].clone(positions="learned")
    with pytest.raises(UserError, match="LlamaForCausalLM needs positions='rotary', the model has 'learned'"):
        save(tmp_path, "llama", model)


def test_ids_of_special_tokens_stand_in_config_json(tmp_path):
    folder = save(tmp_path, "llama", config={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    assert {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.items() <= config_of(folder).items()


def test_every_field_is_accounted_for(family):
    kind = importlib.import_module(f"research.pretrained.{family}").FAMILY.kinds["causal_lm"]
    untold = set(kind.fields(MODELS[family])) - set(kind.keys) - set(kind.constants)
    assert untold == {"dtype", "unroll", "remat", "attention"} | (set() if family == "gpt2" else {"dropout"})


def test_every_parameter_has_a_name(family):
    tensors = importlib.import_module(f"research.pretrained.{family}").FAMILY.tensors
    named = {path for tensor in tensors for path in tensor.ours}
    assert set(flax.traverse_util.flatten_dict(shapes(MODELS[family]), sep="/")) <= named
