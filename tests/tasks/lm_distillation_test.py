"""Distillation of language models: both divergences are their formulas, in blocks too, and the teacher stays."""

import functools

import jax
import numpy as np
import pytest

from research.configuration import overrides
from research.errors import UserError
from research.experiment import Experiment
from research.models import gpt
from research.pretrained import huggingface
from research.tasks.lm_distillation import LanguageModelDistillation

V, B, T = 23, 3, 10
SIZES = {"vocab_size": V, "num_heads": 2, "intermediate_size": 24, "positions": "rotary", "initializer_range": 0.3}
STUDENT, TEACHER = (
    gpt.Decoder(hidden_size=16, num_layers=2, **SIZES),
    gpt.Decoder(hidden_size=24, num_layers=1, **SIZES),
)


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    mask = (rng.random((B, T)) < 0.7).astype(np.float32)
    return {
        **{"input_ids": ids[:, :-1], "targets": ids[:, 1:], "target_mask": mask},
        "mask": np.array([1, 1, 0], np.float32),
    }


def spec(rows):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in rows.items()}


def task(divergence="forward", **options):
    return LanguageModelDistillation(model=STUDENT, teacher=TEACHER, divergence=divergence, **options)


@functools.cache
def params():
    return jax.jit(lambda: task().init(jax.random.key(0), spec(batch())))()


@functools.cache
def log_p():
    """Log-probabilities of the student and of the teacher, by temperature."""
    of = [
        jax.jit(m.apply)({"params": p}, batch()["input_ids"])
        for m, p in ((STUDENT, params()), (TEACHER, params()["teacher"]))
    ]
    return {t: [np.asarray(jax.nn.log_softmax(logits / t)) for logits in of] for t in (1.0, 2.0)}


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1.0), (2.0, 0.25)])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_divergence_is_its_formula(divergence, temperature, share):
    rows = batch()
    means = jax.jit(task(divergence, temperature=temperature, teacher_share=share).metrics)(params(), rows)
    student, teacher = log_p()[temperature]
    one, other = (teacher, student) if divergence == "forward" else (student, teacher)
    weights = rows["target_mask"] * rows["mask"][:, None]
    expected = temperature**2 * ((np.exp(one) * (one - other)).sum(-1) * weights).sum() / weights.sum()
    plain = -np.take_along_axis(log_p()[1.0][0], rows["targets"][..., None], 2)[..., 0]
    cross_entropy = (plain * weights).sum() / weights.sum()
    np.testing.assert_allclose(means["divergence"].compute(), expected, rtol=1e-4)
    np.testing.assert_allclose(means["cross_entropy"].compute(), cross_entropy, rtol=1e-4)
    mixed = share * expected + (1 - share) * cross_entropy
    np.testing.assert_allclose(means["loss"].compute(), mixed, rtol=1e-4)


def test_blocks_change_nothing_and_the_teacher_gets_no_gradient():
    def gradient(chunk):
        distillation = task("reverse", logits_chunk=chunk, temperature=2.0, teacher_share=0.5)
        loss = lambda p: distillation.loss(p, batch(), jax.random.key(0))[0].total  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params())

    (loss, gradients), (other, others) = gradient(0), gradient(3)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), others, gradients)
    assert all(not np.any(x) for x in jax.tree.leaves(gradients["teacher"]))
    assert all(np.any(x) for x in jax.tree.leaves({k: v for k, v in gradients.items() if k != "teacher"}))


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    same = LanguageModelDistillation(model=TEACHER, teacher=TEACHER)
    weights = {**params()["teacher"], "teacher": params()["teacher"]}
    loss = lambda p: same.loss(p, batch(), jax.random.key(0))[0].total  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(loss))(weights)
    assert abs(value) < 1e-4
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(gradients)) < 1e-4


def test_published_weights_teach_a_new_student(tmp_path):
    decoder = gpt.Decoder(260, 16, 1, 2, intermediate_size=32, max_positions=64)
    published = jax.jit(decoder.init)(jax.random.key(7), np.zeros((1, 4), np.int32))["params"]
    path = str(huggingface.save(tmp_path / "teacher", decoder, published))
    student = {"call": "research.models.gpt.Decoder", "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    config = overrides.load("configs/pretrain_text.py:tiny")
    config.task = {
        "call": "research.tasks.lm_distillation.LanguageModelDistillation",
        "model": student | {"intermediate_size": 16, "vocab_size": 260, "positions": "rotary"},
        "teacher": {"call": "research.pretrained.huggingface.load_model", "path": path, "kind": "causal_lm"},
    }
    config.init = {"call": "research.pretrained.teacher.load_params", "teacher": path}
    with pytest.raises(UserError, match=r"config.optimizer.freeze: '\^teacher/' is missing"):
        Experiment(config).build()
    config.optimizer.freeze = ("^teacher/",)
    experiment = Experiment(config)
    experiment.build()
    loaded = experiment.pretrained()
    jax.tree.map(np.testing.assert_array_equal, loaded["teacher"], published)
    assert loaded["word"]["embedding"] is None


def test_what_is_wrong_is_said():
    with pytest.raises(UserError, match=r"config.task.divergence: no 'forwards'; did you mean 'forward'\?"):
        task("forwards")
    with pytest.raises(UserError, match=r"config.task.temperature: 0 is not greater than 0"):
        task(temperature=0)
    with pytest.raises(UserError, match=r"config.task.teacher_share: 2 must lie in"):
        task(teacher_share=2)
    with pytest.raises(UserError, match=r"config.task.teacher: it knows 5 tokens, the model 23"):
        LanguageModelDistillation(model=STUDENT, teacher=TEACHER.clone(vocab_size=5))
