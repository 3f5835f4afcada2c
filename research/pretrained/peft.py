"""Low-rank adapters in the format of the library PEFT: adapter_config.json and adapter_model.safetensors.

Modules have the names of the weights file. Transformers 5 calls those of ViT otherwise in memory, so that PEFT finds no
module for an adapter of ours there, and an adapter that it writes there is refused here.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import numpy as np
import safetensors.numpy

from research import assets
from research.errors import UserError
from research.pretrained import weight_files
from research.pretrained.families import family_of_model
from research.pretrained.families import model_type as model_type_of
from research.pretrained.family import TRANSPOSED, Tensor
from research.pretrained.huggingface import Report, expand
from research.pretrained.huggingface import load_params as load_base
from research.tasks.lora import DOWN, UP, LoRA

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Keys of adapter_config.json of which one value is implemented.
ONLY = {"peft_type": "LORA", "use_dora": False, "bias": "none", "alpha_pattern": {}, "lora_bias": False}


def save(folder: pathlib.Path, task: LoRA, params: Mapping[str, Any], base: str = "", model_type: str = "") -> None:
    """Write an adapter that PEFT loads onto the base model.

    Args:
      folder: the folder to write, which must not exist yet.
      task: what trained.
      params: its parameters.
      base: where the base model is, for base_model_name_or_path.
      model_type: the family that is preferred where several have the base.

    Raises:
      UserError: the folder is there, no family has the model, or the family keeps an adapted kernel inside of another.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder to write the adapter to")
    whole, matrices = _flat(params.get("whole", {})), _flat(params["lora"])
    arrays = _flat(params["base"]) | whole
    lines = {name: (line, index) for line, name, _, index in _lines(task.model, arrays, model_type)}
    adapted = {name: at for name, at in lines.items() if _place(at[0]) + DOWN in matrices}
    kept = sorted({name.rpartition(".")[0] for name, (line, _) in lines.items() if set(line.ours) & set(whole)})
    tensors: dict[str, np.ndarray] = {}
    for name, (line, index) in adapted.items():
        if len(line.ours) > 1:
            raise UserError(f"config.task.targets: {line.ours[0]} is a part of {name}, which PEFT adapts as one")
        for ours, theirs in ((DOWN, "lora_A"), (UP, "lora_B")):
            tensors[f"{PREFIX}{name.removesuffix('weight')}{theirs}.weight"] = matrices[_place(line) + ours][index].T
    for name, (line, index) in lines.items():
        if name.rpartition(".")[0] in kept:
            tensors[PREFIX + name] = line.layout.to_theirs(*(arrays[path][index] for path in line.ours))
    settings = {
        **ONLY,
        "base_model_name_or_path": base,
        "fan_in_fan_out": any(line.layout is not TRANSPOSED for line, _ in adapted.values()),
        "inference_mode": True,
        "lora_alpha": task.alpha,
        "lora_dropout": task.dropout,
        "modules_to_save": kept or None,
        "r": task.rank,
        "target_modules": sorted(name.removesuffix(".weight") for name in adapted),
        "task_type": None,
        "use_rslora": task.rslora,
    }
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets the owner alone read it


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
    tree, report = load_base(path, model, params_shape, new_head=new_head)
    folder = assets.resolve(adapter)
    config = weight_files.read_json(folder / CONFIG)
    for key, value in ONLY.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"{CONFIG} has {key}={config[key]!r}, of which only {value!r} is implemented")
    stored = {
        name.removeprefix(PREFIX): tensor.read() for name, tensor in weight_files.read_file(folder / WEIGHTS).items()
    }
    arrays, used = _flat(tree), set()
    brought: set[str] = set()
    for line, name, shapes, index in _lines(model, arrays, model_type_of(path)):
        module = name.removesuffix(".weight")
        if (down := f"{module}.lora_A.weight") in stored and name.endswith(".weight"):
            up = f"{module}.lora_B.weight"
            delta = _scale(config, stored[down].shape[0]) * (stored[up] @ stored[down])
            delta = delta.T if config.get("fan_in_fan_out") else delta
            for ours, array in zip(line.ours, line.layout.split(delta, shapes)):
                arrays[ours][index] += array
            used |= {down, up}
        elif name in stored:
            for ours, array in zip(line.ours, line.layout.split(stored[name], shapes)):
                if not isinstance(arrays[ours], np.ndarray):
                    arrays[ours] = np.empty(arrays[ours].shape, np.float32)
                arrays[ours][index] = array
            used.add(name)
            brought |= set(line.ours)
    if unknown := sorted(set(stored) - used):
        raise UserError(f"the adapter {adapter} holds {unknown[0]}, which the model has no place for")
    new = tuple(name for name in report.new if name not in brought)
    return flax.traverse_util.unflatten_dict(arrays, sep="/"), Report(new, report.unused)


def _scale(config: Mapping[str, Any], rank: int) -> float:
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lines(
    model: nn.Module, arrays: Mapping[str, Any], preferred: str = ""
) -> Iterator[tuple[Tensor, str, Sequence[tuple[int, ...]], Any]]:
    """Yield for each array of theirs its line in the family's table, its name, the shapes of ours, and their index."""
    _, family, kind = family_of_model(model, preferred)
    shapes = {path: tuple(array.shape) for path, array in arrays.items()}
    for line in family.table(kind, arrays):
        for name, ours, index in expand(line, shapes):
            yield line, name, ours, index


def _place(line: Tensor) -> str:
    """Return where the matrices beside a line's kernel stand."""
    return line.ours[0].removesuffix("kernel") if line.ours[0].endswith("kernel") else ""


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")
