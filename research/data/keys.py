"""A key of what prepared data are made of: another source, op or tokenizer, or other code of theirs, has another."""

import dataclasses
import functools
import hashlib
import inspect
import pathlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tensorflow_datasets.core.data_sources.base import BaseDataSource

from research import storage
from research.data.tokenizer import Tokenizer


class UnknownError(Exception):
    """Something has no key, since what it stands for cannot be seen in it."""


def cached(kind: str, *values: Any) -> pathlib.Path | None:
    """Return where arrays of a kind are kept, in the cache under the key of `values`; None where these have none."""
    try:
        return storage.cache_dir() / kind / f"{key_of(*values)}.npz"
    except (UnknownError, RecursionError):
        return None


def key_of(*values: Any) -> str:
    """Return 24 hexadecimal digits that say what `values` are: data, functions, objects made of these.

    An object with an attribute `fingerprint`, a text, is known by it and its class.

    Raises:
      UnknownError: one holds something else, such as an open file or an object of compiled code.
    """
    digest = hashlib.blake2b(digest_size=12)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a value to a digest, with its type, and with its length where it has one."""
    digest.update(f"{type(value).__module__}.{type(value).__qualname__}:".encode())
    if value is None or isinstance(value, bool | int | float | complex | range | slice):
        digest.update(f"{value!r};".encode())
    elif isinstance(value, str | bytes):
        _add_bytes(digest, value.encode() if isinstance(value, str) else value)
    elif isinstance(value, np.ndarray | np.generic):
        if value.dtype.hasobject:
            _add(digest, value.tolist())
        else:
            _add_bytes(digest, f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _add(digest, sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, set | frozenset):
        _add(digest, sorted(value, key=str))
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)};".encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, pathlib.Path):
        _add(digest, _file(value))
    else:
        _add_object(digest, value)


def _add_bytes(digest: Any, value: bytes) -> None:
    digest.update(f"{len(value)};".encode())
    digest.update(value)


def _add_object(digest: Any, value: Any) -> None:
    if isinstance(value, tokenizers.Tokenizer):
        _add(digest, [value.to_str(), value.encode_special_tokens, tokenizers.__version__])
    elif isinstance(value, Tokenizer):  # wherever its folder is
        _add(digest, [value.backend, value.pad_id, value.specials, value.chat_template])
    elif isinstance(value, BaseDataSource):
        info = value.dataset_info
        files = [pathlib.Path(instruction.filename) for instruction in _instructions(value)]
        _add(digest, [info.full_name, str(value.split), repr(value), [_file(file) for file in files]])
    elif isinstance(fingerprint := getattr(value, "fingerprint", None), str):
        _add(digest, fingerprint)
    elif isinstance(value, functools.partial):
        _add(digest, [value.func, value.args, value.keywords])
    elif isinstance(value, types.MethodType):
        _add(digest, [value.__self__, value.__func__.__qualname__])
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        _add(digest, [value.__qualname__, _code(value), value.__defaults__, value.__kwdefaults__, cells])
    elif isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        _add(digest, [getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__), _code(value)])
    else:
        _add(digest, [_code(type(value)), _state(value)])


def _state(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, but for what it has computed from the others."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if not hasattr(value, "__dict__") or type(value).__module__.partition(".")[0] in ("builtins", "io", "_io"):
        raise UnknownError(f"{type(value).__module__}.{type(value).__qualname__}")
    computed = {name for name in vars(value) if isinstance(_of_class(value, name), functools.cached_property)}
    return {name: item for name, item in vars(value).items() if name not in computed}


def _of_class(value: Any, name: str) -> Any:
    return inspect.getattr_static(type(value), name, None)


def _file(path: pathlib.Path) -> list[Any]:
    stat = path.stat() if path.exists() else None
    return [str(path), stat and stat.st_size, stat and stat.st_mtime_ns]


def _instructions(source: BaseDataSource) -> Sequence[Any]:
    splits = source.dataset_info.splits
    return splits[source.split or "train"].file_instructions


def _code(value: Any) -> str:
    """Return a digest of the code of the module that defines a value, and of what that uses of its own package."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return _code_of(name) if name in sys.modules else ""


@functools.cache
def _code_of(name: str) -> str:
    package, digest, todo = name.rpartition(".")[0] or name, hashlib.blake2b(digest_size=12), [name]
    for found in todo:
        module = sys.modules[found]
        file = getattr(module, "__file__", None)
        if file is None or not file.endswith(".py") or not pathlib.Path(file).exists():
            continue
        digest.update(pathlib.Path(file).read_bytes())
        used = (getattr(v, "__module__", None) or getattr(v, "__name__", None) for v in list(vars(module).values()))
        own = (n for n in used if isinstance(n, str) and n.startswith(f"{package}.") and n in sys.modules)
        todo.extend(n for n in sorted(set(own)) if n not in todo)
    return digest.hexdigest()
