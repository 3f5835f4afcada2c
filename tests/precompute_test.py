"""What is computed ahead of training equals what a step would have computed, whenever and wherever it comes from."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import evaluate, plan, precompute, predict, prepare, sharding, train
from research.configuration import overrides
from research.data import tokenizer
from research.errors import UserError
from research.experiment import Experiment
from research.models import gpt
from research.pretrained import huggingface
from research.reporting import figures
from research.runtime.preemption import PreemptedError

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "finetune_preferences.py"
NAMES = ("reference_likelihood", "rejected_reference_likelihood")
STEPS, RATE = 3, 1e-3
DECODER = gpt.Decoder(260, 16, 1, 2, intermediate_size=32, max_positions=128, initializer_range=0.1)


@pytest.fixture(autouse=True, scope="module")
def _no_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "curves", lambda *_, **__: None)  # they take longer to draw than all else
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def publish(folder: pathlib.Path, seed: int) -> str:
    params = jax.jit(DECODER.init)(jax.random.key(seed), np.zeros((1, 4), np.int32))["params"]
    files = tokenizer.byte_level().save(folder.parent / "tokenizer")
    return str(huggingface.save(folder, DECODER, params, tokenizer_files=files))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    return publish(tmp_path_factory.mktemp("published") / "model", 7)


def configured(path=None, ahead=True, objective="dpo"):
    """Of the 12 pairs of the recipe, 2 are too long for an answer and are dropped, and 3 are evaluated on."""
    config = overrides.load(f"{CONFIG}:tiny")
    config.num_steps = STEPS
    config.task.update(objective=objective, precompute_reference=ahead)
    config.optimizer.learning_rate = RATE
    config.log.update(every_steps=1, evaluate_every_steps=STEPS)
    config.checkpoint.every_steps = STEPS
    if path:
        config.task.model = {"call": "research.pretrained.huggingface.load_model", "path": path, "kind": "causal_lm"}
        config.init = {"path": path}
    config = config.copy_and_resolve_references()
    records = config.data.source.records
    for record in records[5:7]:
        record["prompt"] = "long " * 30
    config.data.length_buckets = 2
    config.evals.test.data.source.records = [dict(record) for record in records[:3]]
    return config


def with_lora(config):
    config.task = {"call": "research.tasks.lora.LoRA", "task": config.task, "targets": ["kernel$"], "rank": 4}
    config.optimizer.freeze = ("^base/",)
    return config


def train_steps(config):
    """Returns the losses of some steps, the parameters that they lead to and what these are evaluated at."""
    experiment = Experiment(config)
    experiment.build()
    data, evaluators = precompute.ready(experiment)
    state, step, losses = train.start(experiment), train.jit_step(experiment), []
    for _, batch in zip(range(STEPS), data.batches()):
        state, metrics = step(state, sharding.place(batch, experiment.mesh))
        losses.append(float(metrics["loss"].compute()))
    metrics, _ = evaluate.scores(evaluators, experiment.merged(state.params))
    flat = flax.traverse_util.flatten_dict(jax.device_get(state.params), sep="/")
    return np.array(losses), flat, metrics


def assert_close(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for path, values in found[1].items():
        # A key's bias changes no attention weight: its gradient is rounding, which Adam makes steps of.
        tolerance = 2 * STEPS * RATE if path.endswith("key/bias") else 1e-4
        np.testing.assert_allclose(values, expected[1][path], rtol=0, atol=tolerance, err_msg=path)
    assert found[2] == pytest.approx(expected[2], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_training_is_that_with_a_reference_that_is_held(objective, published):
    held = train_steps(configured(published, False, objective))
    found = train_steps(configured(published, True, objective))
    assert any(path.startswith("reference/") for path in held[1])
    assert set(found[1]) == {path for path in held[1] if not path.startswith("reference/")}
    assert len(set(held[0])) == STEPS  # it trains
    assert_close(found, held)


@pytest.mark.slow
def test_two_devices_compute_what_one_does(tmp_path, cache):
    expected = train_steps(configured())
    shutil.rmtree(cache)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as stored:
        params = {path: stored[path] for path in expected[1]}
        assert_close((stored["losses"], params, json.loads(str(stored["metrics"]))), expected)


def test_the_numbers_are_the_sums_over_the_answers_tokens(published):
    experiment = Experiment(configured(published))
    data, evaluators = precompute.ready(experiment)
    params = huggingface.load_params(published, DECODER, jax.eval_shape(experiment.start_params))[0]
    seen = []
    for every in (data, evaluators["test"].data):
        for batch in every.epoch():
            for prefix, name in zip(("", "rejected_"), NAMES):
                rows = (batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"])
                log_p = np.asarray(jax.nn.log_softmax(DECODER.apply({"params": params}, *rows)))
                log_p = np.take_along_axis(log_p, batch[f"{prefix}targets"][..., None], 2)[..., 0]
                wanted = (log_p * batch[f"{prefix}target_mask"]).sum(1)
                real = batch["mask"] > 0
                assert batch[name].dtype == np.float32
                np.testing.assert_allclose(batch[name][real], wanted[real], rtol=1e-5)
            seen.append(int(batch["mask"].sum()))
    assert sum(seen) == 10 + 3


@pytest.fixture
def computed(monkeypatch):
    """What is computed while the test runs: the names of the data."""
    names, own = [], precompute._computed

    def note(experiment, passing, params, name, *rest):
        names.append(name)
        return own(experiment, passing, params, name, *rest)

    monkeypatch.setattr(precompute, "_computed", note)
    return names


def history(folder):
    """Returns what a run wrote of each step, but for how long it took."""
    kept = ("train/loss", "train/margin", "train/chosen_reward", "test/loss", "test/margin")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", *kept) if name in row} for row in rows]


def final_params(config, folder):
    _, params = evaluate.restore_params(Experiment(config, workdir=folder), folder, "latest")
    return jax.device_get(params)


def test_prepared_ahead_resumed_and_evaluated_it_is_the_same_run(published, tmp_path, cache, computed, monkeypatch):
    config = configured(published)
    assert prepare.run(config, tmp_path / "whole") == {"data": 10, "evals.test": 3}
    assert computed == ["data", "evals.test"]
    result = train.run(config, tmp_path / "whole")
    assert computed == ["data", "evals.test"]  # a run finds what was prepared

    shutil.rmtree(cache)
    with pytest.raises(PreemptedError):
        train.run(config, tmp_path / "stopped", stop_at=2)
    assert len(computed) == 4
    shutil.rmtree(cache)  # it goes on where nothing is kept
    resumed = train.run(config, tmp_path / "stopped")
    assert len(computed) == 6
    assert resumed["metrics"] == result["metrics"]
    rows = [row for row in history(tmp_path / "stopped") if row["step"] != 2 or "train/loss" in row]
    assert rows == history(tmp_path / "whole")
    params = [final_params(config, tmp_path / name) for name in ("whole", "stopped")]
    assert jax.tree.all(jax.tree.map(np.array_equal, *params))

    computed.clear()
    shutil.rmtree(cache)
    assert evaluate.run(config, tmp_path / "whole")["metrics"] == pytest.approx(result["metrics"])
    assert computed == ["evals.test"]  # no training data are asked for
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "red sky?", "chosen": "It is red.", "rejected": "No, blue."}\n')
    held = configured(published, False)
    train.run(held, tmp_path / "held")
    rewards = []
    for number, (one, name) in enumerate([(config, "whole"), (held, "held")]):
        predict.run(one, tmp_path / name, str(pairs), str(tmp_path / f"{number}.jsonl"))
        rewards.append(json.loads((tmp_path / f"{number}.jsonl").read_text()))
    assert rewards[0]["preferred"] == rewards[1]["preferred"]
    for name in ("chosen_reward", "rejected_reward"):
        assert rewards[0][name] == pytest.approx(rewards[1][name], abs=1e-4)
        assert abs(rewards[0][name]) > 1e-3


@pytest.mark.slow
def test_other_weights_and_other_data_are_computed_anew(published, tmp_path, computed):
    def values(config):
        return precompute.ready(Experiment(config))[0].values[NAMES[0]]

    first = values(configured(published))
    assert computed == ["data", "evals.test"]
    np.testing.assert_array_equal(values(configured(published)), first)
    assert len(computed) == 2
    assert not np.allclose(values(configured(publish(tmp_path / "other" / "model", 8))), first)
    assert len(computed) == 4
    config = configured(published)
    config.data.source.records[0]["chosen"] = "It is blue."
    other = values(config)
    assert computed[4:] == ["data"]
    assert np.flatnonzero(np.abs(other - first) > 1e-3).tolist() == [0]
    seeds = [configured(), configured()]
    seeds[1].seed = 1
    assert not np.allclose(*map(values, seeds))  # without weights, the seed makes them


class Unknown:
    """Examples beside something that does not say what it is."""

    def __init__(self, records):
        self.records, self.rest = [dict(record) for record in records], iter(())

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def test_what_cannot_be_known_again_is_computed_every_time(published, cache, computed):
    config = configured(published)
    config.evals = {}
    for _ in range(2):
        precompute.ready(Experiment(config, source=Unknown(config.data.source.records)))
    assert computed == ["data", "data"]
    assert not cache.exists()


def test_adapters_have_their_base_as_the_reference(published, tmp_path):
    config = with_lora(configured(published))
    experiment = Experiment(config)
    experiment.build()
    assert set(experiment.abstract_state.params) == {"base", "lora"}
    data, evaluators = precompute.ready(experiment)
    state, step, losses = train.start(experiment), train.jit_step(experiment), []
    first = jax.device_get(state.params)
    before, _ = evaluate.scores(evaluators, experiment.merged(state.params))
    for name in ("chosen_reward", "rejected_reward", "margin"):
        assert before[f"test/{name}"] == pytest.approx(0, abs=1e-5)
    for _, batch in zip(range(5), data.batches()):
        state, metrics = step(state, sharding.place(batch, experiment.mesh))
        losses.append(float(metrics["loss"].compute()))
        if len(losses) == 1:
            assert float(metrics["chosen_reward"].compute()) == pytest.approx(0, abs=1e-5)
            assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, first["base"], jax.device_get(state.params["base"])))
    train.run(config, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert evaluate.run(config, tmp_path / "run")["metrics"] == pytest.approx(result["metrics"])


def test_a_plan_holds_one_model():
    target = plan.find_target("h100x1")
    configs = [configured(ahead=ahead) for ahead in (True, False)]
    for config in configs:
        config.plan = {"vocab_size": 260}
    needs = [plan.needs(config, target) for config in configs]
    assert needs[1]["parameters"] == 2 * needs[0]["parameters"]
    assert needs[1]["operations"] > needs[0]["operations"]
    spec = Experiment(configs[0], assumed=plan.assume(configs[0])).spec
    assert [spec[name] for name in NAMES] == [jax.ShapeDtypeStruct((configs[0].batch_size,), jnp.float32)] * 2


@pytest.mark.parametrize("objective", ["kto", "orpo", "simpo"])
def test_objectives_that_ask_the_reference_otherwise_refuse(objective):
    with pytest.raises(UserError, match=rf"^config.task.precompute_reference: {objective} .*; dpo and ipo take it$"):
        Experiment(configured(objective=objective)).build()


def test_what_is_wrong_is_said():
    config = configured()
    config.task.reference_dtype = "bfloat16"
    with pytest.raises(UserError, match=r"^config.task.precompute_reference: no reference is held"):
        Experiment(config).build()
    config = with_lora(configured(ahead=False))
    with pytest.raises(UserError, match=r"or dpo or ipo with config.task.task.precompute_reference"):
        Experiment(config).build()
    experiment = Experiment(configured())
    with pytest.raises(UserError, match=r"'reference_likelihood' is missing"):
        jax.eval_shape(experiment.task.metrics, experiment.abstract_state.params, experiment.data.spec)


if __name__ == "__main__":
    made = configured()
    assert Experiment(made).mesh.shape["data"] == 2
    losses, flat, metrics = train_steps(made)
    np.savez(pathlib.Path(sys.argv[1]) / "found.npz", losses=losses, metrics=json.dumps(metrics), **flat)
