"""Adapters in the format of the library PEFT: adapter_config.json and adapter_model.safetensors.

Modules have the names that Transformers 5 has for them in memory, as PEFT's own files have. These are the names of the
weights file, but for ViT and its kin and for DETR (`family.Family.modules`); both are read.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
import safetensors.numpy

from research import assets
from research.errors import UserError, nearest
from research.pretrained import weight_files
from research.pretrained.families import family_of_model
from research.pretrained.families import model_type as model_type_of
from research.pretrained.family import TRANSPOSED, Tensor
from research.pretrained.huggingface import Report, expand
from research.pretrained.huggingface import load_params as load_base
from research.tasks.adapters import Adapter, flat, tree
from research.tasks.ia3 import IA3, INPUTS, OUTPUTS
from research.tasks.lora import DOWN, MAGNITUDE, UP, LoRA

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Keys of adapter_config.json of which one value is implemented, by the kind of adapter.
ONLY: dict[str, dict[str, Any]] = {"LORA": {"bias": "none", "alpha_pattern": {}, "lora_bias": False}, "IA3": {}}
# What ours is called there, and how it is turned.
TENSORS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    DOWN: ("lora_A.weight", np.transpose),
    UP: ("lora_B.weight", np.transpose),
    MAGNITUDE: ("lora_magnitude_vector", np.asarray),
    OUTPUTS: ("ia3_l", lambda vector: vector[:, None]),
    INPUTS: ("ia3_l", lambda vector: vector[None]),
}


def save(folder: pathlib.Path, task: Adapter, params: Mapping[str, Any], base: str = "", model_type: str = "") -> None:
    """Write an adapter that PEFT loads onto the base model.

    Args:
      folder: the folder to write, which must not exist yet.
      task: what trained, a `LoRA` or an `IA3`.
      params: its parameters.
      base: where the base model is, for base_model_name_or_path.
      model_type: the family that is preferred where several have the base.

    Raises:
      UserError: the folder is there, no family has the model, or the family keeps an adapted kernel inside of another.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder to write the adapter to")
    whole, own = flat(params.get("whole", {})), flat(params[task.part])
    arrays, places = flat(task.join(params)), {name.removesuffix(name.rpartition("/")[2]) for name in own}
    lines = {module: (line, index) for line, _, module, _, index in _lines(task.model, arrays, model_type)}
    adapted = {name: at for name, at in lines.items() if _place(at[0]) in places}
    kept = sorted({name.rpartition(".")[0] for name, (line, _) in lines.items() if set(line.ours) & set(whole)})
    tensors: dict[str, np.ndarray] = {}
    for name, (line, index) in adapted.items():
        if len(line.ours) > 1:
            raise UserError(f"config.task.targets: {line.ours[0]} is a part of {name}, which PEFT adapts as one")
        for ours, (theirs, turned) in TENSORS.items():
            if (path := _place(line) + ours) in own:
                tensors[f"{PREFIX}{name.removesuffix('weight')}{theirs}"] = turned(own[path][index])
    for name, (line, index) in lines.items():
        if name.rpartition(".")[0] in kept:
            tensors[PREFIX + name] = line.layout.to_theirs(*(arrays[path][index] for path in line.ours))
    inputs = [name for name, (line, _) in adapted.items() if _place(line) + INPUTS in own]
    settings = {
        **_settings(task, [name.removesuffix(".weight") for name in inputs]),
        "base_model_name_or_path": base,
        "fan_in_fan_out": any(line.layout is not TRANSPOSED for line, _ in adapted.values()),
        "inference_mode": True,
        "modules_to_save": kept or None,
        "target_modules": sorted(name.removesuffix(".weight") for name in adapted),
        "task_type": None,
    }
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets the owner alone read it


def _settings(task: Adapter, inputs: Sequence[str]) -> dict[str, Any]:
    """Return the keys of adapter_config.json that say of which kind an adapter is."""
    if isinstance(task, IA3):
        return {"peft_type": "IA3", "feedforward_modules": sorted(inputs)}
    if not isinstance(task, LoRA):
        raise UserError(f"config.task: PEFT's format is not written of a {type(task).__name__}")
    return {
        **ONLY["LORA"],
        "peft_type": "LORA",
        "lora_alpha": task.alpha,
        "lora_dropout": task.dropout,
        "r": task.rank,
        "use_dora": task.dora,
        "use_rslora": task.rslora,
    }


