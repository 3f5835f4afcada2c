"""Several devices compute what one does: some steps of every kind of vision model, examples and widths split."""

import os
import pathlib
import subprocess
import sys

import flax.traverse_util
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research import sharding, train
from research.configuration import overrides
from research.experiment import Experiment
from research.step import TrainState

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = (
    "finetune_preferences:tiny",
    "vit_imagenet:deit-tiny",
    "mae_fashion_mnist:tiny",
    "detr_garments:tiny",
    "dit_fashion_mnist:tiny",
)
MESH = {"fsdp": 2, "model": 2}
STEPS, RATE = 2, 1e-3
# Optimizers whose state has other shapes than the parameters, and a state that is split where parameters are not.
SETTINGS = {
    "adafactor": ({"direction": {"call": "research.directions.adafactor", "min_dim_size_to_factor": 8}}, MESH),
    "muon": ({"direction": {"call": "research.directions.muon"}}, MESH),
    "zero": ({}, {"data": 4, "shard_optimizer": True}),
}


def train_steps(name, mesh, optimizer=None):
    """Returns the losses of some steps of a config and the parameters that they lead to."""
    experiment = made(name, mesh, optimizer)
    state, step = train.start(experiment), train.jit_step(experiment)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(experiment.abstract_state)):
        assert leaf.sharding == wanted.sharding
    batches, losses = experiment.data.batches(), []
    for _ in range(STEPS):
        state, metrics = step(state, sharding.place(next(batches), experiment.mesh))
        losses.append(float(metrics["loss"].compute()))
    params = flax.traverse_util.flatten_dict(jax.device_get(state.params), sep="/")
    return params | {"losses": np.array(losses)}


def made(name, mesh, optimizer=None):
    file, variant = name.split(":")
    config = overrides.load(f"{CONFIGS / file}.py:{variant}")
    config.mesh = mesh
    config.optimizer.learning_rate = RATE
    with config.unlocked():
        config.optimizer.update(optimizer or {})
    experiment = Experiment(config)
    experiment.build()
    return experiment


def on_four_devices(folder, name):
    """Runs this file in a process with four devices, which writes what it computed."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, __file__, str(folder), name]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "found.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_four_devices_compute_what_one_does(name, tmp_path):
    expected, found = train_steps(name, {"data": 1}), on_four_devices(tmp_path, name)
    np.testing.assert_allclose(found.pop("losses"), expected.pop("losses"), rtol=1e-5)
    assert set(found) == set(expected)
    for path, values in expected.items():
        # A key's bias changes no attention weight: its gradient is rounding, which Adam makes steps of.
        tolerance = 2 * STEPS * RATE if path.endswith("key/bias") else 1e-4
        np.testing.assert_allclose(found[path], values, rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_state_of_an_optimizer_is_split_and_computes_the_same(setting, tmp_path):
    expected = train_steps("vit_imagenet:deit-tiny", {"data": 1}, SETTINGS[setting][0])
    found = on_four_devices(tmp_path, setting)
    np.testing.assert_allclose(found.pop("losses"), expected.pop("losses"), rtol=1e-5)
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, rtol=0, atol=2e-4, err_msg=path)


def test_what_an_optimizer_keeps_is_split_as_its_parameter_is():
    mesh = jax.sharding.AbstractMesh((2, 4, 2), sharding.AXES)
    shape = jax.ShapeDtypeStruct
    params = {"layers": {"up": {"kernel": shape((3, 8, 16), "float32"), "bias": shape((3, 16), "float32")}}}
    rows = {"layers": {"up": {"kernel": shape((3, 8), "float32"), "bias": shape((1,), "float32")}}}
    columns = {"layers": {"up": {"kernel": shape((3, 16), "float32"), "bias": shape((1,), "float32")}}}
    opt_state = {"mu": params, "v_row": rows, "v_col": columns, "count": shape((), "int32")}
    state = TrainState(shape((), "int32"), params, opt_state, shape((2,), "uint32"))

    def specs(**options):
        found = sharding.state_shardings(state, mesh, **options).opt_state
        kernels = {key: found[key]["layers"]["up"]["kernel"].spec for key in ("mu", "v_row", "v_col")}
        return kernels | {"count": found["count"].spec, "bias": found["mu"]["layers"]["up"]["bias"].spec}

    assert specs() == {
        "mu": P(None, "fsdp", "model"),
        "v_row": P(None, "fsdp"),
        "v_col": P(None, "model"),
        "count": P(),
        "bias": P(None, None),
    }
    assert specs(shard_optimizer=True)["bias"] == P(None, "data")


if __name__ == "__main__":
    folder, name = sys.argv[1:]
    section, mesh = SETTINGS.get(name, ({}, MESH))
    config_name = "vit_imagenet:deit-tiny" if name in SETTINGS else name
    np.savez(pathlib.Path(folder) / "found.npz", **train_steps(config_name, mesh, section))
