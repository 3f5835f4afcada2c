"""The coordinate check of muP (Yang 2022, appendix D.1), on the config whose rules by path are that parametrisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.configuration import overrides
from research.configuration.initial import zeros
from research.errors import UserError
from research.experiment import Experiment
from research.step import train_step


def change(variant, width):
    """Returns the root mean square of what four steps change of the logits."""
    config = overrides.load(f"configs/mup.py:{variant}")
    config.task.model.hidden_size = width
    config.task.model.vocab_size = 260
    config.optimizer.learning_rate = 0.02
    experiment = Experiment(config, assumed={"num_steps": 4, "label_names": (), "spec": SPEC})
    state = jax.jit(experiment.init_state)(experiment.pretrained())
    step = jax.jit(functools.partial(train_step, experiment.task, experiment.optimizer))
    ids = np.random.default_rng(0).integers(0, 260, (8, 17)).astype(np.int32)
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "target_mask": np.ones((8, 16), np.float32)}
    batch |= {"mask": np.ones(8, np.float32)}
    logits = jax.jit(lambda params: experiment.task.model.apply({"params": params}, ids[:, :-1]))
    before = logits(state.params)
    for _ in range(4):
        state, _ = step(state, batch)
    return float(jnp.sqrt(jnp.mean((logits(state.params) - before) ** 2)))


SPEC = {
    "input_ids": {"shape": [8, 16], "dtype": "int32"},
    "targets": {"shape": [8, 16], "dtype": "int32"},
    "target_mask": {"shape": [8, 16], "dtype": "float32"},
    "mask": {"shape": [8], "dtype": "float32"},
}


def test_updates_are_as_large_at_any_width_in_mup_and_grow_in_standard_parametrisation():
    growth = {variant: change(variant, 256) / change(variant, 64) for variant in ("tiny", "standard-tiny")}
    assert 0.8 < growth["tiny"] < 1.25
    assert growth["standard-tiny"] > 2


def test_zeros_are_those_of_the_paths_alone():
    shapes = {"head": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, "word": jax.ShapeDtypeStruct((5,), "f4")}
    loaded, report = zeros(("^head/",), None, shapes)
    assert not loaded["head"]["kernel"].any()
    assert loaded["word"] is shapes["word"]
    assert report.new == report.unused == ()
    with pytest.raises(UserError, match="heda/' finds no parameter"):
        zeros(("^heda/",), None, shapes)
