"""What devices exchange in a training step: parameters and their gradients, and never activations."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FAMILIES = {
    "gpt2": ("gpt2.py:tiny",),
    "bert": ("bert_pretraining.py:tiny",),
    "detr": ("detr_coco.py:tiny",),
    "the others": (
        "t5.py:tiny",
        "vit_imagenet.py:tiny",
        "mae_imagenet.py:tiny",
        "dit_imagenet.py:tiny",
        "llama.py:tiny",
    ),
}
MOVES = ("all-gather", "all-to-all", "collective-permute")


def compiled(name: str, axis: str) -> dict:
    """Return the shapes that the compiled step of a config moves over four devices, and those of its parameters.

    And "temporaries", their bytes on a device. The axis "none" compiles for one of the devices.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from research import plan, train
    from research.configuration import overrides
    from research.experiment import Experiment

    config = overrides.load(str(CONFIGS / name))
    config.mesh = {"data": 1, "fsdp": 1, "model": 1} | ({axis: 4} if axis in ("data", "fsdp") else {})
    config.batch_size = 12  # is no other size in these models
    with config.unlocked():
        config.plan = {"vocab_size": 300}
    experiment = Experiment(config, assumed=plan.assume(config), devices=jax.devices()[: 1 if axis == "none" else 4])
    rows = NamedSharding(experiment.mesh, PartitionSpec(("data", "fsdp")))
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for k, x in experiment.spec.items()}
    step = train.jit_step(experiment).lower(experiment.abstract_state, batch).compile()
    text = step.as_text()
    found = {}
    for move in MOVES:
        results = re.findall(rf"= (.*?) {move}(?:-start)?\(", text)
        shapes = [shape for result in results for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
        found[move] = [[int(n) for n in shape.split(",") if n] for shape in shapes]
    found["parameters"] = [x.shape for x in jax.tree.leaves(experiment.abstract_state.params)]
    return found | {"temporaries": step.memory_analysis().temp_size_in_bytes}


def on_four_devices(*arguments: str) -> dict:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_data_parallel_devices_exchange_gradients_alone(family):
    found = on_four_devices("data", *FAMILIES[family])
    for name, moves in found.items():
        # A step of vit_imagenet mixes each image with another one, which may lie on the next device.
        allowed = ("collective-permute",) if name.startswith("vit_imagenet") else ()
        assert {move: moves[move] for move in MOVES if move not in allowed and moves[move]} == {}, name


@pytest.mark.parametrize("name", ["gpt2.py:tiny", "llama.py:tiny"])
def test_fully_sharded_devices_gather_parameters_alone(name):
    moves = on_four_devices("fsdp", name)[name]
    # One layer's parameters or all layers', and the ids of tokens, whose embeddings are split by width.
    sizes = {math.prod(part) for shape in moves["parameters"] for part in (shape, shape[1:])} | {12 * 32}
    assert moves["all-gather"]
    assert [shape for shape in moves["all-gather"] if math.prod(shape) not in sizes] == []
    # A device holds the activations of its own quarter of the batch, and one layer's parameters at a time.
    assert moves["temporaries"] < 0.5 * on_four_devices("none", name)[name]["temporaries"]


if __name__ == "__main__":
    print(json.dumps({name: compiled(name, sys.argv[1]) for name in sys.argv[2:]}))
