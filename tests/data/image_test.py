"""Images: what files become, where crops lie, what augmentation changes and what it leaves, and what stays random."""

import io
import itertools
import json
import math

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import pytest

from research.data import augmentation, image
from research.data.dataset import Dataset
from research.data.source import examples
from research.errors import UserError


def encoded(array, kind="PNG", mode=None, **options):
    picture = PIL.Image.fromarray(array)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height, width, channels=3):
    """Returns an image that JPEG hardly changes, every part of it different."""
    row, column = np.mgrid[:height, :width]
    waves = [128 + 60 * np.sin(row / (9 + c)) + 60 * np.cos(column / (13 - c)) for c in range(channels)]
    return np.stack(waves, -1).clip(0, 255).astype(np.uint8)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


def apply(op, array, seed=0):
    return op({"image": array, "label": 3}, rng(seed))["image"]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
def test_files_paths_and_arrays_are_the_same(shape, tmp_path):
    array = noise(20, 30, 3)[..., 0] if len(shape) == 2 else noise(*shape)
    content = encoded(array)
    (tmp_path / "x.png").write_bytes(content)
    channels = 1 if len(shape) == 2 else 3
    for value in (content, str(tmp_path / "x.png"), array):
        found = image.Decode(channels)({"image": value, "label": 1})
        assert found["label"] == 1
        np.testing.assert_array_equal(found["image"], array.reshape(20, 30, channels))


def test_modes():
    colour, grey = noise(8, 8), noise(8, 8)[..., 0]
    as_grey = np.asarray(PIL.Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(image.decode(encoded(colour), 1)[..., 0], as_grey)
    np.testing.assert_array_equal(image.decode(encoded(grey), 3), np.stack([grey] * 3, -1))
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    for kind, mode in (("PNG", None), ("GIF", None), ("JPEG", "CMYK"), ("BMP", None), ("WEBP", None), ("TIFF", "CMYK")):
        found = image.decode(encoded(flat, kind, mode), 3).astype(int)
        assert abs(found - flat).max() <= 12, (kind, mode)
        assert abs(image.decode(encoded(flat, kind, mode), 1).astype(int) - 94).max() <= 12, (kind, mode)
    palette = PIL.Image.fromarray(flat).quantize(4)
    palette.save(buffer := io.BytesIO(), "PNG")
    np.testing.assert_array_equal(image.decode(buffer.getvalue(), 3), flat)
    on = np.zeros((8, 8), bool)
    on[2:4] = True
    assert set(image.decode(encoded(on), 1).ravel()) == {0, 255}


def test_what_is_transparent_is_white():
    array = np.zeros((4, 4, 4), np.uint8)
    array[..., 0], array[0, :, 3], array[1, :, 3] = 100, 255, 128
    for value in (array, encoded(array)):
        found = image.decode(value, 3)
        np.testing.assert_array_equal(found[0], [[100, 0, 0]] * 4)
        assert abs(found[1].astype(int) - [178, 127, 127]).max() <= 1
        assert (found[2:] == 255).all()
        assert (image.decode(value, 1)[2:] == 255).all()
    palette = PIL.Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(buffer := io.BytesIO(), "PNG", transparency=1)
    np.testing.assert_array_equal(image.decode(buffer.getvalue(), 3), [[[10, 20, 30], [255, 255, 255]]])


def test_sixteen_bits_keep_their_range():
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024).astype(np.uint16)
    np.testing.assert_array_equal(image.decode(encoded(deep), 1)[..., 0], deep >> 8)
    with pytest.raises(UserError, match=r"'x.tif' cannot be decoded: its pixels are of mode 'F'"):
        image.decode(encoded(deep.astype(np.float32), "TIFF"), 1, "x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, kind):
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24, :16], upright[:24, 16:], upright[24:, :16] = 250, 160, 80
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    stored = PIL.Image.fromarray(upright)
    stored = stored.transpose(image.TURNS[undo]) if orientation > 1 else stored
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    content = encoded(np.asarray(stored), kind, exif=exif, **{"quality": 95} if kind != "PNG" else {})
    found = image.decode(content, 3).astype(int)
    assert found.shape == upright.shape
    assert abs(found - upright).mean() < 2
    whole = image.DecodeRandomResizedCrop((48, 32), (1, 1), (2 / 3, 2 / 3))
    assert abs(whole({"image": content}, rng())["image"].astype(int) - upright).mean() < 2


