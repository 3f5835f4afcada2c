"""Import from and export to Hugging Face folders: config.json, weights, tokenizer files.

Nothing here knows a family: `bert.py` and its like declare the names (see `family.py`). A GGUF or ONNX file is
read as the folder that it was made from.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from research import assets, storage
from research.errors import UserError, nearest
from research.pretrained import weight_files
from research.pretrained.families import family_of_config, family_of_model, name_of, read_config
from research.pretrained.family import SAME, TRANSPOSED, Family, Kind, Tensor, override
from research.pretrained.pending import Index, Pending, Piece
from research.pretrained.torch_zip import Stored

_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
_CLASSIFIERS = (
    *("ForSequenceClassification", "ForTokenClassification"),
    *("ForImageClassification", "ForImageClassificationWithTeacher", "ForObjectDetection"),
)
_FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Report:
    """What `load_params` did.

    Attributes:
      new: paths of parameters that the checkpoint does not hold: a head, to be initialised and announced.
      unused: names of tensors that were left unread.
    """

    new: tuple[str, ...]
    unused: tuple[str, ...]


def sequence_classifier(path: str, num_outputs: int | None = None, **overrides: Any) -> nn.Module:
    """Return the sequence classifier that a folder's config.json describes; its weights are not read.

    Args:
      path: a Hugging Face folder, in any form that `assets.resolve` takes.
      num_outputs: outputs of the head; as many as config.json has labels where it is None.
      **overrides: fields of the model that the weights do not fix, such as dropout, dtype, unroll and remat.

    Raises:
      UserError: the family or one of its options is not implemented, or an override is misspelt or fixed.
    """
    return _classifier(path, "sequence_classifier", num_outputs, overrides)


def token_classifier(path: str, num_outputs: int | None = None, **overrides: Any) -> nn.Module:
    """Return the token classifier that a folder's config.json describes; see `sequence_classifier`."""
    return _classifier(path, "token_classifier", num_outputs, overrides)


def detector(path: str, num_outputs: int | None = None, **overrides: Any) -> nn.Module:
    """Return the detector that a folder's config.json describes; see `sequence_classifier`."""
    return _classifier(path, "detector", num_outputs, overrides)


def image_classifier(path: str, num_outputs: int | None = None, **overrides: Any) -> nn.Module:
    """Return the image classifier that a folder or an ONNX file describes; see `sequence_classifier`."""
    return _classifier(path, "image_classifier", num_outputs, overrides)


def distilled_image_classifier(path: str, num_outputs: int | None = None, **overrides: Any) -> nn.Module:
    """Return the image classifier with a distillation token that a folder's config.json describes."""
    return _classifier(path, "distilled_image_classifier", num_outputs, overrides)


def load_model(path: str, kind: str, **fields: Any) -> nn.Module:
    """Return the model of that kind that a folder's config.json, or a file, describes, with `fields` replaced."""
    config = read_config(assets.resolve(path))
    family = family_of_config(config)
    family.check(config)
    if kind not in family.kinds:
        raise UserError(f"{name_of(config)} has no '{kind}'{nearest(kind, family.kinds)}")
    chosen = family.kinds[kind]
    return chosen.build(override(chosen, chosen.read(config), fields))


def _classifier(path: str, kind: str, num_outputs: int | None, overrides: Mapping[str, Any]) -> nn.Module:
    if num_outputs is None:
        num_outputs = _num_labels(read_config(assets.resolve(path)))
        if num_outputs is None:
            raise UserError(f"{path} has no labels, so num_outputs must be given")
    return load_model(path, kind, num_outputs=num_outputs, **overrides)


def load_params(path: str, model: nn.Module, params_shape: Any, *, new_head: bool = False) -> tuple[Any, Report]:
    """Return what `open_params` does, all of it read, as float32 numpy arrays."""
    tree, report = open_params(path, model, params_shape, new_head=new_head)
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, Pending) else x, tree), report


