"""Boxes move as the pixels that they enclose do."""

import numpy as np
import pytest

from research.build import build
from research.data import boxes, image, source
from research.errors import UserError

SCENE = (97, 141)  # height and width
RECTANGLES = ((10, 20, 40, 70), (50, 5, 90, 30), (5, 100, 60, 141))  # top, left, bottom, right; apart from each other


def drawn(rectangles=RECTANGLES, size=SCENE, **more):
    """Returns rectangles on black, each in a colour channel of its own, and their boxes."""
    pixels = np.zeros((*size, 3), np.uint8)
    for number, (top, left, bottom, right) in enumerate(rectangles):
        pixels[top:bottom, left:right, number] = 255
    shares = np.asarray(rectangles, np.float32).reshape(-1, 4) / np.array([*size, *size], np.float32)
    return {"image": pixels, "objects": {"bbox": shares, "label": np.arange(len(rectangles)), **more}}


def tight(pixels, number):
    """Returns the box of a rectangle's pixels, where there are any; at its edge, those that are half covered."""
    rows, columns = np.nonzero(pixels[..., number] > 127)
    return np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) if len(rows) else None


def check(example, tolerance):
    """Asserts that boxes enclose what can be seen, and that what can be seen has a box; returns the labels."""
    pixels, objects = example["image"], example["objects"]
    found = dict(zip(objects["label"].tolist(), objects["bbox"] * np.array([*pixels.shape[:2]] * 2)))
    for number in range(len(RECTANGLES)):
        seen = tight(pixels, number)
        if seen is None:  # but for a sliver that less than half covers a pixel
            assert number not in found or min(found[number][2:] - found[number][:2]) < 0.5 + tolerance
        else:
            np.testing.assert_allclose(found[number], seen, atol=tolerance)
    return set(found)


class Low:
    """A generator that draws the lowest of everything."""

    def random(self):
        return 0.0

    def integers(self, low, high=None):
        return np.zeros_like(low) if high is None else low


@pytest.mark.parametrize("seed", range(8))
def test_flip(seed):
    op = boxes.RandomFlip()
    example = op(drawn(), np.random.default_rng(seed))
    assert check(example, 1e-4) == {0, 1, 2}
    flipped = np.random.default_rng(seed).random() < 0.5
    assert (example["image"] == drawn()["image"]).all() != flipped
    back = op(op(drawn(), Low()), Low())
    np.testing.assert_array_equal(back["image"], drawn()["image"])
    np.testing.assert_allclose(back["objects"]["bbox"], drawn()["objects"]["bbox"], atol=1e-6)


def test_turns():
    seen = set()
    for seed in range(12):
        example = boxes.RandomTurn()(drawn(), np.random.default_rng(seed))
        assert check(example, 1e-4) == {0, 1, 2}
        seen.add(example["image"].tobytes())
    assert len(seen) == 4


@pytest.mark.parametrize("size", [(97, 141), (141, 97), (50, 50)])
def test_resize(size):
    rectangles = [(5, 8, 30, 40)]
    for shorter, longer in ((40, 400), (200, 400), (97, 141), (80, 90)):
        example = boxes.Resize(shorter, longer)(drawn(rectangles, size))
        height, width = example["image"].shape[:2]
        assert min(height, width) == shorter or longer - 1 <= max(height, width) <= longer
        assert height / width == pytest.approx(size[0] / size[1], rel=0.03)
        np.testing.assert_array_equal(example["image_size"], size)
        (box,) = example["objects"]["bbox"] * np.array([height, width] * 2)
        np.testing.assert_allclose(box, tight(example["image"], 0), atol=0.6)


@pytest.mark.parametrize(
    ("size", "resized"),
    # What Transformers' DetrImageProcessor makes of them with its defaults, 800 and 1333.
    [((480, 640), (800, 1066)), ((640, 480), (1066, 800)), ((333, 500), (800, 1201)), ((200, 800), (333, 1333))],
)
def test_resize_rounds_as_detr(size, resized):
    assert boxes.Resize(800, 1333).size(*size) == resized


def test_random_resize_takes_all_lengths():
    op = boxes.RandomResize((48, 64, 80), 100)
    seen = set()
    for seed in range(20):
        example = op(drawn(), np.random.default_rng(seed))
        check(example, 0.6)
        seen.add(min(example["image"].shape[:2]))
    assert seen == {48, 64, round(100 * 97 / 141)}


@pytest.mark.parametrize("seed", range(20))
def test_crop(seed):
    example = boxes.RandomCrop(30, 90)(drawn(), np.random.default_rng(seed))
    height, width = example["image"].shape[:2]
    assert 30 <= height <= 90
    assert 30 <= width <= 90
    check(example, 1e-3)
    np.testing.assert_array_equal(example["image_size"], SCENE)
    again = boxes.RandomCrop(30, 90)(drawn(), np.random.default_rng(seed))
    np.testing.assert_array_equal(again["image"], example["image"])


def test_crop_drops_what_can_hardly_be_seen():
    scene = drawn([(0, 0, 40, 60)], (100, 100))
    area = 40 * 60

    def left(least_visible):  # the upper left corner of 40 x 40 remains: two thirds
        return len(boxes.RandomCrop(40, 40, least_visible)(scene, Low())["objects"]["label"])

    assert left(1600 / area - 0.01) == 1
    assert left(1600 / area + 0.01) == 0


def test_crop_of_small_images_keeps_them():
    example = boxes.RandomCrop(200, 300)(drawn(), np.random.default_rng(0))
    assert example["image"].shape[:2] == SCENE
    assert check(example, 1e-3) == {0, 1, 2}


