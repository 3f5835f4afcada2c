"""What a file of this folder declares about one Hugging Face family; `huggingface.py` does the rest.

A family named `model_type` in config.json is the module of that name here (hyphens as underscores), and its `FAMILY`
says, for both directions at once, how fields of our models stand in config.json and how our parameters stand in the
weights file. Adding a family adds one file.
"""

import dataclasses
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
import typeguard

from research.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Key:
    """Where a field of our model stands in config.json.

    Attributes:
      name: the key.
      default: the value that Transformers assumes where the key is absent.
      fallback: the key that stands in where this one is absent or null.
      free: whether the field may differ from the checkpoint's, as it changes training and not the trained function.
    """

    name: str
    default: Any
    fallback: str | None = None
    free: bool = False

    def read(self, config: Mapping[str, Any]) -> Any:
        """Return the value that `config` gives the field, or raise UserError where it is null without a fallback."""
        if self.fallback and config.get(self.name) is None:
            value = config.get(self.fallback)
            return self.default if value is None else value
        value = config.get(self.name, self.default)
        if value is None:
            raise UserError(f"config.json has {self.name}=null, where the model needs a value such as {self.default!r}")
        return value

    def write(self, value: Any) -> dict[str, Any]:
        """Return what config.json holds for a field of this value."""
        return {self.name: value}


@dataclasses.dataclass(frozen=True)
class Computed:
    """A field of our model that does not stand in config.json under one key, as it is.

    Attributes:
      read: returns the value that config.json gives the field, or raises UserError.
      write: returns what config.json holds for a field of this value.
      free: see `Key`.
    """

    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]] = lambda value: {}
    free: bool = False


