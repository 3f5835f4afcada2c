"""Weights of a Hugging Face folder, safetensors or `pytorch_model.bin`, single or sharded; GGUF and ONNX files."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import safetensors.numpy

from research.data import gguf as gguf_file
from research.errors import UserError
from research.pretrained import gguf, onnx, torch_zip
from research.pretrained.torch_zip import Stored

_SAFE, _TORCH = "model.safetensors", "pytorch_model.bin"
STEMS = ("model", "diffusion_pytorch_model")  # of Transformers' files and of Diffusers'


def read(folder: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors in a folder by name, unread: the first of safetensors, pytorch_model.bin that is there.

    Raises:
      UserError: there is neither, or a shard that the index names is missing, or a file is damaged.
    """
    if gguf_file.is_file(folder):
        return gguf.tensors(folder)
    if onnx.is_file(folder):
        return onnx.tensors(folder)
    files = {f"{stem}.safetensors": _read_safetensors for stem in STEMS}
    files |= {_TORCH: torch_zip.read, f"{STEMS[1]}.bin": torch_zip.read}
    for name, read_file in files.items():
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, read_file)
    held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"{folder} has neither {_SAFE} nor {_TORCH}, whole or sharded; it holds: {held}")


def read_file(path: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors in one file by name, unread; raise UserError where it is damaged or of another format."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else torch_zip.read(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _read_shards(index: pathlib.Path, read_file: Any) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map", {})
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise UserError(f"{index} names the shard {shard}, which is missing")
        tensors |= read_file(index.parent / shard)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise UserError(f"{index} places {lost[0]} in {weight_map[lost[0]]}, which does not hold it")
    return tensors


def _read_safetensors(path: pathlib.Path) -> dict[str, Stored]:
    # Reading maps the file into memory, and closing it lets go of what was read.
    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    def read_part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_slice(name)[index]

    def stored(name: str, part: Any) -> Stored:
        ways = (functools.partial(way, name) for way in (read, read_part))
        return Stored(tuple(part.get_shape()), part.get_dtype(), *ways)

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: stored(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 (no dict)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int, stem: str = STEMS[0]) -> None:
    """Write tensors as safetensors: one file, or shards of at most `max_shard_bytes` and their index."""
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda array: array.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        # safetensors writes the buffer as it lies in memory, so that a transposed view must be copied first.
        shard = {name: np.asarray(tensors[name], order="C") for name in names}
        safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors lets the owner alone read it
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