def open_params(path: str, model: nn.Module, params_shape: Any, *, new_head: bool = False) -> tuple[Any, Report]:
    """Find a folder's weights in the layout of `model.init`, to be read as far as each process needs them.

    Args:
      path: a Hugging Face folder, a GGUF file or an ONNX file, in any form that `assets.resolve` takes.
      model: the model that the weights are for.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.
      new_head: leave the checkpoint's task head unread and begin a new one.

    Returns:
      The tree with `pending.Pending` as leaves. What the checkpoint does not hold, which can only be a head, stays
      a ShapeDtypeStruct and is listed in the report: the caller initialises and announces it.

    Raises:
      UserError: the model is not the checkpoint's, or tensors are missing, unknown or of the wrong shape.
    """
    folder = assets.resolve(path)
    config = read_config(folder)
    family = family_of_config(config)
    family.check(config)
    kind = family.kind_of(model)
    if kind is None:
        raise UserError(f"{path} holds a model of the {name_of(config)} family, not a {type(model).__name__}")
    _check_same_model(path, kind, config, model)
    shapes = {name: tuple(leaf.shape) for name, leaf in _flatten(params_shape).items()}
    stored = _canonical(weight_files.read(folder), family)
    tensors = family.table(kind, shapes)
    stored = {t.theirs: stored[t.instead] for t in tensors if t.instead in stored} | stored
    if new_head:
        heads = _names(tensors, shapes, parts=("head",))
        dropped, stored = [n for n in stored if n in heads], {n: t for n, t in stored.items() if n not in heads}
    else:
        dropped = []
        _check_head(path, config, kind, tensors, shapes, stored)
    arrays, new, unused = _assign(path, tensors, family.leftovers(), shapes, stored)
    _check_copies(path, family, stored, unused)
    tree = _unflatten(_flatten(params_shape) | arrays)
    return tree, Report(tuple(new), tuple(sorted([*dropped, *unused])))


def save(
    folder: str | pathlib.Path,
    model: nn.Module,
    params: Any,
    *,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
    tokenizer_files: Iterable[str | pathlib.Path] = (),
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    model_type: str = "",
) -> pathlib.Path:
    """Write a folder that from_pretrained loads: that of `transformers`, or of `diffusers` for a family of its own.

    Args:
      folder: the folder to write, which must not exist yet or be empty. It appears whole or not at all.
      model: a model that some family has.
      params: its parameters.
      labels: names of the outputs; Transformers' LABEL_0, LABEL_1, ... where None.
      problem_type: single_label_classification, multi_label_classification or regression.
      tokenizer_files: files to copy beside the weights.
      config: more keys for config.json, such as pad_token_id; those that say what the model is stay as they are.
      max_shard_bytes: the largest weights file.
      model_type: the family that is preferred where several have this model.

    Returns:
      The folder.

    Raises:
      UserError: no family has this model, the labels do not fit it, or the folder is taken.
    """
    folder = storage.path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name another folder to write the model to")
    model_type, family, kind = family_of_model(model, model_type)
    keys = {**kind.defaults, **(config or {}), **kind.write(kind.fields(model))} | _identity(model_type, family, kind)
    if "num_outputs" in kind.overridable():
        keys |= _label_keys(kind.fields(model)["num_outputs"], labels, problem_type)
    elif labels is not None or problem_type is not None:
        raise UserError(f"{kind.architecture} has neither labels nor a problem_type")
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in _flatten(params).items()}
    tensors = _to_theirs(family.table(kind, arrays), arrays)

    with storage.writing(folder, last="config.json") as local:
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".{local.name}.{uuid.uuid4().hex}")
        partial.mkdir()
        try:
            text = json.dumps(keys, indent=2, sort_keys=True)
            (partial / "config.json").write_text(text + "\n", encoding="utf-8")
            for file in tokenizer_files:
                shutil.copyfile(file, partial / pathlib.Path(file).name)
            weight_files.write(partial, tensors, max_shard_bytes, weight_files.STEMS[bool(family.diffusers)])
            partial.rename(local)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def _identity(model_type: str, family: Family, kind: Kind) -> dict[str, Any]:
    """Return the keys of config.json that say what a folder is."""
    if family.diffusers:
        return {"_class_name": kind.architecture}
    return {
        "architectures": [kind.architecture],
        "model_type": model_type,
        "torch_dtype": "float32",  # read by Transformers 4
        "dtype": "float32",  # read by Transformers 5
    }


