"""Reads `pytorch_model.bin` (PyTorch's zip format, 1.6 and later) without PyTorch and without executing its pickle.

The archive holds `NAME/data.pkl`, a pickled dict of tensors, and `NAME/data/KEY`, the bytes of one storage each. The
unpickler below knows the few names that such a dict needs, and stops at any other.
"""

import collections
import functools
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from research.errors import UserError

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class Stored(NamedTuple):
    """A tensor in a file: its shape, its dtype, how to read it, and a part of it where the format lets one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_part: Callable[[tuple[slice, ...]], np.ndarray] | None = None


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int  # elements


class _Refused(Exception):
    """What the pickle asks for is not needed to hold tensors."""


def read(path: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors of a state dict that `torch.save` wrote, by name.

    Raises:
      UserError: the file is in the older format, is damaged, or holds anything but tensors.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not in the zip format that PyTorch writes since version 1.6 (damaged, or older); "
            "load it with PyTorch and save it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _Unpickler(path, archive).load()
    except _Refused as error:
        raise UserError(f"{path} is refused, as it holds more than tensors: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds a {type(tensors).__name__}, not a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            kind = type(tensor).__name__
            raise UserError(f"{path} holds {name!r} of type {kind}, not a named tensor: save the state_dict alone")
    return dict(tensors)


class _Unpickler(pickle.Unpickler):
    """Build dicts of `Stored` and nothing else."""

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile):
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _Refused("no data.pkl in it")
        super().__init__(archive.open(pickles[0]))
        root = pickles[0].removesuffix("data.pkl")
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise _Refused("its numbers are big-endian")
        # Shared storages come one after the other, so that keeping the last one read is enough.
        self._read_storage = functools.lru_cache(maxsize=1)(functools.partial(_read_storage, path, root))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return self._tensor if name == "_rebuild_tensor_v2" else lambda tensor, *_: tensor
        if module == "torch" and name in _DTYPES:
            return name
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or storage_type not in _DTYPES:
            raise _Refused(f"a persistent {kind!r}")
        return _Storage(str(key), _DTYPES[storage_type], int(size))

    def _tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (0 not in shape and last >= storage.size):
            raise _Refused(f"a tensor of shape {shape} beyond its storage of {storage.size} elements")

        def view() -> np.ndarray:
            flat = self._read_storage(storage)[offset:]
            return np.lib.stride_tricks.as_strided(
                flat, shape, [stride * storage.dtype.itemsize for stride in strides], writeable=False
            )

        return Stored(tuple(shape), storage.dtype, view)


def _read_storage(path: pathlib.Path, root: str, storage: _Storage) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        name, size = f"{root}data/{storage.key}", storage.size * storage.dtype.itemsize
        if name not in archive.namelist():
            raise UserError(f"{path} is damaged: {name} is missing")
        if archive.getinfo(name).file_size < size:
            raise UserError(f"{path} is damaged: {name} has {archive.getinfo(name).file_size} bytes, not {size}")
        with archive.open(name) as file:
            return np.frombuffer(file.read(size), storage.dtype, storage.size)