def test_notes_that_cannot_be_read_are_no_matter():
    content = encoded(smooth(16, 16), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert image.decode(content, 3).shape == (16, 16, 3)


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_means_none_turns_neither_the_image_nor_its_window(orientation):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    content = encoded(smooth(30, 60), "JPEG", exif=exif)
    plain = image.decode(encoded(smooth(30, 60), "JPEG"), 3)
    np.testing.assert_array_equal(image.decode(content, 3), plain)
    whole = image.DecodeRandomResizedCrop((30, 60), (1, 1), (2, 2))({"image": content}, rng())
    np.testing.assert_array_equal(whole["image"], plain)


@pytest.fixture(params=[False, True], ids=["", "allowed_elsewhere"])
def truncated_images_allowed(request, monkeypatch):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)  # TFDS does so


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.usefixtures("truncated_images_allowed")
def test_a_truncated_file_is_named(kind, share, tmp_path):
    content = encoded(noise(64, 64), kind)
    broken = tmp_path / "broken.x"
    broken.write_bytes(content[: int(share * len(content))])
    for op in (image.Decode(), image.DecodeRandomResizedCrop(16)):
        with pytest.raises(UserError, match=r"^'.*broken.x' cannot be decoded: ") as info:
            op({"image": str(broken)}, *[rng()] * isinstance(op, image.DecodeRandomResizedCrop))
        assert "\n" not in str(info.value)


def test_what_is_no_image_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^'a/b.jpg' cannot be decoded: it is no image of a known format$"):
        image.Decode()({"image": b"<html>", "file_name": "a/b.jpg"})
    with pytest.raises(UserError, match=r"^there is no image file 'nowhere.jpg'$"):
        image.Decode()({"image": "nowhere.jpg"})
    with pytest.raises(UserError, match=r"^'7' is int, neither a path nor a file's bytes$"):
        image.Decode()({"image": 3, "image_id": 7})
    with pytest.raises(UserError, match=r"^an image is float32 \[2, 2, 3\], not uint8"):
        image.Decode()({"image": np.zeros((2, 2, 3), np.float32)})
    with pytest.raises(UserError, match=r"no image 'image'; did you mean 'imag'"):
        image.Decode()({"imag": b""})
    with pytest.raises(UserError, match="channels: 2"):
        image.Decode(channels=2)


def test_a_large_jpeg_may_be_decoded_small():
    array = smooth(480, 640)
    content = encoded(array, "JPEG", quality=95)
    assert image.decode(content, 3).shape == (480, 640, 3)
    assert image.decode(content, 3, min_side=241).shape == (480, 640, 3)
    assert image.decode(content, 3, min_side=240).shape == (240, 320, 3)
    assert image.decode(content, 3, min_side=60).shape == (60, 80, 3)
    assert image.decode(encoded(array), 3, min_side=60).shape == (480, 640, 3)  # PNG knows no such thing
    exact = image.resize(image.decode(content, 3), (60, 80)).astype(int)
    assert abs(image.resize(image.decode(content, 3, min_side=120), (60, 80)) - exact).mean() < 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_and_cropping_at_once_is_both_in_turn(kind, channels):
    content = encoded(smooth(480, 640), kind)
    for seed, size in itertools.product(range(5), (16, 40, 224)):
        both = image.RandomResizedCrop(size)(image.Decode(channels)({"image": content}), rng(seed))["image"]
        at_once = image.DecodeRandomResizedCrop(size, channels=channels)({"image": content}, rng(seed))["image"]
        assert at_once.shape == (size, size, channels)
        difference = abs(at_once.astype(int) - both).mean()
        assert difference < (1.5 if kind == "JPEG" else 0.01), (seed, size)
    array = noise(30, 30)
    both = image.RandomResizedCrop(8)({"image": array}, rng())["image"]
    np.testing.assert_array_equal(image.DecodeRandomResizedCrop(8)({"image": array}, rng())["image"], both)


