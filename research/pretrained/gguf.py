"""Llama-like models in GGUF, llama.cpp's format: one file with the configuration, quantised weights and a tokenizer.

The rest of `pretrained` sees such a file as a Hugging Face folder: `config` is its config.json, `tensors` its weights.
"""

import pathlib
import re
from typing import Any

import gguf
import numpy as np
from gguf import quants

from research.data.gguf import read
from research.errors import UserError
from research.pretrained.torch_zip import Stored

ARCHITECTURE = "llama"
# What stands in a metadata key, by our name; those that hold nothing that Transformers' config.json has are "".
_KEYS = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.value_length": "",
    "rope.dimension_count": "",
    "rope.scaling.type": "",
    "rope.scaling.factor": "",
}
_NEEDED = (
    *("embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def config(path: pathlib.Path) -> dict[str, Any]:
    """Return what a Llama's config.json would say of the model in a file.

    Raises:
      UserError: the file is damaged, of another architecture, or asks for what is not implemented.
    """
    reader = read(path)
    held = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if held.get("general.architecture") != ARCHITECTURE:
        raise UserError(
            f"{path} holds a model of the architecture '{held.get('general.architecture')}', of which only "
            f"'{ARCHITECTURE}' is read from GGUF"
        )
    names = {tensor.name for tensor in reader.tensors}
    options = {name.removeprefix("llama."): value for name, value in held.items() if name.startswith("llama.")}
    _check(path, options, names)
    # Floats are stored in 32 bits, and read as the shortest decimal that they can stand for.
    values = {
        key: float(str(np.float32(options[name]))) if isinstance(options[name], float) else options[name]
        for name, key in _KEYS.items()
        if key and name in options
    }
    factor = options.get("rope.scaling.factor") if options.get("rope.scaling.type") != "none" else None
    vocab_size = next(tensor.shape[1] for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return (
        {"vocab_size": int(vocab_size), "max_position_embeddings": 2048}
        | values
        | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "rope_scaling": {"rope_type": "linear", "factor": factor} if factor else None,
            "tie_word_embeddings": "output.weight" not in names,
            "attention_bias": "blk.0.attn_q.bias" in names,
            "mlp_bias": "blk.0.ffn_up.bias" in names,
        }
    )


def tensors(path: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors in a file by the names that a Llama's have in a Hugging Face folder, unread.

    Read, they are float32. Queries and keys are put in the order of Hugging Face's rotary positions, which turn a
    dimension of a head's first half with its fellow of the second; llama.cpp keeps the two side by side.
    """
    heads = config(path)
    counts = {
        "attn_q": heads["num_attention_heads"],
        "attn_k": heads.get("num_key_value_heads", heads["num_attention_heads"]),
    }

    def stored(tensor: gguf.ReaderTensor, part: str) -> Stored:
        def read() -> np.ndarray:
            array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            return _halves(array, counts[part]) if part in counts else array

        return Stored(tuple(int(size) for size in reversed(tensor.shape)), np.dtype(np.float32), read)

    result = {}
    for tensor in read(path).tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        layer, part, kind = match.groups() if match else (None, "", "")
        name = f"{_TENSORS[part]}.{kind}" if part in _TENSORS else tensor.name
        result[name if layer is None else f"model.layers.{layer}.{name}"] = stored(tensor, part)
    return result


def _check(path: pathlib.Path, options: dict[str, Any], names: set[str]) -> None:
    """Raise UserError if a file lacks an option, or has one that is not implemented."""
    lost = [name for name in _NEEDED if name not in options]
    if lost:
        raise UserError(f"{path} does not say llama.{lost[0]}")
    unknown = sorted(set(options) - set(_KEYS))
    width = options.get("attention.key_length", options["embedding_length"] // options["attention.head_count"])
    wrong = [name for name in ("rope.dimension_count", "attention.value_length") if options.get(name, width) != width]
    if options.get("rope.scaling.type", "none") not in ("none", "linear"):
        wrong.append("rope.scaling.type")
    for name in unknown + wrong:
        raise UserError(f"{path} has llama.{name}={options[name]!r}, which is not implemented")
    if "rope_freqs.weight" in names:
        raise UserError(f"{path} holds rope_freqs.weight, stretched rotary wavelengths, which is not implemented")
    if "token_embd.weight" not in names:
        raise UserError(f"{path} has no token_embd.weight")


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Put the even rows of every head first and its odd rows second."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
