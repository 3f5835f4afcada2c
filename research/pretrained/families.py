"""Which family a folder, or a model, is of."""

import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

import research.pretrained
from research import assets
from research.data import gguf as gguf_file
from research.errors import UserError, nearest
from research.pretrained import gguf, onnx, weight_files
from research.pretrained.family import Family, Kind


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Return config.json, or what says the same; of a model of text and images the part for text, if that is a family.

    Raises:
      UserError: there is none.
    """
    if gguf_file.is_file(folder):
        return gguf.config(folder)
    if onnx.is_file(folder):
        return onnx.config(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no Hugging Face model: it has no config.json")
    config = weight_files.read_json(folder / "config.json")
    part = config.get("text_config") or {}
    return part if part.get("model_type") in families() else config


@functools.cache
def families() -> dict[str, Family]:
    """Return all families by the names of their files."""
    names = [module.name for module in pkgutil.iter_modules(research.pretrained.__path__)]
    modules = {name: importlib.import_module(f"research.pretrained.{name}") for name in names}
    return {name: module.FAMILY for name, module in modules.items() if hasattr(module, "FAMILY")}


def name_of(config: Mapping[str, Any]) -> str:
    """Return what a folder is known by; those of Diffusers say the name of a class."""
    return str(config.get("model_type", config.get("_class_name")))


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Return the family that config.json names, or raise UserError."""
    model_type = name_of(config)
    classes = {name: family for family in families().values() for name in family.diffusers}
    known = {name: family for name, family in families().items() if not family.diffusers} | classes
    name = model_type.replace("-", "_")
    if name not in known:
        near = nearest(name, known)
        there = "" if "there are" in near else f" (there are: {', '.join(known)})"
        raise UserError(f"config.json has the unknown model_type '{model_type}'{near}{there}")
    return known[name]


def model_type(path: str) -> str:
    """Return what the family of a folder, or file, is called; see `load_model` for `path`."""
    return name_of(read_config(assets.resolve(path))).replace("-", "_")


def family_of_model(model: nn.Module, preferred: str = "") -> tuple[str, Family, Kind]:
    """Return the first family whose config.json can say all that matters of `model`, the `preferred` one if it can."""
    reasons = []
    for name, family in sorted(families().items(), key=lambda item: item[0] != preferred):
        kind = family.kind_of(model)
        if kind is None:
            continue
        try:
            kind.write(kind.fields(model))
            return name, family, kind
        except UserError as error:
            reasons.append(str(error))
    why = "; ".join(reasons) or f"none has a {type(model).__name__} of such parts"
    raise UserError(f"no Hugging Face family has this model: {why}")
