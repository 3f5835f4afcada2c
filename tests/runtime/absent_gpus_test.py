"""Training steps compiled for four H100 that are not here; needs the extra "gpu-compiler".

What the kernels compute is tested with them, in interpret mode; here XLA, Triton and the assembler take them all.
"""

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research import plan, train
from research.configuration import overrides
from research.errors import UserError
from research.experiment import Experiment
from research.runtime import absent_gpus

NORMS = ("norm_forward", "norm_backward")
FLASH = ("flash_forward", "flash_by_query", "flash_by_key")
CASES = {
    "gpt2.py": (*NORMS, *FLASH, "cross_entropy"),  # packed rows
    "llama.py:smollm2_135m": (*NORMS, *FLASH, "cross_entropy"),
    "bert_pretraining.py": (*NORMS, *FLASH),  # dropout of attention weights; its logits have a bias
    "t5.py:base": (*NORMS, *FLASH, "flash_by_bias", "cross_entropy"),
    "vit_imagenet.py:h14": (*NORMS, "cudnn"),
    "dit_imagenet.py:b2": ("cudnn",),  # its norms are scaled by example
}
needs_compiler = pytest.mark.skipif(not absent_gpus._installed(), reason='needs the extra "gpu-compiler"')


def shallow(name):
    config = overrides.load(f"configs/{name}")
    config.mesh = {"data": 2, "fsdp": 2, "model": 1}
    for node in plan._nodes_with(config.task.model, "num_layers"):
        node.num_layers = 2
        if "num_decoder_layers" in node:
            node.num_decoder_layers = 2
    return config


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_step_is_compiled_with_its_kernels(name):
    target = plan.find_target("h100x4")
    config = shallow(name)
    experiment = Experiment(config, assumed=plan.assume(config), devices=target.devices)
    rows = NamedSharding(experiment.mesh, P(("data", "fsdp")))
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for k, x in experiment.spec.items()}
    with absent_gpus.assumed_cudnn(target.devices):
        lowered = train.jit_step(experiment).lower(experiment.abstract_state, batch)
    text = lowered.compile().as_text()
    assert [kernel for kernel in CASES[name] if kernel not in text] == []


@needs_compiler
def test_a_step_that_calls_back_to_the_host_is_planned_by_arithmetic(capfd):
    config = shallow("detr_coco.py")
    assert plan.needs(config, plan.find_target("h100x4"))["compiled"] is False
    assert "calls back to the host" in capfd.readouterr().err


def test_what_the_compiler_is_told_is_of_the_model():
    text = absent_gpus._described(absent_gpus.MODELS["h100"], 80e9, 3350e9)
    assert "core_count: 132" in text
    assert "device_memory_size: 80000000000 " in text
    assert absent_gpus.devices("v5p", 8, 1.0, 1.0) is None  # no GPU


def test_without_the_compiler_plans_are_made_by_arithmetic(monkeypatch):
    monkeypatch.setattr(absent_gpus, "_installed", lambda: False)
    assert plan.find_target("h100x8").devices == 8


@needs_compiler
def test_a_description_that_the_compiler_does_not_read_is_one_line(monkeypatch):
    monkeypatch.setattr(absent_gpus, "_described", lambda *_: "this is none")
    with pytest.raises(UserError, match="--topology: h100: "):
        absent_gpus.devices("h100", 8, 80e9, 3350e9)
