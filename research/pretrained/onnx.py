"""DINOv2 encoders in ONNX files, as PyTorch exports Transformers' model.

The rest of `pretrained` sees such a file as the Hugging Face folder of the encoder: `config` is its config.json,
`tensors` its weights. What else the file holds, such as a head, is left out.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from research.errors import UserError
from research.pretrained.torch_zip import Stored

_PATCHES = "embeddings.patch_embeddings.projection.weight"
_POSITIONS = "embeddings.position_embeddings"


def is_file(path: pathlib.Path) -> bool:
    """Say whether `path` is a file of this format, by its name."""
    return path.suffix == ".onnx" and path.is_file()


def config(path: pathlib.Path) -> dict[str, Any]:
    """Return what a DINOv2's config.json would say of the encoder in a file.

    Raises:
      UserError: the file is damaged, or holds something else.
    """
    graph = _read(path)
    prefix, held = _encoder(path, graph)
    shapes = {name: stored.shape for name, stored in held.items()}
    if lost := [name for name in (_POSITIONS, f"{_layer(0)}layer_scale1.lambda1") if name not in shapes]:
        raise UserError(f"{path} holds no DINOv2 of Transformers: it has no {prefix}{lost[0]}")
    if f"{_layer(0)}mlp.fc1.bias" not in shapes:
        raise UserError(f"{path} holds a DINOv2 with a gated MLP, which is not read from ONNX")
    hidden, channels, patch, _ = shapes[_PATCHES]
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": hidden,
        "num_hidden_layers": sum(name.endswith("layer_scale1.lambda1") for name in shapes),
        "num_attention_heads": hidden // _head_width(path, graph, f"{prefix}{_layer(0)}attention"),
        "mlp_ratio": shapes[f"{_layer(0)}mlp.fc1.bias"][0] / hidden,
        "hidden_act": _activation(path, graph, f"{prefix}{_layer(0)}mlp.activation"),
        "layer_norm_eps": _epsilon(path, graph, f"{prefix}{_layer(0)}norm1"),
        "image_size": patch * math.isqrt(shapes[_POSITIONS][1] - 1),
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": f"{_layer(0)}attention.attention.query.bias" in shapes,
    }


def tensors(path: pathlib.Path) -> dict[str, Stored]:
    """Return the encoder's tensors in a file by the names that they have in a Hugging Face folder, unread.

    The exporter keeps the names of parameters, but for those that it computes with beforehand: matrices, which it
    transposes, and the table of positions, which it cuts in two. These are known by the node that takes them.
    """
    return _encoder(path, _read(path))[1]


def _encoder(path: pathlib.Path, graph: onnx.GraphProto) -> tuple[str, dict[str, Stored]]:
    """Return what the names of the encoder's tensors begin with, and the tensors by the rest of their names."""
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:  # equal tensors are stored once
        if node.op_type == "Identity" and node.input[0] in held:
            held[node.output[0]] = held[node.input[0]]
    found = {name: _stored([tensor]) for name, tensor in held.items()}
    positions = {}
    for node in graph.node:
        module = _module(node)
        # A name of the exporter's own contains colons.
        made = [name for name in node.input if name in held and ":" in name]
        if made and node.op_type == "MatMul":
            found[f"{module}.weight"] = _stored([held[made[0]]], transpose=True)
        elif made and node.op_type in ("Concat", "Reshape") and module.endswith("embeddings"):
            positions[node.op_type] = (module, held[made[0]])
    if len(positions) == 2:
        parts = [positions[kind][1] for kind in ("Concat", "Reshape")]  # of the class token, of the patches
        found[f"{positions['Concat'][0]}.position_embeddings"] = _stored(parts)
    prefix = next((name.removesuffix(_PATCHES) for name in found if name.endswith(_PATCHES)), None)
    if prefix is None:
        raise UserError(f"{path} holds no DINOv2 of Transformers: it has no {_PATCHES}")
    return prefix, {name.removeprefix(prefix): stored for name, stored in found.items() if name.startswith(prefix)}


def _stored(parts: list[onnx.TensorProto], transpose: bool = False) -> Stored:
    """Return tensors that stand one after another on the second axis, or one."""
    shapes = [tuple(part.dims) for part in parts]
    shape = shapes[0] if len(parts) == 1 else (shapes[0][0], sum(shape[1] for shape in shapes), *shapes[0][2:])

    def read() -> np.ndarray:
        arrays = [numpy_helper.to_array(part) for part in parts]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
        return array.T if transpose else array

    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(parts[0].data_type))
    return Stored(shape[::-1] if transpose else shape, dtype, read)


def _head_width(path: pathlib.Path, graph: onnx.GraphProto, module: str) -> int:
    """Return the last number of the first shape that attention reshapes to: [..., heads, width]."""
    constants, makers = _constants(graph), {name: node for node in graph.node for name in node.output}
    node = next((n for n in graph.node if n.op_type == "Reshape" and _module(n).startswith(module)), None)
    name = node.input[1] if node else ""
    while name in makers and makers[name].op_type == "Concat":
        name = makers[name].input[-1]
    if name not in constants:
        raise UserError(f"{path} does not say how wide the heads are")
    return int(constants[name].reshape(-1)[-1])


def _epsilon(path: pathlib.Path, graph: onnx.GraphProto, module: str) -> float:
    """Return what a layer normalisation adds to the variance, be it one node or several."""
    constants = _constants(graph)
    for node in graph.node:
        if _module(node) != module:
            continue
        if node.op_type == "LayerNormalization":
            values = [attribute.f for attribute in node.attribute if attribute.name == "epsilon"]
            return _shortest(values[0] if values else 1e-5)  # the format's default
        added = [constants[name] for name in node.input if name in constants]
        if node.op_type == "Add" and added:
            return _shortest(float(added[0]))
    raise UserError(f"{path} has no layer normalisation {module}")


def _activation(path: pathlib.Path, graph: onnx.GraphProto, module: str) -> str:
    kinds = {node.op_type for node in graph.node if _module(node) == module}
    if "Erf" not in kinds:
        raise UserError(f"{path} has an activation of {', '.join(sorted(kinds))}; of ONNX only the exact GELU is read")
    return "gelu"


def _shortest(value: float) -> float:
    """Return the shortest decimal that a number of 32 bits can stand for."""
    return float(str(np.float32(value)))


def _constants(graph: onnx.GraphProto) -> Mapping[str, np.ndarray]:
    nodes = [node for node in graph.node if node.op_type == "Constant"]
    return {node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in nodes}


def _module(node: onnx.NodeProto) -> str:
    """Return the module that a node is of: "encoder.layer.0.mlp.fc1" of "/encoder/layer.0/mlp/fc1/MatMul"."""
    return ".".join(node.name.strip("/").split("/")[:-1])


def _layer(number: int) -> str:
    return f"encoder.layer.{number}."


def _read(path: pathlib.Path) -> onnx.GraphProto:
    try:
        return onnx.load(path).graph
    except (DecodeError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
