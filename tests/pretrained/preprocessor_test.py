"""How an exported folder says what is done to images first, and that Transformers does the same."""

import json
import pathlib
import types

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from research import export
from research.configuration import overrides
from research.data import boxes
from research.data.image import CenterCrop, Decode, Normalize, RandomFlip, Resize
from research.pretrained import preprocessor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPS = {
    "shorter side and crop": [Decode(), Resize(40, "bicubic"), CenterCrop(32), Normalize(MEAN, STD)],
    "to one size": [Decode(), Resize((24, 36)), Normalize()],
    "as they are": [Decode(), RandomFlip(), Normalize(MEAN, STD)],
}


def test_every_op_is_told():
    assert preprocessor.describe(OPS["shorter side and crop"], (32, 32, 3)) == {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 40},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }


def test_where_nothing_resizes_the_size_is_that_of_training():
    described = preprocessor.describe([Normalize((0.5,), (0.25,))], (28, 20, 1))
    assert described["size"] == {"height": 28, "width": 20}
    assert (described["image_mean"], described["image_std"]) == ([0.5], [0.25])
    assert not described["do_center_crop"]
    assert not described["do_convert_rgb"]


def test_without_normalisation_there_is_nothing_to_tell():
    assert preprocessor.describe([Decode(), Resize(40)], (40, 40, 3)) is None


DETECTOR = [Decode(), boxes.Resize(40, 60), Normalize(MEAN, STD), boxes.Targets(size=64, max_boxes=3)]


def test_a_detectors_images_keep_their_shape_and_are_padded():
    described = preprocessor.describe(DETECTOR, (64, 64, 3))
    assert described["image_processor_type"] == "DetrImageProcessor"
    assert described["size"] == {"shortest_edge": 40, "longest_edge": 60}
    assert described["pad_size"] == {"height": 64, "width": 64}
    assert not preprocessor.describe([DETECTOR[0], *DETECTOR[2:]], (64, 64, 3))["do_resize"]


def test_an_export_finds_the_ops_of_a_detector():
    config = overrides.load(str(pathlib.Path(__file__).parents[2] / "configs" / "finetune_detection.py") + ":tiny")
    recorded = ConfigDict(json.loads(config.to_json()))  # as a run's config.json has it
    spec = {"image": types.SimpleNamespace(shape=(8, 64, 64, 3))}
    described = export.image_preprocessor(types.SimpleNamespace(spec=spec, config=recorded))
    assert described["size"] == {"shortest_edge": 64, "longest_edge": 64}


@pytest.mark.peers
@pytest.mark.parametrize("shape", [(50, 70), (90, 30), (64, 64)])
def test_transformers_does_the_same_for_detectors(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    stored = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    image = np.asarray(PIL.Image.fromarray(stored).resize(shape[::-1], PIL.Image.Resampling.BICUBIC))
    expected = {"image": image}
    for op in DETECTOR:
        expected = op(expected)
    (tmp_path / preprocessor.FILE).write_text(json.dumps(preprocessor.describe(DETECTOR, (64, 64, 3))))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    found = processor(PIL.Image.fromarray(image), return_tensors="np")
    np.testing.assert_array_equal(found.pixel_mask[0], expected["pixel_mask"])
    assert np.abs(found.pixel_values[0].transpose(1, 2, 0) - expected["image"]).max() <= 2.1 / 255 / min(STD)


@pytest.mark.peers
@pytest.mark.parametrize("name", OPS)
def test_transformers_does_the_same(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    stored = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    image = np.asarray(PIL.Image.fromarray(stored).resize((90, 60), PIL.Image.Resampling.BICUBIC))
    expected = {"image": image}
    for op in OPS[name]:
        expected = op(expected) if not isinstance(op, RandomFlip) else expected
    described = preprocessor.describe(OPS[name], expected["image"].shape)
    (tmp_path / preprocessor.FILE).write_text(json.dumps(described))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    (found,) = processor(PIL.Image.fromarray(image), return_tensors="np").pixel_values
    assert found.shape == expected["image"].transpose(2, 0, 1).shape
    # Resizing rounds to whole grey values in both, not always the same way.
    assert np.abs(found.transpose(1, 2, 0) - expected["image"]).max() <= 2.1 / 255 / min(
        STD if name != "to one size" else (0.5,)
    )
