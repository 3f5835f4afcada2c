"""Preference tuning: the formulas, masks and padding, and the reference, which nothing changes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import evaluate, export, step, train
from research.configuration import overrides
from research.data import tokenizer
from research.errors import UserError
from research.experiment import Experiment
from research.models import gpt
from research.optimizer import evaluation_params, make_optimizer
from research.pretrained import huggingface
from research.reporting import figures
from research.tasks import preferences
from research.tasks.preferences import OBJECTIVES, Preferences

V, B, T = 23, 3, 10
NAMES = ("input_ids", "targets", "target_mask", "attention_mask")


def model(**options):
    sizes = {"vocab_size": V, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    return gpt.Decoder(**sizes, positions="rotary", initializer_range=0.3, **options)


def side(rng, prompts, rows=B):
    """Returns prompts of 3 tokens with answers of 2 to 6, the first tokens of which are the targets that count."""
    ids = rng.integers(1, V, (rows, T + 1)).astype(np.int32)
    ids[:, :3] = prompts
    ends = rng.integers(4, 8, rows)[:, None]
    attended = np.arange(T) < ends
    counts = (np.arange(T) >= 2) & attended
    return {
        "input_ids": np.where(attended, ids[:, :-1], 0),
        "targets": np.where(attended, ids[:, 1:], 0),
        "target_mask": counts.astype(np.float32),
        "attention_mask": attended.astype(np.int32),
    }


def batch(seed=0, mask=(1, 1, 1)):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, V, (B, 3))
    rejected = {f"rejected_{name}": x for name, x in side(rng, prompts).items()}
    return side(rng, prompts) | rejected | {"mask": np.array(mask, np.float32)}


def spec(rows):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in rows.items()}


def objective(name, **options):
    return Preferences(model(), name, beta=2.0 if name == "simpo" else 0.5, **options)


@functools.cache
def params():
    """Parameters of a model, and others as its reference."""
    task = objective("dpo")
    one, other = (jax.jit(lambda key: task.init(key, spec(batch())))(jax.random.key(i)) for i in range(2))
    return {**one, "reference": other}


def likelihoods(weights, rows, prefix=""):
    logits = jax.jit(model().apply)({"params": weights}, rows[f"{prefix}input_ids"], rows[f"{prefix}attention_mask"])
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), rows[f"{prefix}targets"][..., None], 2)[..., 0]
    return (log_p * rows[f"{prefix}target_mask"]).sum(1)


def value_and_gradient(task, rows):
    return jax.jit(jax.value_and_grad(lambda p: task.loss(p, rows, jax.random.key(0))[0].total))(params())


def test_dpo_is_its_formula():
    rows = batch(mask=(1, 1, 0))
    ratios = [likelihoods(params(), rows, p) - likelihoods(params()["reference"], rows, p) for p in ("", "rejected_")]
    margin = 0.5 * (ratios[0] - ratios[1])
    means = jax.jit(objective("dpo").metrics)(params(), rows)
    expected = {
        "loss": np.log1p(np.exp(-margin)),
        "accuracy": margin > 0,
        "margin": margin,
        "chosen_reward": 0.5 * ratios[0],
        "rejected_reward": 0.5 * ratios[1],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(means[name].compute(), values[:2].mean(), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_chunks_and_what_is_masked_change_neither_loss_nor_gradient(name):
    rows = batch(mask=(1, 1, 0))
    loss, gradients = value_and_gradient(objective(name), rows)
    assert np.isfinite(loss)
    changed = {key: np.pad(x, [(0, 0), (0, 3)]) if x.ndim == 2 else x for key, x in rows.items()}
    for prefix in ("", "rejected_"):
        outside = changed[f"{prefix}target_mask"] == 0
        changed[f"{prefix}targets"] = np.where(outside & (np.arange(T + 3) > 2), 7, changed[f"{prefix}targets"])
        changed[f"{prefix}input_ids"][changed[f"{prefix}attention_mask"] == 0] = 5
        for key in ("input_ids", "target_mask", "attention_mask"):
            changed[prefix + key][2] = 0  # the row that only fills the batch up
    other, other_gradients = value_and_gradient(objective(name, logits_chunk=4), changed)
    np.testing.assert_allclose(other, loss, rtol=2e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other_gradients, gradients)
    assert all(not np.any(x) for x in jax.tree.leaves(gradients["reference"]))


def test_log_likelihoods_never_hold_the_logits_of_all_positions():
    wide = gpt.Decoder(4096, 16, 1, 2, intermediate_size=16, positions="rotary")
    rows = {key: np.repeat(np.repeat(x, 8, 1), 2, 0) if x.ndim == 2 else np.ones(6) for key, x in batch().items()}

    def memory(chunk):
        task = Preferences(wide, "simpo", logits_chunk=chunk)
        weights = jax.eval_shape(lambda: task.init(jax.random.key(0), spec(rows)))
        step = jax.grad(lambda p: task.loss(p, rows, jax.random.key(0))[0].total)
        return jax.jit(step).lower(weights).compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < memory(0) / 3


def test_mismatched_answers_follow_the_own_prompt():
    rows = objective("kto")._rows(batch())
    made = preferences.mismatched(rows, np.ones(2 * B))
    for i in range(2 * B):
        own, other = ({k: np.asarray(x)[j] for k, x in rows.items()} for j in (i, (i - 2) % (2 * B)))
        answer = other["targets"][other["target_mask"] == 1]
        whole = [*own["input_ids"][:3], *answer]
        found = {key: np.asarray(x)[i] for key, x in made.items()}
        assert found["input_ids"][found["attention_mask"] == 1].tolist() == whole[:-1]
        assert found["targets"][found["target_mask"] == 1].tolist() == answer.tolist()
    alone = preferences.mismatched(rows, np.repeat([1, 1, 0], 2))
    for key in NAMES[2:]:  # the first pair keeps its own answer, as the last one is padding
        np.testing.assert_array_equal(alone[key][:2], rows[key][:2])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_learns_and_the_reference_stays_bit_identical(name):
    """One of two tokens is preferred to the other; held-out pairs, of other prompts, are ranked better in the end."""
    rng = np.random.default_rng(0)

    def pairs(rows):
        prompts = rng.integers(3, V, (rows, 3))
        made = {"mask": np.ones(rows, np.float32)}
        for prefix, answer in (("", 1), ("rejected_", 2)):
            ids = np.concatenate([prompts, np.full((rows, 1), answer)], 1).astype(np.int32)
            mask = np.zeros((rows, 3), np.float32)
            mask[:, -1] = 1
            made |= {f"{prefix}input_ids": ids[:, :-1], f"{prefix}targets": ids[:, 1:], f"{prefix}target_mask": mask}
        return made

    task, rows, held_out = objective(name, reference_dtype="bfloat16"), pairs(16), pairs(64)
    freeze = {"freeze": task.fixed} if task.fixed else {}
    optimizer = make_optimizer(20, 2e-2, weight_decay=0.1, average=0.9, **freeze)
    state = jax.jit(lambda: step.init_state(task, optimizer, spec(rows), 0))()
    first = jax.tree.map(np.asarray, state.params)
    train = jax.jit(functools.partial(step.train_step, task, optimizer))
    losses = []
    for _ in range(20):
        state, means = train(state, rows)
        losses.append(float(means["loss"].compute()))
    assert losses[-1] < losses[0]
    metrics = jax.jit(task.metrics)
    before, after = (metrics(weights, held_out) for weights in (first, state.params))
    assert float(after["likelier"].compute()) > float(before["likelier"].compute())
    assert float(after["accuracy"].compute()) > 0.7
    assert ("reference" in first) == bool(task.fixed)
    if task.fixed:
        for weights in (state.params, evaluation_params(state.params, state.opt_state)):
            kept = weights["reference"]
            assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), kept, first["reference"]))
        rounded = jax.tree.map(lambda x: jnp.asarray(x, "bfloat16"), {k: first[k] for k in kept})
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), kept, rounded))


def test_equal_rewards_are_neither_right_nor_wrong():
    task = objective("dpo")
    means = jax.jit(task.metrics)(task.start({k: v for k, v in params().items() if k != "reference"}), batch())
    assert (float(means["accuracy"].compute()), float(means["margin"].compute())) == (0.5, 0.0)
    assert float(means["loss"].compute()) == pytest.approx(np.log(2))


def test_what_is_wrong_is_said():
    with pytest.raises(UserError, match=r"config.task.objective: no 'dpr'; did you mean 'dpo'\?"):
        Preferences(model(), "dpr")
    with pytest.raises(UserError, match=r"config.task.beta: 0 is not greater than 0"):
        Preferences(model(), beta=0)
    with pytest.raises(UserError, match=r"config.task.reference_dtype: no 'float16'"):
        Preferences(model(), reference_dtype="float16")
    packed = spec(batch() | {"positions": np.zeros((B, T), np.int32)})
    with pytest.raises(UserError, match=r"config.data.pack: pairs are not packed"):
        objective("dpo").init(jax.random.key(0), packed)
    lacking = "rejected_targets"
    with pytest.raises(UserError, match=r"'rejected_targets' is missing"):
        jax.eval_shape(objective("orpo").metrics, params(), {k: v for k, v in batch().items() if k != lacking})
    with pytest.raises(UserError, match=r"kto compares a prompt with other answers; it needs 2 pairs or more"):
        jax.eval_shape(objective("kto").metrics, params(), {k: v[:1] for k, v in batch().items()})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run of three steps from published weights, with a reference in bfloat16; the weights and the run's folder."""
    folder = tmp_path_factory.mktemp("preferences")
    decoder = gpt.Decoder(260, 16, 1, 2, intermediate_size=32, max_positions=128)
    published = jax.jit(decoder.init)(jax.random.key(7), np.zeros((1, 4), np.int32))["params"]
    files = tokenizer.byte_level().save(folder / "tokenizer")
    path = str(huggingface.save(folder / "model", decoder, published, tokenizer_files=files))
    config = overrides.load("configs/finetune_preferences.py:tiny")
    config.task.model = {"call": "research.pretrained.huggingface.load_model", "path": path, "kind": "causal_lm"}
    config.task.reference_dtype = "bfloat16"
    config.update(init={"path": path}, num_steps=3)
    config.log.evaluate_every_steps = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "curves", lambda *_, **__: None)  # they take longer to draw than all else
        train.run(config, folder / "run")
    return config, published, folder