def _num_labels(config: Mapping[str, Any]) -> int | None:
    """Return the number of a checkpoint's labels; Transformers leaves out that of a classifier of two."""
    if config.get("id2label"):
        return len(config["id2label"])
    classifier = any(name.endswith(_CLASSIFIERS) for name in config.get("architectures") or ())
    return config.get("num_labels") or (2 if classifier else None)


def _label_keys(num_outputs: int, labels: Sequence[str] | None, problem_type: str | None) -> dict[str, Any]:
    labels = [f"LABEL_{i}" for i in range(num_outputs)] if labels is None else [str(label) for label in labels]
    if len(labels) != num_outputs or len(set(labels)) != num_outputs:
        raise UserError(f"the model has {num_outputs} outputs, which {len(set(labels))} different labels cannot name")
    if problem_type not in (*_PROBLEMS, None):
        raise UserError(f"unknown problem_type '{problem_type}'{nearest(str(problem_type), _PROBLEMS)}")
    if problem_type == "single_label_classification" and num_outputs == 1:
        raise UserError("single_label_classification needs two outputs or more; one is multi_label_classification")
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": problem_type,
    }


def _check_same_model(path: str, kind: Kind, config: Mapping[str, Any], model: nn.Module) -> None:
    fields = kind.fields(model)
    for field, value in kind.read(config).items():
        if fields[field] != value and field not in kind.overridable():
            raise UserError(f"the model has {field}={fields[field]!r}, the weights in {path} are for {value!r}")


def _check_head(
    path: str,
    config: Mapping[str, Any],
    kind: Kind,
    tensors: Sequence[Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
) -> None:
    """Raise UserError if the checkpoint's head is another task's, or has another number of outputs."""
    wanted = {name: shape for name, shape in _names(tensors, shapes, parts=("head",)).items() if name in stored}
    architecture = next(iter(config.get("architectures") or ()), kind.architecture)
    drop = "new_head=True begins a new one"
    if wanted and architecture not in (kind.architecture, *kind.same_head):
        raise UserError(f"the head in {path} is that of {architecture}, not of {kind.architecture}; {drop}")
    for name, shape in wanted.items():
        if stored[name].shape[:1] != shape[:1]:
            there, here = stored[name].shape[:1], shape[:1]
            raise UserError(f"the head in {path} has {there[0]} outputs ({name}), the model {here[0]}; {drop}")


def _canonical(stored: Mapping[str, Stored], family: Family) -> dict[str, Stored]:
    """Rename tensors to what the family's table calls them: with the prefix, and weight and bias in norms."""
    known = re.compile("|".join(family.names()))
    result: dict[str, Stored] = {}
    for stored_name, tensor in stored.items():
        name = family.rename(stored_name)
        modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        candidates = (name, family.prefix + name, modern, family.prefix + modern)
        canonical = next((candidate for candidate in candidates if known.fullmatch(candidate)), name)
        if canonical in result:
            raise UserError(f"the weights hold {canonical} twice, once as {name}")
        result[canonical] = tensor
    return result


def expand(tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, list[tuple[int, ...]], Any]]:
    """Yield for each array of theirs in a line of the table: its name, the shapes of ours in it, and their index."""
    ours = [shapes[path] for path in tensor.ours]
    if "{}" not in tensor.theirs:
        yield tensor.theirs, ours, ...
    elif tensor.shared:
        for layer in range(shapes[tensor.shared][0]):
            yield tensor.theirs.replace("{}", str(layer)), ours, ...
    else:
        for layer in range(ours[0][0]):
            number = tensor.numbers[layer] if tensor.numbers else str(layer)
            yield tensor.theirs.replace("{}", number), [shape[1:] for shape in ours], layer