# --- where to look --------------------------------------------------------------------------------


def test_windows_have_the_areas_ratios_and_places_they_should():
    crop, random, height, width = image.RandomResizedCrop(8), rng(), 300, 400
    windows = np.array([crop.window(height, width, random) for _ in range(4000)])
    left, top, right, bottom = windows.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= width
    assert bottom.max() <= height
    area, ratio = (right - left) * (bottom - top) / (height * width), (right - left) / (bottom - top)
    assert area.min() > 0.075
    assert area.max() <= 1
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.35
    assert abs(np.log(ratio[area < 0.3]).mean()) < 0.02  # where every ratio fits
    assert np.mean(area < 0.3) / np.mean((area > 0.3) & (area < 0.52)) == pytest.approx(1, abs=0.1)
    centre = (left + right) / 2 / width
    assert centre.mean() == pytest.approx(0.5, abs=0.01)
    assert centre[area < 0.15].std() > 0.17


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1), (1, 300)])
def test_windows_of_narrow_images_are_their_middle(height, width):
    left, top, right, bottom = image.RandomResizedCrop(8, area=(0.9, 1)).window(height, width, rng())
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert abs(left + right - width) <= 1
    assert abs(top + bottom - height) <= 1
    assert right - left == min(width, round(height * 4 / 3))
    assert bottom - top == min(height, round(width * 4 / 3))


def test_a_crop_shows_its_window():
    array = smooth(90, 120)
    crop = image.RandomResizedCrop((20, 30))
    left, top, right, bottom = crop.window(90, 120, rng(4))
    part = PIL.Image.fromarray(array[top:bottom, left:right]).resize((30, 20), PIL.Image.Resampling.BILINEAR)
    difference = abs(apply(crop, array, 4).astype(int) - np.asarray(part))
    assert difference[1:-1, 1:-1].max() <= 2  # at the edges the filter sees beyond the window
    whole = image.RandomResizedCrop((90, 120), (1, 1), (4 / 3, 4 / 3))
    np.testing.assert_array_equal(apply(whole, array), array)
    cubic = image.RandomResizedCrop((20, 30), interpolation="bicubic")
    assert (apply(cubic, array, 4) != apply(crop, array, 4)).any()


@pytest.mark.parametrize(
    ("size", "shape", "wanted"),
    [(32, (64, 96), (32, 48)), (32, (96, 64), (48, 32)), (32, (50, 77), (32, 49)), ((10, 20), (64, 96), (10, 20))],
)
def test_resize(size, shape, wanted):
    array = smooth(*shape)
    found = image.Resize(size)({"image": array})["image"]
    assert found.shape == (*wanted, 3)
    assert found.mean() == pytest.approx(array.mean(), abs=1)
    same = image.Resize(wanted)({"image": found})["image"]
    np.testing.assert_array_equal(same, found)
    assert image.Resize(size)({"image": array[..., :1]})["image"].shape == (*wanted, 1)


def test_center_crop():
    array = noise(9, 12)
    np.testing.assert_array_equal(image.CenterCrop((3, 4))({"image": array})["image"], array[3:6, 4:8])
    np.testing.assert_array_equal(image.CenterCrop(9)({"image": array})["image"], array[:, 2:11])
    with pytest.raises(UserError, match=r"^'a.jpg' of 9 x 12 pixels is smaller than 10 x 10; resize it first$"):
        image.CenterCrop(10)({"image": array, "file_name": "a.jpg"})


def test_random_crop_finds_every_place_and_shows_what_is_there():
    array = np.arange(1, 26, dtype=np.uint8).reshape(5, 5, 1)
    padded = np.pad(array[..., 0], 2, constant_values=77)
    crop, random, seen = image.RandomCrop(5, padding=2, fill=77), rng(), set()
    for _ in range(400):
        found = crop({"image": array}, random)["image"][..., 0]
        (place,) = [(i, j) for i in range(5) for j in range(5) if (padded[i : i + 5, j : j + 5] == found).all()]
        seen.add(place)
    assert len(seen) == 25
    with pytest.raises(UserError, match="smaller than 8 x 8"):
        apply(image.RandomCrop(8, padding=1), array)