def test_the_reference_is_what_the_run_began_with(tuned):
    config, published, folder = tuned
    _, params = evaluate.restore_params(Experiment(config, workdir=folder / "run"), folder / "run", "latest")
    rounded = jax.tree.map(lambda x: jnp.asarray(x, "bfloat16"), published)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params["reference"], rounded))
    assert not np.array_equal(params["word"]["embedding"], published["word"]["embedding"])
    result = json.loads((folder / "run" / "result.json").read_text())
    repeated = evaluate.run(config, folder / "run")
    assert repeated["metrics"] == pytest.approx(result["metrics"])


def test_what_is_exported_is_the_model_alone(tuned):
    config, _, folder = tuned
    written = export.run(config, folder / "run", folder / "exported")
    loaded, report = huggingface.load_params(
        str(written), huggingface.load_model(str(written), "causal_lm"), jax.eval_shape(lambda: tuned[1])
    )
    assert report.new == ()
    assert not np.array_equal(loaded["word"]["embedding"], tuned[1]["word"]["embedding"])


def test_the_reference_must_be_frozen(tuned):
    config = tuned[0].copy_and_resolve_references()
    config.optimizer.freeze = ()
    with pytest.raises(UserError, match=r"config.optimizer.freeze: '\^reference/' is missing, and the parameters '"):
        Experiment(config).build()