def _names(
    tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]], parts: Sequence[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of theirs that parameters of these shapes stand in."""
    result = {}
    for tensor in tensors:
        if parts is None or tensor.part in parts:
            for name, ours, _ in expand(tensor, shapes):
                # Broadcast zeros have a shape and no memory.
                empty = [np.broadcast_to(np.float32(0), shape) for shape in ours]
                result[name] = tensor.layout.to_theirs(*empty).shape
    return result


def _assign(
    path: str,
    tensors: Sequence[Tensor],
    leftovers: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
) -> tuple[dict[str, Pending], list[str], list[str]]:
    """Return our arrays by path, the paths that stay new, and the names that stay unread."""
    _check_named(shapes, tensors)
    expected = _names(tensors, shapes)
    absent = {
        part
        for part in {tensor.part for tensor in tensors} - {""}
        if not any(name in stored for name in _names(tensors, shapes, parts=(part,)))
    }
    present = [tensor for tensor in tensors if tensor.part not in absent]
    new = {path for tensor in tensors if tensor.part in absent for path in tensor.ours}
    needed = _names(present, shapes)
    unused = [name for name in stored if name not in expected and any(re.fullmatch(r, name) for r in leftovers)]
    _check_complete(path, needed, stored, unused)
    for tensor in present:
        if tensor.shared:
            _check_shared(path, [name for name, _, _ in expand(tensor, shapes)], stored)

    pieces: dict[str, list[Piece]] = {}
    for tensor in present:
        for name, split, index in expand(tensor, shapes):
            if not tensor.ours:  # what no parameter stands for is there to be checked
                tensor.layout.split(stored[name].read(), split)
            for place, ours in enumerate(tensor.ours):
                read = functools.partial(_parts, tensor, stored[name], split, place)
                pieces.setdefault(ours, []).append(Piece(index, read))
    return {ours: Pending(shapes[ours], found) for ours, found in pieces.items()}, sorted(new), unused


def _parts(
    tensor: Tensor, stored: Stored, shapes: Sequence[tuple[int, ...]], place: int, indices: Sequence[Index]
) -> list[np.ndarray]:
    """Return parts of one of our arrays that a tensor of theirs holds, of which no more is read than must be."""
    if tensor.layout in (SAME, TRANSPOSED) and stored.read_part is not None:
        if tensor.layout is SAME:
            return [stored.read_part(index) for index in indices]
        return [stored.read_part(index[::-1]).T for index in indices]
    array = tensor.layout.split(stored.read(), shapes)[place]
    return [array[index] for index in indices]


def _check_complete(
    path: str, needed: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], unused: Sequence[str]
) -> None:
    """Raise UserError naming the tensors that are missing, unknown, of the wrong shape or not floating."""
    both = [name for name in needed if name in stored]
    problems = {
        "missing": [name for name in needed if name not in stored],
        "unknown": [name for name in stored if name not in needed and name not in unused],
        "of the wrong shape": [
            f"{name} {stored[name].shape} instead of {needed[name]}"
            for name in both
            if stored[name].shape != needed[name]
        ],
        "not floating": [f"{name} ({stored[name].dtype})" for name in both if str(stored[name].dtype) not in _FLOATS],
    }
    found = [f"{_some(names)} {problem}" for problem, names in problems.items() if names]
    if found:
        raise UserError(f"the weights in {path} do not fit the model: {'; '.join(found)}")


def _check_copies(path: str, family: Family, stored: Mapping[str, Stored], unused: Sequence[str]) -> None:
    """Raise UserError if a tensor is left unread that is no copy of the one that stands in for it."""
    for name in set(unused) & set(family.copies):
        other = family.copies[name]
        if not np.array_equal(stored[name].read(), stored[other].read()):
            raise UserError(f"{path} holds a {name} other than {other}, though its config.json says that they are tied")


def _check_shared(path: str, names: Sequence[str], stored: Mapping[str, Stored]) -> None:
    """Raise UserError if the layers do not hold the same array."""
    first = stored[names[0]].read()
    for name in names[1:]:
        if not np.array_equal(stored[name].read(), first):
            raise UserError(f"{path} holds a {name} other than {names[0]}; ours is shared by the layers")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _to_theirs(tensors: Sequence[Tensor], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    shapes = {path: array.shape for path, array in arrays.items()}
    _check_named(shapes, tensors)
    return {
        name: tensor.layout.to_theirs(*(arrays[path][index] for path in tensor.ours))
        for tensor in tensors
        for name, _, index in expand(tensor, shapes)
    }


def _check_named(paths: Iterable[str], tensors: Sequence[Tensor]) -> None:
    unnamed = sorted(set(paths) - {path for tensor in tensors for path in tensor.ours})
    if unnamed:
        raise UserError(f"these parameters have no name in a Hugging Face folder: {_some(unnamed)}")


def _flatten(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _unflatten(flat: Mapping[str, Any]) -> Any:
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")