def test_half_are_mirrored():
    array, random = noise(4, 6), rng()
    for kind in (array, array[..., :1], array.astype(np.float32)):
        found = [apply(image.RandomFlip(), kind, seed) for seed in range(9)]
        assert {(x == kind).all() or (x == kind[:, ::-1]).all() for x in found} == {True}
        assert {(x.dtype, x.shape) for x in found} == {(kind.dtype, kind.shape)}
    mirrored = [(image.RandomFlip()({"image": array}, random)["image"] != array).any() for _ in range(1000)]
    assert 430 < sum(mirrored) < 570
    flipped = next(x for seed in range(9) if ((x := apply(image.RandomFlip(), array, seed)) != array).any())
    np.testing.assert_array_equal(flipped[:, ::-1], array)


# --- how it looks ---------------------------------------------------------------------------------

NO_MAGNITUDE = ("auto_contrast", "equalize")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", augmentation.AUGMENTATIONS)
def test_augmentations(name, channels):
    array = smooth(40, 60, channels) // 2 + noise(40, 60, channels) // 8 + 50
    picture = image.picture_of(array)

    def change(strength):
        found = image.array_of(augmentation.AUGMENTATIONS[name](picture, strength))
        assert found.shape == array.shape
        assert found.dtype == np.uint8
        return found.astype(int)

    changes = [abs(change(x) - array).mean() for x in (0, 0.5, 1)]
    if name not in NO_MAGNITUDE:
        assert changes[0] == 0
    if name == "identity" or (name == "color" and channels == 1):
        assert changes[2] == 0
    elif name not in NO_MAGNITUDE:
        assert 0 < changes[1] < changes[2]
        assert (change(-1) != change(1)).any() == (name not in ("solarize", "posterize"))


def test_augmentations_do_what_they_are_called():
    array = smooth(40, 60)
    picture = image.picture_of(array)
    changed = {name: image.array_of(op(picture, 1.0)) for name, op in augmentation.AUGMENTATIONS.items()}
    np.testing.assert_array_equal(changed["solarize"], 255 - array)
    np.testing.assert_array_equal(changed["posterize"], array & 0xF0)
    np.testing.assert_array_equal(changed["brightness"], (array * 1.9).clip(0, 255).astype(np.uint8))
    np.testing.assert_array_equal(changed["translate_x"][:, :-27], array[:, 27:])
    np.testing.assert_array_equal(changed["translate_y"][:-18], array[18:])
    assert (changed["translate_x"][:, -26:] == 128).all()
    assert (changed["rotate"][0, 0] == 128).all()
    np.testing.assert_array_equal(changed["shear_x"][0], array[0])
    np.testing.assert_array_equal(changed["shear_y"][:, 0], array[:, 0])
    assert (changed["auto_contrast"].min(), changed["auto_contrast"].max()) == (0, 255)
    assert changed["contrast"].std() > array.std()


def test_rand_augment_draws_all_and_keeps_the_size(monkeypatch):
    calls = []
    spies = {name: lambda x, s, name=name: calls.append((name, s)) or x for name in augmentation.AUGMENTATIONS}
    monkeypatch.setattr(augmentation, "AUGMENTATIONS", spies)
    array, random = noise(8, 8), rng()
    for _ in range(700):
        np.testing.assert_array_equal(augmentation.RandAugment(2, 5)({"image": array}, random)["image"], array)
    assert len(calls) == 1400
    counts = {name: sum(n == name for n, _ in calls) for name in spies}
    assert min(counts.values()) > 65  # of 100
    assert {s for _, s in calls} == {-0.5, 0.5}
    assert 600 < sum(s > 0 for _, s in calls) < 800


def test_rand_augment_at_magnitude_0_changes_no_more_than_contrast():
    full = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)  # equalised, and of full contrast already
    for seed in range(60):
        np.testing.assert_array_equal(apply(augmentation.RandAugment(3, 0), full, seed), full)


