"""Several devices compute what one does: some steps of every kind of vision model, examples and widths split."""

import os
import pathlib
import subprocess
import sys

import flax.traverse_util
import jax
import numpy as np
import pytest

from research import sharding, train
from research.configuration import overrides
from research.experiment import Experiment

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = ("vit_imagenet:deit-tiny", "mae_fashion_mnist:tiny", "detr_garments:tiny", "dit_fashion_mnist:tiny")
MESH = {"fsdp": 2, "model": 2}
STEPS = 2


def train_steps(name, mesh):
    """Returns the losses of some steps of a config and the parameters that they lead to."""
    file, variant = name.split(":")
    config = overrides.load(f"{CONFIGS / file}.py:{variant}")
    config.mesh = mesh
    config.optimizer.learning_rate = 1e-3
    experiment = Experiment(config)
    experiment.build()
    state, step = train.start(experiment), train.jit_step(experiment)
    batches, losses = experiment.data.batches(), []
    for _ in range(STEPS):
        state, metrics = step(state, sharding.place(next(batches), experiment.mesh, experiment.data.padding))
        losses.append(float(metrics["loss"].compute()))
    params = flax.traverse_util.flatten_dict(jax.device_get(state.params), sep="/")
    return params | {"losses": np.array(losses)}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """What four devices computed, in a process of their own, config by config."""
    folder = tmp_path_factory.mktemp("split")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_four_devices_compute_what_one_does(name, split):
    expected, found = train_steps(name, {"data": 1}), dict(np.load(split / f"{name}.npz"))
    np.testing.assert_allclose(found.pop("losses"), expected.pop("losses"), rtol=1e-5)
    assert set(found) == set(expected)
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, rtol=0, atol=1e-4, err_msg=path)


if __name__ == "__main__":
    for config_name in NAMES:
        np.savez(pathlib.Path(sys.argv[1]) / f"{config_name}.npz", **train_steps(config_name, MESH))