def head_width(config: Mapping[str, Any], hidden_size: Key, num_heads: Key) -> int:
    """Return the width of a head that is its share of the hidden states'; raise UserError where it is not whole."""
    hidden, heads = hidden_size.read(config), num_heads.read(config)
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0):
        raise UserError(
            f"config.json has {hidden_size.name}={hidden!r}, which is not a multiple of {num_heads.name}={heads!r}"
        )
    return hidden // heads


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of model that a family comes as, say a sequence classifier.

    Attributes:
      architecture: Transformers' name of the class.
      model: our class.
      parts: those of its fields that are modules, and their classes. No two classes may share a field name, unless
        the kind is `scoped`.
      keys: our fields that config.json holds.
      constants: our fields that the family fixes.
      complete: returns the fields of a model with those written out that its class derives where they are None.
      more: returns keys of config.json that several fields make together, or that Transformers needs besides.
      defaults: keys of config.json for generation, where `huggingface.save` is not given them.
      tensors: the lines of the table of names that are this kind's alone, such as those of its head.
      same_head: Transformers' names of other classes whose files hold the same head.
      scoped: whether the fields of a part are called by its name too, "text_num_layers", as those of two towers are.
    """

    architecture: str
    model: type[nn.Module]
    parts: Mapping[str, type[nn.Module]]
    keys: Mapping[str, Key | Computed]
    constants: Mapping[str, Any]
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields
    more: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda fields: {}
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Sequence["Tensor"] = ()
    same_head: Sequence[str] = ()
    scoped: bool = False

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the model that `config` describes."""
        return {field: key.read(config) for field, key in self.keys.items()} | dict(self.constants)

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of config.json for a model of these fields, or raise UserError if the family lacks it.

        Of two fields that share a key the later in `keys` is written; only free ones may then differ.
        """
        config: dict[str, Any] = {}
        for field, key in self.keys.items():
            config |= key.write(fields[field])
        config |= self.more(fields)
        for field, value in self.read(config).items():
            if fields[field] != value and field not in self.overridable():
                raise UserError(f"{self.architecture} needs {field}={value!r}, the model has {fields[field]!r}")
        return config

    def build(self, fields: Mapping[str, Any]) -> nn.Module:
        """Return the model with these fields; raise UserError for a value of the wrong type."""
        parts = {name: part(**self._own(part, fields, self._prefix(name))) for name, part in self.parts.items()}
        return self.model(**self._own(self.model, fields), **parts)

    def fields(self, model: nn.Module) -> dict[str, Any]:
        """Return the fields that `build` makes `model` from."""
        fields = {name: getattr(model, name) for name in _types(self.model) if name not in self.parts}
        for name, part in self.parts.items():
            of_part = getattr(model, name)
            fields |= {self._prefix(name) + field: getattr(of_part, field) for field in _types(part)}
        return self.complete(fields)

    def matches(self, model: nn.Module) -> bool:
        """Say whether `model` is made of this kind's classes."""
        return type(model) is self.model and all(type(getattr(model, name)) is t for name, t in self.parts.items())

    def overridable(self) -> set[str]:
        """Return the fields that may differ from the checkpoint's: the free ones, and those it says nothing about."""
        names = set(_types(self.model)) - set(self.parts)
        for part_name, part in self.parts.items():
            names |= {self._prefix(part_name) + name for name in _types(part)}
        fixed = {field for field, key in self.keys.items() if not key.free} | set(self.constants)
        return names - fixed

    def _prefix(self, part: str) -> str:
        return f"{part}_" if self.scoped else ""

    def _own(self, part: type[nn.Module], fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        types = _types(part)
        own = {name: fields[prefix + name] for name in types if prefix + name in fields}
        for name, value in own.items():
            try:
                typeguard.check_type(value, types[name])
            except typeguard.TypeCheckError as error:
                raise UserError(f"{prefix}{name}={value!r} is of the wrong type: {error}") from None
        return own


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array of theirs becomes one or more of ours, and back.

    Attributes:
      to_ours: of theirs and, where it is `sized`, of the shapes of ours.
      to_theirs: of ours.
      sized: whether the shapes of ours say where theirs is split.
    """

    to_ours: Callable[..., Sequence[np.ndarray]]
    to_theirs: Callable[..., np.ndarray]
    sized: bool = False

    def split(self, theirs: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Sequence[np.ndarray]:
        """Return our arrays, which have these shapes."""
        return self.to_ours(theirs, shapes) if self.sized else self.to_ours(theirs)


SAME = Layout(lambda x: [x], lambda x: x)
TRANSPOSED = Layout(lambda x: [x.T], lambda x: x.T)
# Kernels of convolutions: [out, in, rows, columns] of theirs, [rows, columns, in, out] of ours.
CONVOLUTION = Layout(lambda x: [x.transpose(2, 3, 1, 0)], lambda x: x.transpose(3, 2, 0, 1))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One line of a family's table of names.

    Attributes:
      ours: paths of our parameters.
      theirs: the name in the weights file; "{}" is the layer's number, the leading axis of ours.
      layout: how the arrays correspond.
      part: "" for what every checkpoint must hold. Tensors of one other part may be absent together and are then new;
        the part "head" belongs to the task that the checkpoint was trained for.
      beside: a path of ours without which the line does not hold.
      unless: a path of ours with which the line does not hold.
      instead: the name of the tensor that is read where the file lacks `theirs`.
      numbers: what stands in place of "{}" instead of 0, 1, 2, ...
      shared: a path of ours that every layer has; ours is shared by the layers, and theirs is a copy for each of them.
    """

    ours: tuple[str, ...]
    theirs: str
    layout: Layout = SAME
    part: str = ""
    beside: str = ""
    unless: str = ""
    instead: str = ""
    numbers: tuple[str, ...] = ()
    shared: str = ""

    @property
    def pattern(self) -> str:
        """A regular expression of the names that `theirs` stands for."""
        return re.escape(self.theirs).replace(r"\{\}", f"({'|'.join(self.numbers)})" if self.numbers else r"\d+")

    def holds(self, paths: Container[str]) -> bool:
        """Say whether the line is about a model of parameters at these paths."""
        needed = (*self.ours, self.beside) if self.beside else self.ours
        return all(path in paths for path in needed) and not (self.unless and self.unless in paths)


def linear(ours: str, theirs: str, part: str = "") -> list[Tensor]:
    """A linear layer, whose kernel PyTorch keeps as [out, in] and we as [in, out]."""
    return [
        Tensor((f"{ours}/kernel",), f"{theirs}.weight", TRANSPOSED, part),
        Tensor((f"{ours}/bias",), f"{theirs}.bias", SAME, part),
    ]


def norm(ours: str, theirs: str, part: str = "") -> list[Tensor]:
    """A layer normalisation."""
    return [
        Tensor((f"{ours}/scale",), f"{theirs}.weight", part=part),
        Tensor((f"{ours}/bias",), f"{theirs}.bias", part=part),
    ]


def embedding(ours: str, theirs: str) -> list[Tensor]:
    """A table of embeddings."""
    return [Tensor((f"{ours}/embedding",), f"{theirs}.weight")]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      prefix: what the names of the encoder's tensors begin with where the file holds a head too.
      kinds: its kinds of model, by our name for them.
      tensors: the table of names, but for what belongs to one kind alone.
      only: keys of config.json of which we implement one value, that one.
      unused: regular expressions of the names of tensors that may be left unread, as those of other kinds may be.
      copies: which of those, where they are left unread, must equal another tensor.
      rename: returns what the table calls a tensor for the name that a file has for it.
      modules: (regular expression, replacement), applied in turn to a file's names: what Transformers 5 calls modules
        in memory, and with it files of adapters, where that is not what it calls them in files of weights.
      diffusers: for a family of Diffusers, its classes, by whose names folders are known instead of a model_type.
    """

    prefix: str
    kinds: Mapping[str, Kind]
    tensors: Sequence[Tensor]
    only: Mapping[str, Any]
    unused: Sequence[str]
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rename: Callable[[str], str] = lambda name: name
    modules: tuple[tuple[str, str], ...] = ()
    diffusers: tuple[str, ...] = ()

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise UserError if `config` asks for what we do not implement."""
        for key, value in self.only.items():
            if config.get(key, value) not in (value, None):
                raise UserError(f"config.json has {key}={config[key]!r}, of which only {value!r} is implemented")

    def table(self, kind: Kind, paths: Container[str]) -> list[Tensor]:
        """Return the lines of the table of names for a model of that kind and of parameters at these paths."""
        return [tensor for tensor in (*self.tensors, *kind.tensors) if tensor.holds(paths)]

    def in_memory(self, name: str) -> str:
        """Return what a tensor is called in the memory of Transformers 5, of its name in a file."""
        for pattern, replacement in self.modules:
            name = re.sub(pattern, replacement, name)
        return name

    def names(self) -> list[str]:
        """Return regular expressions of the names of all tensors that files of the family may hold."""
        return [*self.leftovers(), *(tensor.pattern for tensor in self.tensors)]

    def leftovers(self) -> list[str]:
        """Return regular expressions of the names that may be left unread: `unused`, and what only some kinds have."""
        return [*self.unused, *(tensor.pattern for kind in self.kinds.values() for tensor in kind.tensors)]

    def kind_of(self, model: nn.Module) -> Kind | None:
        """Return the kind that `model` is of, if any."""
        return next((kind for kind in self.kinds.values() if kind.matches(model)), None)


def override(kind: Kind, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` with `overrides`, or raise UserError for one that is misspelt or that the weights fix."""
    for name in overrides:
        if name not in kind.overridable():
            fixed = "is fixed by the pretrained weights" if name in fields else "is not an option"
            raise UserError(f"'{name}' {fixed}{nearest(name, kind.overridable())}")
    return dict(fields) | dict(overrides)


def _types(part: type[nn.Module]) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(part) if field.name not in ("parent", "name")}
