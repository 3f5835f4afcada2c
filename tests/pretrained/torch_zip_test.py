"""PyTorch's zip format, written here by hand: what is read, and that nothing in it is executed."""

import collections
import io
import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.pretrained import torch_zip


class Global:
    """Pickles as the global of that name, which need not exist here."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Persistent(tuple):
    """Pickles as a persistent id."""


class Pickler(pickle._Pickler):
    """The Python pickler, which can be told to write names of things that are not importable here."""

    def persistent_id(self, value):
        return tuple(value) if isinstance(value, Persistent) else None

    def save(self, value, *arguments, **keywords):
        if isinstance(value, Global):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, *arguments, **keywords)


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def storage(key, dtype, size):
    return Persistent(("storage", Global("torch", dtype), key, "cpu", size))


def tensor(key, dtype, size, offset, shape, strides):
    return Call(REBUILD, storage(key, dtype, size), offset, shape, strides, False, collections.OrderedDict())


def write(path, value, storages=None, byteorder=b"little"):
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    write_pickle(path, buffer.getvalue(), storages, byteorder)
    return path


def write_pickle(path, data, storages=None, byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", byteorder)
        for key, array in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", jnp.bfloat16),
        ("DoubleStorage", np.float64),
        ("LongStorage", np.int64),
        ("BoolStorage", np.bool_),
    ],
)
def test_dtypes(path, name, dtype):
    values = np.array([[1, 0, 3], [4, 5, 0]]).astype(dtype)
    state = collections.OrderedDict(x=tensor("0", name, 6, 0, (2, 3), (3, 1)))
    read = torch_zip.read(write(path, state, {"0": values}))
    assert read["x"].shape == (2, 3)
    assert read["x"].dtype == dtype
    np.testing.assert_array_equal(read["x"].read(), values)


def test_strides_offsets_and_a_shared_storage(path):
    values = np.arange(24, dtype=np.float32)
    state = {
        "whole": tensor("7", "FloatStorage", 24, 0, (24,), (1,)),
        "transposed": tensor("7", "FloatStorage", 24, 0, (6, 4), (1, 6)),
        "offset": tensor("7", "FloatStorage", 24, 5, (3, 2), (6, 2)),
        "scalar": tensor("7", "FloatStorage", 24, 9, (), ()),
        "empty": tensor("7", "FloatStorage", 24, 0, (0, 3), (3, 1)),
        "expanded": tensor("7", "FloatStorage", 24, 23, (5, 2), (0, 0)),
    }
    read = {name: stored.read() for name, stored in torch_zip.read(write(path, state, {"7": values})).items()}
    np.testing.assert_array_equal(read["whole"], values)
    np.testing.assert_array_equal(read["transposed"], values.reshape(4, 6).T)
    np.testing.assert_array_equal(read["offset"], [[5, 7], [11, 13], [17, 19]])
    assert read["scalar"] == 9
    assert read["empty"].shape == (0, 3)
    np.testing.assert_array_equal(read["expanded"], np.full((5, 2), 23))


def test_parameters_and_metadata(path):
    state = collections.OrderedDict(
        x=Call(
            Global("torch._utils", "_rebuild_parameter"),
            tensor("0", "FloatStorage", 2, 0, (2,), (1,)),
            True,
            collections.OrderedDict(),
        )
    )
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    read = torch_zip.read(write(path, state, {"0": np.ones(2, np.float32)}))
    np.testing.assert_array_equal(read["x"].read(), [1, 1])


@pytest.mark.parametrize("call", [(os, "system"), (os, "mkdir")])
def test_a_malicious_pickle_is_refused_unexecuted(path, tmp_path, call):
    victim = tmp_path / "executed"
    argument = str(victim) if call[1] == "mkdir" else f"touch {victim}"

    class Malicious:
        def __reduce__(self):
            return getattr(*call), (argument,)

    write_pickle(path, pickle.dumps({"x": Malicious()}))
    with pytest.raises(UserError, match=rf"refused, as it holds more than tensors: \w+\.{call[1]}"):
        torch_zip.read(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_other_name_is_refused(path, module, name, protocol):
    if protocol == 2:
        data = pickle.PROTO + b"\x02" + pickle.GLOBAL + f"{module}\n{name}\n".encode() + pickle.STOP
    else:
        strings = b"".join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name))
        data = pickle.PROTO + b"\x04" + strings + pickle.STACK_GLOBAL + pickle.STOP
    write_pickle(path, data)
    with pytest.raises(UserError, match="refused"):
        torch_zip.read(path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (3, 3), (3, 1)), (6, (1,), (1,)), (-1, (2,), (1,)), (5, (2,), (-1,)), (0, (2,), (10**18,))],
)
def test_a_tensor_beyond_its_storage_is_refused(path, offset, shape, strides):
    write(path, {"x": tensor("0", "FloatStorage", 6, offset, shape, strides)}, {"0": np.zeros(6, np.float32)})
    with pytest.raises(UserError, match="beyond its storage of 6 elements"):
        torch_zip.read(path)


def test_a_storage_shorter_than_said_or_missing_is_named(path):
    state = {"x": tensor("0", "FloatStorage", 6, 0, (6,), (1,)), "y": tensor("1", "FloatStorage", 6, 0, (6,), (1,))}
    read = torch_zip.read(write(path, state, {"0": np.zeros(5, np.float32)}))
    with pytest.raises(UserError, match="data/0 has 20 bytes, not 24"):
        read["x"].read()
    with pytest.raises(UserError, match="data/1 is missing"):
        read["y"].read()


def test_other_files_are_named(path):
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(UserError, match=r"not in the zip format that PyTorch writes since version 1\.6"):
        torch_zip.read(path)
    write_pickle(path, b"\x80\x02garbage")
    with pytest.raises(UserError, match="cannot be read"):
        torch_zip.read(path)
    with pytest.raises(UserError, match="big-endian"):
        torch_zip.read(write(path, {}, byteorder=b"big"))
    with pytest.raises(UserError, match="holds a list, not a dict"):
        torch_zip.read(write(path, []))
    with pytest.raises(UserError, match="holds 'epoch' of type int, not a named tensor"):
        torch_zip.read(write(path, {"epoch": 3}))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(UserError, match=r"no data\.pkl"):
        torch_zip.read(path)
