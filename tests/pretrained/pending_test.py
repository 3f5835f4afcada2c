"""Parameters that are read as far as devices hold them: what is read, how often, and what it equals."""

import numpy as np
import pytest

from research.pretrained.pending import Pending, Piece


@pytest.fixture
def stacked():
    whole = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    reads = []

    def piece(layer):
        def read(indices):
            reads.append(layer)
            return [whole[layer][index].astype(np.float64) for index in indices]

        return Piece(layer, read)

    return Pending(whole.shape, [piece(layer) for layer in range(3)]), whole, reads


def test_parts_equal_those_of_the_whole_and_each_tensor_is_read_once(stacked):
    pending, whole, reads = stacked
    every = slice(None)
    indices = [(every, slice(0, 2), every), (every, slice(2, 4), every), (slice(1, 3), every, slice(3, 6))]
    parts = pending.parts(indices)
    for part, index in zip(parts, indices):
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, whole[index])
    assert reads == [0, 1, 2]


def test_a_layer_that_no_part_has_is_not_read(stacked):
    pending, whole, reads = stacked
    (part,) = pending.parts([(slice(1, 2), slice(None), slice(None))])
    np.testing.assert_array_equal(part, whole[1:2])
    assert reads == [1]


def test_numpy_reads_all_of_it(stacked):
    pending, whole, _ = stacked
    np.testing.assert_array_equal(pending, whole)
    assert (pending.shape, pending.ndim, pending.dtype) == ((3, 4, 6), 3, np.float32)


def test_what_is_not_stacked_is_one_piece():
    table = np.arange(12.0).reshape(4, 3)
    pending = Pending((4, 3), [Piece(..., lambda indices: [table[index] for index in indices])])
    first, second = pending.parts([(slice(0, 2), slice(None)), (slice(2, 4), slice(None))])
    np.testing.assert_array_equal(np.concatenate([first, second]), table)
