"""Parameters whose tensors are read when they are placed, and only as far as this process's devices hold them."""

import dataclasses
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import jax
import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one tensor of a file holds of a parameter.

    Attributes:
      index: the layer that it is, the leading axis of the parameter; ... where it is all of it.
      read: returns parts of it, in the parameter's layout.
    """

    index: int | EllipsisType
    read: Callable[[Sequence[Index]], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Pending:
    """A float32 parameter that is still in its file; NumPy takes it for an array, and then reads all of it."""

    shape: tuple[int, ...]
    pieces: Sequence[Piece]
    dtype = np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def parts(self, indices: Sequence[Index]) -> list[np.ndarray]:
        """Return some parts, float32; a tensor is read once for all of them, and let go before the next.

        Args:
          indices: of each part a slice, of step 1, of every dimension.
        """
        ranges = [[range(*part.indices(size)) for part, size in zip(index, self.shape)] for index in indices]
        found = [np.empty([len(places) for places in each], np.float32) for each in ranges]
        for piece in self.pieces:
            whole = isinstance(piece.index, EllipsisType)
            asked = [i for i, places in enumerate(ranges) if whole or piece.index in places[0]]
            inside = [tuple(slice(each.start, each.stop) for each in ranges[i][0 if whole else 1 :]) for i in asked]
            for i, array in zip(asked, piece.read(inside) if asked else ()):
                if isinstance(piece.index, EllipsisType):
                    found[i][...] = array
                else:
                    found[i][piece.index - ranges[i][0].start] = array
        return found

    def place(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """Return it on its devices; a part that several of them hold is read once."""
        wanted = sharding.addressable_devices_indices_map(self.shape).values()
        indices = {str(index): index for index in wanted if index is not None}
        parts = dict(zip(indices, self.parts(list(indices.values()))))
        return jax.make_array_from_callback(self.shape, sharding, lambda index: parts[str(index)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all of it."""
        del copy  # it is new
        (array,) = self.parts([tuple(slice(None) for _ in self.shape)])
        return array if dtype is None else array.astype(dtype)
