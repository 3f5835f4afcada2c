"""The coordinate check of muP (Yang 2022, appendix D.1), on the config whose rules by path are that parametrisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.configuration import overrides
from research.configuration.initial import normal
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
    assert 0.6 < growth["tiny"] < 1.25
    assert growth["standard-tiny"] > 1.5


def test_initial_values_are_those_of_the_paths_alone():
    kernel = jax.ShapeDtypeStruct((200, 300), jnp.float32)
    shapes = {"head": {"kernel": kernel, "bias": jax.ShapeDtypeStruct((5,), jnp.float32)}, "word": kernel}
    rules = (("kernel$", 0.25), ("^head/", 0.0))
    loaded, report = normal(rules, None, shapes)
    assert np.std(loaded["head"]["kernel"]) == pytest.approx(0.25, rel=0.02)
    assert not loaded["head"]["bias"].any()
    assert loaded["word"] is kernel
    assert report.new == report.unused == ()
    np.testing.assert_array_equal(loaded["head"]["kernel"], normal(rules, None, shapes)[0]["head"]["kernel"])
    assert (loaded["head"]["kernel"] != normal(rules, None, shapes, seed=1)[0]["head"]["kernel"]).any()
    with pytest.raises(UserError, match="heda/' finds no parameter"):
        normal((("^heda/", 1.0),), None, shapes)
