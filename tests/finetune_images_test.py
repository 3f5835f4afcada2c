"""configs/finetune_images.py on a folder of images: what follows the folder, and what is said once."""

import pathlib

import numpy as np
import PIL.Image
import pytest

from research.configuration import overrides
from research.data import image
from research.errors import UserError
from research.experiment import Experiment

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "finetune_images.py")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for label in ("ant", "bee", "cat", "dog"):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            for i in range(count):
                array = random.integers(0, 256, (40, 50, 3)).astype(np.uint8)
                PIL.Image.fromarray(array).save(tmp_path / "pets" / split / label / f"{i}.jpg")
    return tmp_path / "pets"


def overridden(variant, *changes):
    config = overrides.load(CONFIG + variant)
    overrides.apply(config, [tuple(change.split("=", 1)) for change in changes])
    return config


def test_scratch_follows_its_folder(folder):
    experiment = Experiment(
        overridden(
            ":scratch",
            f"data.source.path={folder}",
            "data.source.held_out=0.25",
            "data.ops[0].size=48",
            "data.ops[3].mean=0.485,0.456,0.406",
            "data.ops[3].std=0.229,0.224,0.225",
        )
    )
    experiment.build()
    assert experiment.label_names == ("ant", "bee", "cat", "dog")
    assert experiment.task.model.num_outputs == 4
    held = experiment.evaluators["test"].data
    assert (len(experiment.data.source), len(held.source)) == (30, 10)
    assert experiment.data.spec["image"].shape == (32, 48, 48, 3)
    example = held.source[0]
    (row,) = held.transform(example)
    assert row["image"].shape == (48, 48, 3)
    for ops in (experiment.data.ops, held.ops):
        assert isinstance(ops[-1], image.Normalize)
        assert ops[-1].mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert held.ops[1].size == (54, 54)


def test_a_split_of_its_own_is_evaluated(folder):
    change = "evals.test.data.source.split=test"
    experiment = Experiment(overridden(":scratch", f"data.source.path={folder}", change, "data.source.held_out=0"))
    assert len(experiment.data.source) == 40
    assert len(experiment.evaluators["test"].data.source) == 12


def test_the_path_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"config.data.source.path: .*needs it"):
        _ = Experiment(overridden(":scratch")).data
