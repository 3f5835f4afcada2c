import numpy as np
import pytest

from research.data import packing
from research.errors import UserError

SIDE = {"input_ids": 9, "target_mask": 0.0, "attention_mask": 0, "positions": 0}


def document(length, first=100):
    return {"input_ids": np.arange(first, first + length), "target_mask": np.ones(length, np.float32)}


def slow_first_fit(lengths, room):
    free, rows = [], []
    for need in lengths.T:
        row = next((i for i, left in enumerate(free) if (left >= need).all()), len(free))
        if row == len(free):
            free.append(np.array(room))
        free[row] = free[row] - need
        rows.append(row)
    return rows


@pytest.mark.parametrize("room", [(16,), (16, 11)])
def test_every_piece_goes_to_the_first_row_with_room(room):
    lengths = np.random.default_rng(0).integers(1, 12, (len(room), 300))
    assert packing.first_fit(lengths, room).tolist() == slow_first_fit(lengths, room)


def test_one_row_by_hand():
    packed = packing.pack([document(3), document(4, 200), document(2, 300)], (SIDE,), (6,))
    assert packed["input_ids"].tolist() == [[100, 101, 102, 300, 301, 9], [200, 201, 202, 203, 9, 9], [9] * 6]
    assert packed["attention_mask"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert packed["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0], [0] * 6]
    assert packed["target_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert packed["target_mask"].dtype == packed["mask"].dtype == np.float32
    assert packed["mask"].tolist() == [1, 1, 0]


def test_long_documents_are_cut_and_every_token_stands_once():
    random = np.random.default_rng(1)
    lengths = [0, *random.integers(0, 70, 200).tolist(), 32, 64]
    starts = np.cumsum([0, *lengths])
    packed = packing.pack([document(n, int(s)) for n, s in zip(lengths, starts)], (SIDE | {"input_ids": -1},), (32,))
    real = packed["attention_mask"] > 0
    assert sorted(packed["input_ids"][real].tolist()) == list(range(sum(lengths)))
    assert (packed["input_ids"][~real] == -1).all()
    np.testing.assert_array_equal(packed["target_mask"], real)
    for ids, numbers, positions in zip(packed["input_ids"], packed["attention_mask"], packed["positions"]):
        found = numbers[numbers > 0]
        assert (np.diff(numbers[: len(found)]) >= 0).all()  # nothing between documents, all the rest at the end
        assert set(found.tolist()) == set(range(1, found.max(initial=0) + 1))
        for number in set(found.tolist()):
            piece = ids[numbers == number]
            owner = np.searchsorted(starts, piece, side="right")
            assert len(set(owner.tolist())) == 1  # a piece of one document
            assert positions[numbers == number].tolist() == list(range(len(piece)))
            assert piece.tolist() == list(range(piece[0], piece[0] + len(piece)))
            assert (piece[0] - starts[owner[0] - 1]) % 32 == 0  # cut where its first 32, 64, ... tokens end


def test_both_sides_of_an_example_go_to_one_row():
    random = np.random.default_rng(2)
    sides = (
        {"input_ids": 0, "attention_mask": 0, "positions": 0},
        {"decoder_input_ids": 0, "targets": 0, "decoder_attention_mask": 0, "decoder_positions": 0},
    )
    examples = []
    for i in range(1, 200):
        source, target = random.integers(1, 20), random.integers(1, 30)
        examples.append({"input_ids": [i] * source, "decoder_input_ids": [i] * target, "targets": [-i] * target})
    packed = packing.pack(examples, sides, (32, 40))
    assert packed["input_ids"].shape[1:] == (32,)
    assert packed["targets"].shape[1:] == (40,)
    seen = []
    for r in range(len(packed["mask"]) - 1):
        numbers, others = packed["attention_mask"][r], packed["decoder_attention_mask"][r]
        assert set(numbers) - {0} == set(others) - {0}
        for number in set(numbers.tolist()) - {0}:
            (i,) = set(packed["input_ids"][r][numbers == number])
            example = examples[i - 1]
            assert packed["input_ids"][r][numbers == number].tolist() == example["input_ids"]
            assert packed["decoder_input_ids"][r][others == number].tolist() == example["decoder_input_ids"]
            assert packed["targets"][r][others == number].tolist() == example["targets"]
            assert packed["decoder_positions"][r][others == number].tolist() == list(range(len(example["targets"])))
            seen.append(i)
    assert sorted(seen) == list(range(1, 200))


def test_rows_are_nearly_full_on_documents_as_long_as_the_web_has_them():
    documents = (
        np.random.default_rng(0).lognormal(6, 1, 4000).astype(int) + 1
    )  # median 400 tokens, one in 20 over 2,000
    pieces = packing.cut(documents[None], (1024,))[2]
    rows = packing.first_fit(pieces, (1024,))
    assert documents.sum() / (1024 * (rows.max() + 1)) > 0.97


def test_features_with_more_axes_keep_them():
    packed = packing.pack([{"boxes": np.ones((3, 4), np.float32)}], ({"boxes": 0.0, "attention_mask": 0},), (5,))
    assert packed["boxes"].shape == (2, 5, 4)
    assert packed["boxes"][0].sum() == 12


def test_apart_every_example_has_its_row():
    packed = packing.pack([document(3), document(0), document(1)], (SIDE,), (4,), apart=True)
    assert (packed["attention_mask"] > 0).sum(axis=1).tolist() == [3, 0, 1, 0]
    with pytest.raises(UserError, match="7 tokens do not fit into a row of 4"):
        packing.pack([document(7)], (SIDE,), (4,), apart=True)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"different lengths: \{'input_ids': 3, 'target_mask': 2\}"):
        packing.pack([document(3) | {"target_mask": np.ones(2)}], (SIDE,), (8,))
    with pytest.raises(UserError, match="no 'target_mask'; did you mean 'targets_mask'"):
        packing.pack([{"input_ids": [1], "targets_mask": [1]}], (SIDE,), (8,))
    with pytest.raises(UserError, match="9 tokens do not fit into a row of 8"):
        packing.pack([{"a": [1] * 9, "b": [1]}], ({"a": 0}, {"b": 0}), (8, 8))
