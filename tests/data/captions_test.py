"""Images with texts: the user's own, and those made of classes."""

import json

import numpy as np
import PIL.Image
import pytest

from research.data import captions, tokenizer
from research.data.dataset import Dataset
from research.data.image import Decode
from research.errors import UserError

TOKENIZER = tokenizer.byte_level()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    rows = [{"file": f"a/{i // 2}.png", "caption": f"number {i}"} for i in range(40)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(20):
        PIL.Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "photos" / "a" / f"{i}.png")
    return tmp_path


def source(folder, **fields):
    where = {"train": str(folder / "captions.jsonl"), "images": str(folder / "photos")}
    return captions.captions(**where | {"image": "file", "text": "caption"} | fields)


def test_images_come_with_their_texts(folder):
    found = source(folder)
    assert (len(found), found[5]["text"]) == (40, "number 5")
    ops = (Decode(), captions.PaddedTokens(TOKENIZER, max_length=12))
    (row,) = Dataset(found, ("image", "input_ids", "attention_mask"), ops).transform(found[5])
    assert row["image"][0, 0, 0] == 2
    assert TOKENIZER.decode(row["input_ids"]) == "number 5"
    np.testing.assert_array_equal(row["attention_mask"], [1] * 10 + [0] * 2)


def test_the_texts_of_an_image_stay_together(folder):
    sides = [source(folder, held_out=0.3, split=split) for split in ("train", "validation")]
    images = [{side[i]["image"] for i in range(len(side))} for side in sides]
    assert not images[0] & images[1]
    assert sum(map(len, sides)) == 40


def test_mistakes_are_named(folder):
    with pytest.raises(UserError, match="captiom"):
        source(folder, text="captiom")
    (folder / "photos" / "a" / "3.png").unlink()
    with pytest.raises(UserError, match=r"there is no image file '.*a/3.png'"):
        Decode()(source(folder)[6])


def test_class_captions_draw_a_template_of_the_examples_class():
    op = captions.ClassCaptions(TOKENIZER, ("cat", "dog"), ("a {}", "the {}!"), max_length=10)
    rng = np.random.default_rng(0)
    texts = [TOKENIZER.decode(op({"label": i % 2}, rng)["input_ids"]) for i in range(40)]
    assert set(texts[::2]) == {"a cat", "the cat!"}
    assert set(texts[1::2]) == {"a dog", "the dog!"}
    with pytest.raises(UserError, match="classes: there are 2, and an example is of number 2"):
        op({"label": 2}, rng)


def test_long_texts_are_cut_off_before_their_end_token():
    arrays = captions.encode(TOKENIZER, ["abcdefgh", "a"], 5)
    assert arrays["input_ids"].shape == (2, 5)
    assert (arrays["input_ids"][0, -1], arrays["input_ids"][1, 2]) == (TOKENIZER.eos_id, TOKENIZER.eos_id)
    assert arrays["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