def test_color_jitter():
    array = smooth(20, 20) // 2
    np.testing.assert_array_equal(apply(augmentation.ColorJitter(), array), array)
    brighter = [
        apply(augmentation.ColorJitter(brightness=0.5), array, seed).mean() / array.mean() for seed in range(200)
    ]
    assert min(brighter) == pytest.approx(0.5, abs=0.03)
    assert 1.35 < max(brighter) <= 1.5
    assert np.mean(brighter) == pytest.approx(1, abs=0.06)
    grey = noise(8, 8, 1)
    np.testing.assert_array_equal(apply(augmentation.ColorJitter(saturation=1, hue=0.5), grey), grey)
    for seed in range(5):  # hue moves colours on their circle, and leaves how bright they are
        turned = apply(augmentation.ColorJitter(hue=0.5), array, seed)
        assert abs(turned.max(-1).astype(int) - array.max(-1)).max() <= 1
    red = PIL.Image.new("RGB", (1, 1), (255, 0, 0))
    assert np.asarray(augmentation.turn_hue(red, 1 / 3))[0, 0].argmax() == 1
    assert np.asarray(augmentation.turn_hue(red, -1 / 3))[0, 0].argmax() == 2


def test_random_erasing():
    array, random, op = np.full((40, 50, 3), 7, np.uint8), rng(), augmentation.RandomErasing(0.25)
    erased, shares = 0, []
    for _ in range(800):
        found = op({"image": array}, random)["image"]
        hole = (found != 7).any(-1)
        if not hole.any():
            continue
        erased += 1
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        inside = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95  # one window
        shares.append(inside[..., 0].size / hole.size)
        if inside.size > 300:
            assert inside.mean() == pytest.approx(127.5, abs=25)
    assert 150 < erased < 250
    assert 0.01 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.36
    assert (array == 7).all()  # the example's own is left alone
    assert (apply(augmentation.RandomErasing(0.0), array) == 7).all()
    with pytest.raises(UserError, match="RandomErasing comes before Normalize"):
        apply(augmentation.RandomErasing(), array.astype(np.float32))


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_normalize(mean, std):
    array = noise(7, 9)
    found = image.Normalize(mean, std)({"image": array})["image"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (array / 255 - np.array(mean)) / np.array(std), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: image.Normalize((0.5,), (0.0,)), "std: "),
        (lambda: image.Normalize((0.1, 0.2, 0.3))({"image": noise(4, 4, 1)}), "uint8 of 3 channels, not uint8 of 1"),
        (lambda: image.RandomResizedCrop(0), "size: 0 is neither"),
        (lambda: image.RandomResizedCrop((1, 2, 3)), "size: "),
        (lambda: image.RandomResizedCrop(8, area=(0.5, 2)), "area: "),
        (lambda: image.RandomResizedCrop(8, ratio=(2, 1)), "ratio: "),
        (lambda: image.Resize(8, "cubic"), "interpolation: no 'cubic'; did you mean 'bicubic'"),
        (lambda: augmentation.RandAugment(2, 11), "magnitude: 2 and 11"),
        (lambda: augmentation.ColorJitter(hue=0.6), r"hue lies in \[0, 0.5\]"),
        (lambda: augmentation.RandomErasing(1.5), "probability: 1.5"),
    ],
)
def test_settings_that_are_wrong(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --- in batches -----------------------------------------------------------------------------------

AUGMENT = (
    image.DecodeRandomResizedCrop(16),
    image.RandomFlip(),
    augmentation.RandAugment(2, 10),
    augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1),
    augmentation.RandomErasing(0.5),
    image.RandomCrop(16, padding=2),
    image.Normalize(),
)


def make_dataset(seed=0):
    records = [{"image": encoded(noise(24, 32, seed=i), "JPEG"), "label": i} for i in range(10)]
    return Dataset(examples(records), ("image", "label"), AUGMENT, batch_size=4, seed=seed)


def first(batches, count):
    return [(batch["label"].tolist(), batch["image"].copy()) for batch in itertools.islice(batches, count)]


def same(a, b):
    return all(x[0] == y[0] and (x[1] == y[1]).all() for x, y in zip(a, b, strict=True))