def test_detrs_choice_from_a_config():
    node = {
        "call": "research.data.boxes.Choose",
        "choices": [
            [],
            [
                {"call": "research.data.boxes.RandomResize", "shorter": [100, 120], "longer": 200},
                {"call": "research.data.boxes.RandomCrop", "least": 60, "most": 90},
                {"call": "research.data.boxes.Resize", "shorter": 150, "longer": 200},
            ],
        ],
    }
    op, shapes = build(node, "op"), set()
    for seed in range(20):
        example = op(drawn(), np.random.default_rng(seed))
        check(example, 1)
        shapes.add(example["image"].shape)
    assert (*SCENE, 3) in shapes
    assert len(shapes) > 5


def floats(example):
    return image.Normalize()(example)


def test_targets():
    example = boxes.Targets(160, 5)(floats(drawn()))
    height, width = SCENE
    assert example["image"].shape == (160, 160, 3)
    np.testing.assert_array_equal(example["image"][:height, :width], floats(drawn())["image"])
    assert not example["image"][height:].any()
    assert not example["image"][:, width:].any()
    assert example["pixel_mask"].sum() == example["pixel_mask"][:height, :width].sum() == height * width
    np.testing.assert_array_equal(example["box_mask"], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(example["classes"], [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(example["image_size"], SCENE)
    top, left, bottom, right = RECTANGLES[1]
    expected = [
        (left + right) / 2 / width,
        (top + bottom) / 2 / height,
        (right - left) / width,
        (bottom - top) / height,
    ]
    np.testing.assert_allclose(example["boxes"][1], expected, rtol=1e-5)
    assert not example["boxes"][3:].any()
    assert {name: example[name].dtype for name in ("image", "pixel_mask", "boxes", "classes", "box_mask")} == {
        **dict.fromkeys(("image", "pixel_mask", "boxes", "box_mask"), np.float32),
        "classes": np.int32,
    }
    assert example["image_size"].dtype == np.int32


def test_targets_are_real_objects_in_the_image():
    scene = floats(drawn(is_crowd=np.array([True, False, False]), area=np.array([1, 2, 3])))
    scene["objects"]["bbox"][1] = [-0.5, 0.25, 0.5, 1.5]  # reaches out
    scene["objects"]["bbox"][2] = [0.5, 0.5, 0.5, 0.9]  # has no height
    example = boxes.Targets(160, 5)(scene)
    np.testing.assert_array_equal(example["box_mask"], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(example["boxes"][0], [0.625, 0.25, 0.75, 0.5])
    assert example["classes"][0] == 1


def test_an_image_without_objects():
    example = boxes.Targets(160, 5)(floats(drawn([])))
    assert example["boxes"].shape == (5, 4)
    assert not example["box_mask"].any()


def test_images_to_predict_for_need_no_objects():
    example = {"image": drawn()["image"]}
    for op in (boxes.RandomFlip(), boxes.RandomResize((50,), 90), boxes.RandomCrop(30, 40)):
        example = op(example, np.random.default_rng(0))
    example = boxes.Targets(160, 5)(floats(boxes.Resize(50, 90)(example)))
    assert set(example) == {"image", "pixel_mask", "image_size"}
    np.testing.assert_array_equal(example["image_size"], SCENE)


def test_too_many_objects():
    scene = floats(drawn() | {"file_name": "street.jpg"})
    with pytest.raises(UserError, match=r"image 'street.jpg' has 3 objects, more than .* 2; .*too_many='drop'"):
        boxes.Targets(160, 2)(scene)
    example = boxes.Targets(160, 2, too_many="drop")(scene)
    np.testing.assert_array_equal(example["classes"], [0, 2])  # the second is the smallest
    np.testing.assert_array_equal(example["box_mask"], [1, 1])


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda: boxes.Targets(96, 5)(floats(drawn())), r"an image has 97 x 141 pixels, more than the 96 of Targets"),
        (lambda: boxes.Targets(160, 5)(drawn()), "put image.Normalize before it"),
        (lambda: boxes.Targets(160, 5, "ignore"), "too_many: 'ignore'"),
        (lambda: boxes.Targets(160, 0), "size: 160 and `max_boxes`, 0"),
        (lambda: boxes.Resize(90, 80), "shorter: 90 must be at least 1 and at most `longer`, 80"),
        (lambda: boxes.Resize(90, 100, "bilinaer"), "interpolation: no 'bilinaer'; did you mean 'bilinear'?"),
        (lambda: boxes.RandomResize((), 80), "shorter: it needs at least one length"),
        (lambda: boxes.RandomCrop(90, 80), "least: 90"),
        (lambda: boxes.RandomCrop(9, 80, 1.0), "least_visible: 1.0"),
        (lambda: boxes.Choose(()), "choices: it needs"),
    ],
)
def test_mistakes_are_named(op, message):
    with pytest.raises(UserError, match=message):
        op()


def test_formats_of_boxes():
    box = np.array([[0.1, 0.2, 0.5, 0.8]], np.float32)  # top, left, bottom, right
    np.testing.assert_allclose(boxes.centred(box), [[0.5, 0.3, 0.6, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(boxes.corners(boxes.centred(box)), [[0.2, 0.1, 0.8, 0.5]], rtol=1e-6)


def test_renumbered_classes():
    plain = source.examples([drawn()], {"label": ("cat", "dog", "emu")})
    renamed = boxes.renumbered(plain, (1, 2, 5))
    assert renamed.label_names["label"] == ("N/A 0", "cat", "dog", "N/A 3", "N/A 4", "emu")
    np.testing.assert_array_equal(renamed[0]["objects"]["label"], [1, 2, 5])
    np.testing.assert_array_equal(plain[0]["objects"]["label"], [0, 1, 2])
    assert len(renamed) == 1
    with pytest.raises(UserError, match="ids: 3 classes need as many different numbers"):
        boxes.renumbered(plain, (1, 2, 2))