def load_params(
    path: str, model: nn.Module, params_shape: Any, *, adapter: str, new_head: bool = False
) -> tuple[Any, Report]:
    """Read a folder's weights with an adapter merged into them; to be named as `config.init.call`.

    Args:
      path: of the base, see `huggingface.load_params`, also for `model`, `params_shape`, `new_head` and the result.
      model: the model that the weights are for.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.
      adapter: a folder in PEFT's format, in any form that `assets.resolve` takes.
      new_head: leave the base's head unread; the adapter may bring one.

    Raises:
      UserError: as there, or the adapter is none for the model, or of a kind that is not implemented.
    """
    tree_, report = load_base(path, model, params_shape, new_head=new_head)
    folder = assets.resolve(adapter)
    config = _read_config(folder)
    stored = {
        name.removeprefix(PREFIX): tensor.read() for name, tensor in weight_files.read_file(folder / WEIGHTS).items()
    }
    arrays, used = flat(tree_), set()
    brought: set[str] = set()
    for line, file_name, name, shapes, index in _lines(model, arrays, model_type_of(path)):
        given = next((each for each in (name, file_name) if each in stored), None)
        if given is not None:
            theirs = stored[given]
            used.add(given)
            brought |= set(line.ours)
        else:
            module, _, kind = name.rpartition(".")
            if not any(key.startswith(f"{module}.") for key in stored):
                module = file_name.rpartition(".")[0]
            own = {key: stored[f"{module}.{key}"] for key, _ in TENSORS.values() if f"{module}.{key}" in stored}
            if not own or kind not in ("weight", "bias"):
                continue
            theirs = _merged(config, kind, line.layout.to_theirs(*(arrays[ours][index] for ours in line.ours)), own)
            used |= {f"{module}.{key}" for key in own}
        for ours, array in zip(line.ours, line.layout.split(theirs, shapes)):
            if not isinstance(arrays[ours], np.ndarray):
                arrays[ours] = np.empty(arrays[ours].shape, np.float32)
            arrays[ours][index] = array
    if unknown := sorted(set(stored) - used):
        raise UserError(f"the adapter {adapter} holds {unknown[0]}, which the model has no place for")
    new = tuple(name for name in report.new if name not in brought)
    return tree(arrays), Report(new, report.unused)


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Return adapter_config.json, or raise UserError where it says what is not implemented."""
    config = weight_files.read_json(folder / CONFIG)
    kind = str(config.get("peft_type"))
    if kind not in ONLY:
        raise UserError(f"{CONFIG} has peft_type='{kind}', of which {', '.join(ONLY)} are read{nearest(kind, ONLY)}")
    for key, value in ONLY[kind].items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"{CONFIG} has {key}={config[key]!r}, of which only {value!r} is implemented")
    return config


def _merged(config: Mapping[str, Any], kind: str, array: np.ndarray, own: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a module's "weight", [out, in], or [in, out] with fan_in_fan_out, or its "bias", with an adapter's own."""
    fan_in_first = bool(config.get("fan_in_fan_out"))
    if (vector := own.get("ia3_l")) is not None:
        if kind == "bias":  # multiplied where the outputs are, [out, 1], and not where the inputs are, [1, in]
            return array * vector[:, 0] if vector.shape[1] == 1 else array
        return array * (vector.T if fan_in_first else vector)
    if kind == "bias":
        return array
    down, up = own["lora_A.weight"], own["lora_B.weight"]
    delta = _scale(config, down.shape[0]) * (up @ down)
    array = array + (delta.T if fan_in_first else delta)
    if config.get("use_dora"):
        inputs = 0 if fan_in_first else 1
        norms = np.sqrt(np.square(array).sum(axis=inputs))
        factors = np.divide(own["lora_magnitude_vector"], norms, out=np.ones_like(norms), where=norms > 0)
        array = array * np.expand_dims(factors, inputs)
    return array


def _scale(config: Mapping[str, Any], rank: int) -> float:
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lines(
    model: nn.Module, arrays: Mapping[str, Any], preferred: str = ""
) -> Iterator[tuple[Tensor, str, str, Sequence[tuple[int, ...]], Any]]:
    """Yield for each array of theirs its line in the family's table, its names, the shapes of ours, and their index.

    The names are that of the file of weights, and that of Transformers' memory.
    """
    _, family, kind = family_of_model(model, preferred)
    shapes = {path: tuple(array.shape) for path, array in arrays.items()}
    for line in family.table(kind, arrays):
        for name, ours, index in expand(line, shapes):
            yield line, name, family.in_memory(name), ours, index


def _place(line: Tensor) -> str:
    """Return where an adapter's own parameters beside a line's kernel stand; "" where it is no kernel."""
    return line.ours[0].removesuffix("kernel") if line.ours[0].endswith("kernel") else ""