def test_what_is_drawn_is_a_function_of_seed_and_position():
    whole = first(make_dataset().batches(), 8)
    assert whole[0][1].shape == (4, 16, 16, 3)
    assert same(whole, first(make_dataset().batches(), 8))
    assert not same(whole, first(make_dataset(1).batches(), 8))
    by_label = {}
    for labels, images in whole:
        for label, array in zip(labels, images):
            by_label.setdefault(label, []).append(array)
    assert all((a != b).any() for arrays in by_label.values() for a, b in itertools.combinations(arrays, 2))
    batches = make_dataset().batches()
    first(batches, 3)
    state = json.loads(json.dumps(batches.get_state()))
    restored = make_dataset().batches()
    restored.set_state(state)
    assert same(first(restored, 5), whole[3:])


@pytest.mark.parametrize("op", AUGMENT[:-1], ids=lambda op: type(op).__name__)
def test_every_op_is_repeated_by_its_generator_and_leaves_the_rest(op):
    example = {"image": noise(16, 16), "label": 3, "file_name": "x"}
    for seed in range(5):
        once, again = op(dict(example), rng(seed)), op(dict(example), rng(seed))
        np.testing.assert_array_equal(once["image"], again["image"])
        assert {k: v for k, v in once.items() if k != "image"} == {"label": 3, "file_name": "x"}
    np.testing.assert_array_equal(example["image"], noise(16, 16))


def test_a_broken_image_ends_training_by_name():
    records = [{"image": encoded(noise(8, 8)), "label": 0, "file_name": f"{i}.png"} for i in range(4)]
    records[2]["image"] = records[2]["image"][:100]
    dataset = Dataset(examples(records), ("image",), (image.Decode(), image.Normalize()), batch_size=2)
    with pytest.raises(UserError, match=r"'2.png' cannot be decoded"):
        list(itertools.islice(dataset.batches(), 4))


def test_images_of_several_sizes_make_no_batch():
    records = [{"image": noise(8, 8)}, {"image": noise(8, 9)}]
    dataset = Dataset(examples(records), ("image",), (image.Decode(), image.Normalize()), batch_size=2)
    with pytest.raises(UserError, match=r"'image' of one shape, not of \[8, 8, 3\] and \[8, 9, 3\]; resize or crop"):
        next(dataset.epoch())


# --- against torchvision --------------------------------------------------------------------------


@pytest.mark.peers
def test_operations_are_those_of_torchvision():
    pytest.importorskip("torchvision")
    from torchvision.transforms import functional as F
    from torchvision.transforms.autoaugment import _apply_op

    array = smooth(40, 60)
    picture = PIL.Image.fromarray(array)
    nearest = F.InterpolationMode.NEAREST
    theirs = {
        "auto_contrast": ("AutoContrast", 0),
        "equalize": ("Equalize", 0),
        "rotate": ("Rotate", 30.0),
        "solarize": ("Solarize", 0),
        "posterize": ("Posterize", 4),
        "color": ("Color", 0.9),
        "contrast": ("Contrast", 0.9),
        "brightness": ("Brightness", 0.9),
        "sharpness": ("Sharpness", 0.9),
        "shear_x": ("ShearX", 0.3),
        "shear_y": ("ShearY", 0.3),
        "translate_x": ("TranslateX", -27),
        "translate_y": ("TranslateY", -18),
    }
    for name, (op, magnitude) in theirs.items():
        expected = np.asarray(_apply_op(picture, op, magnitude, nearest, [128.0] * 3))
        np.testing.assert_array_equal(np.asarray(augmentation.AUGMENTATIONS[name](picture, 1.0)), expected, name)
    for share in (-0.4, 0.1, 0.3):
        expected = np.asarray(F.adjust_hue(picture, share))
        np.testing.assert_array_equal(np.asarray(augmentation.turn_hue(picture, share)), expected)
    for size in (16, 33, 80):
        expected = np.asarray(F.resize(picture, size))
        np.testing.assert_array_equal(image.Resize(size)({"image": array})["image"], expected)
    for size in ((7, 9), (40, 31), (39, 60)):
        expected = np.asarray(F.center_crop(picture, size))
        np.testing.assert_array_equal(image.CenterCrop(size)({"image": array})["image"], expected)
    assert math.isclose(np.asarray(F.to_tensor(picture)).max() * 255, array.max(), rel_tol=1e-6)
