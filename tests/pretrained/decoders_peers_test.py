"""Logits and exported folders of decoders against Transformers."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.pretrained import families, huggingface

pytestmark = pytest.mark.peers

TOLERANCE = 5e-5  # of the largest logit
VOCAB = 101
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 52,
    "max_position_embeddings": 47,
    "rms_norm_eps": 1e-3,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 47,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 900.0, "factor": 4.0, "original_max_position_embeddings": 12}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 3.1, 5.7],
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 13}
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied, narrow": ("GPT2", GPT2 | {"n_inner": 21, "tie_word_embeddings": False}),
    "gpt2 relu": ("GPT2", GPT2 | {"activation_function": "relu", "layer_norm_epsilon": 1e-6}),
    "llama": ("Llama", LLAMA | {"num_key_value_heads": 2}),
    "llama all heads, tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama one group, biases": (
        "Llama",
        LLAMA | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-6},
    ),
    "llama wide heads": ("Llama", LLAMA | {"num_key_value_heads": 3, "head_dim": 10, "rope_theta": 321.0}),
    "llama linear": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}},
    ),
    "llama llama3": ("Llama", LLAMA | {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", LLAMA | {"head_dim": 16, "rope_parameters": YARN}),
    "llama yarn with everything": (
        "Llama",
        LLAMA
        | {"head_dim": 32}
        | {"rope_parameters": YARN | {"beta_fast": 3.0, "beta_slow": 0.2, "mscale": 0.7, "mscale_all_dim": 1.4}},
    ),
    "llama yarn, its own attention factor, not truncated": (
        "Llama",
        LLAMA | {"head_dim": 24, "rope_parameters": YARN | {"attention_factor": 0.6, "truncate": False}},
    ),
    "llama dynamic": (
        "Llama",
        LLAMA
        | {"head_dim": 8, "max_position_embeddings": 11}
        | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "llama dynamic, within its length": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "mistral": ("Mistral", LLAMA | {"num_key_value_heads": 2, "sliding_window": 5}),
    "mistral full": ("Mistral", LLAMA | {"num_key_value_heads": 6, "sliding_window": None, "head_dim": 4}),
    "qwen2": ("Qwen2", LLAMA | {"num_key_value_heads": 2}),
    "qwen2 sliding, tied": (
        "Qwen2",
        LLAMA
        | {"num_key_value_heads": 6, "tie_word_embeddings": True}
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "qwen2 yarn, first layer full": (
        "Qwen2",
        LLAMA
        | {"num_key_value_heads": 2, "rope_parameters": YARN}
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3 second layer full": (
        "Qwen3",
        LLAMA
        | {"num_key_value_heads": 2, "head_dim": 10, "use_sliding_window": True, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3": ("Qwen3", LLAMA | {"num_key_value_heads": 2, "head_dim": 14}),
    "qwen3 biases, sliding": (
        "Qwen3",
        LLAMA
        | {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}
        | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "gemma": ("Gemma", LLAMA | {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma untied, biases": (
        "Gemma",
        LLAMA
        | {"num_key_value_heads": 6, "head_dim": 6, "attention_bias": True}
        | {"tie_word_embeddings": False, "hidden_act": "silu"},
    ),
    "gemma2": ("Gemma2", LLAMA | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4} | CAPS),
    "gemma2 without caps, biases, untied, one window": (
        "Gemma2",
        LLAMA
        | {"num_key_value_heads": 6, "head_dim": 6, "attention_bias": True, "tie_word_embeddings": False}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 5}
        | {"layer_types": ["sliding_attention"] * 3},
    ),
    "gemma3_text": (
        "Gemma3Text",
        LLAMA
        | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2}
        | {"query_pre_attn_scalar": 9},
    ),
    "gemma3_text with all": (
        "Gemma3Text",
        LLAMA
        | {
            "final_logit_softcapping": 3.0,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "sliding_window": 3,
            "num_hidden_layers": 7,
        }
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            }
        },
    ),
    "gemma3_text, windows only": (
        "Gemma3Text",
        LLAMA
        | {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 3}
        | {"layer_types": ["sliding_attention"] * 3},
    ),
    "olmo2": ("Olmo2", LLAMA | {"num_key_value_heads": 2}),
    "olmo2 all heads, tied, biases": (
        "Olmo2",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "rope_parameters": LLAMA3},
    ),
    "phi3": ("Phi3", LLAMA | {"num_key_value_heads": 2, "sliding_window": 5}),
    "phi3 longrope, beyond its length": (
        "Phi3",
        LLAMA | {"original_max_position_embeddings": 8, "rope_parameters": LONGROPE},
    ),
    "phi3 longrope, within its length": (
        "Phi3",
        LLAMA | {"original_max_position_embeddings": 24, "rope_parameters": LONGROPE, "num_key_value_heads": 3},
    ),
    "phi3 a part of each head": (
        "Phi3",
        LLAMA
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}},
    ),
}


def peer(name, noise=0.3):
    """Returns a Transformers model whose every parameter is far from its initial value."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    prefix, config = CASES[name]
    torch.manual_seed(0)
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{prefix}Config")(**config)
    model = getattr(transformers, prefix.removesuffix("Text") + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def batch(size=7, length=23):
    """Returns rows with padding at the end (even ones) or at the beginning (odd ones)."""
    rng = np.random.default_rng(0)
    counts = rng.integers(4, length, (size, 1))
    counts[0] = length
    mask = np.arange(length) < counts
    mask[1::2] = mask[1::2, ::-1]
    ids = np.where(mask, rng.integers(5, VOCAB, (size, length)), 0)
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}


def peer_logits(model, arrays):
    torch = pytest.importorskip("torch")
    positions = np.maximum(np.cumsum(arrays["attention_mask"], axis=1) - 1, 0)
    inputs = {name: torch.tensor(array).long() for name, array in (arrays | {"position_ids": positions}).items()}
    with torch.no_grad():
        return model(**inputs).logits.float().numpy()


def load(path):
    model = huggingface.load_model(str(path), "causal_lm")
    shapes = jax.eval_shape(lambda key: model.init(key, np.zeros((1, 4), np.int32))["params"], jax.random.key(0))
    return model, *huggingface.load_params(str(path), model, shapes)


def our_logits(model, params, arrays):
    call = jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, mask))
    return np.asarray(call(params, arrays["input_ids"], arrays["attention_mask"]))


def assert_close(ours, theirs, arrays, what):
    real = arrays["attention_mask"].astype(bool)
    error = np.abs(ours - theirs)[real].max() / np.abs(theirs[real]).max()
    print(f"PARITY {what}: {error:.2e} of the largest logit")
    assert error < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_both_ways(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = peer(name)
    reference.save_pretrained(tmp_path / "theirs")
    model, params, report = load(tmp_path / "theirs")
    assert report == huggingface.Report((), ())
    arrays = batch()
    ours = our_logits(model, params, arrays)
    assert_close(ours, peer_logits(reference, arrays), arrays, name)

    ids = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 0}
    family = families.model_type(str(tmp_path / "theirs"))
    huggingface.save(tmp_path / "ours", model, params, config=ids, max_shard_bytes=40_000, model_type=family)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.model_type == reference.config.model_type
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (3, 4, 0)
    assert_close(ours, peer_logits(loaded.eval(), arrays), arrays, f"{name}, exported")


@pytest.mark.parametrize("published", [True, False])
def test_the_text_part_of_a_model_of_text_and_images(published, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = CASES["gemma3_text with all"][1] | {"final_logit_softcapping": None}
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4, "vision_use_head": False}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {n.replace("model.language_model.", "language_model.model."): x for n, x in load_file(file).items()}
    tensors = {name.replace("model.vision_tower", "vision_tower"): x for name, x in tensors.items()}
    if not published:  # as modules are called in memory
        tensors = {n.replace("language_model.model.", "model.language_model."): x for n, x in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    model, params, report = load(tmp_path)
    assert report.new == ()
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in report.unused)
    arrays = batch()
    assert_close(our_logits(model, params, arrays), peer_logits(reference, arrays), arrays, "gemma3's text part")


@pytest.mark.parametrize("name", ["llama linear", "llama llama3", "llama yarn", "llama dynamic"])
def test_rotary_positions_as_transformers_4_wrote_them(name, tmp_path):
    reference = peer(name)
    reference.save_pretrained(tmp_path)
    want = load(tmp_path)[0]
    config = json.loads((tmp_path / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path)[0] == want


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_files_of_the_model_without_its_head(name, tmp_path):
    reference = peer(name)
    reference.base_model.save_pretrained(tmp_path)
    _, params, report = load(tmp_path)
    assert report.new == (() if name == "gpt2" else ("head/kernel",))
    loaded = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, np.ndarray)]
    assert sum(leaf.size for leaf in loaded) == sum(p.numel() for p in reference.base_model.parameters())


def test_the_tolerance_tells_an_epsilon_and_a_base_from_another(tmp_path):
    reference = peer("llama")
    reference.save_pretrained(tmp_path)
    arrays = batch()
    theirs = peer_logits(reference, arrays)
    text = (tmp_path / "config.json").read_text()
    for change in ({"rms_norm_eps": 1.1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10100.0}}):
        (tmp_path / "config.json").write_text(json.dumps(json.loads(text) | change))
        model, params, _ = load(tmp_path)
        error = np.abs(our_logits(model, params, arrays) - theirs)[arrays["attention_mask"] > 0].max()
        assert error > TOLERANCE * np.abs(theirs).max()
