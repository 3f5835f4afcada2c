"""The contrastive losses: their definition, padding, devices, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from research.errors import UserError
from research.experiment import Experiment
from research.models.clip import Clip, SigLip, TextEncoder
from research.models.vit import Encoder
from research.tasks.contrastive import Contrastive

IMAGE = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
TEXT = TextEncoder(20, 8, 1, 2, 8, max_positions=5)
CLIP = Clip(Encoder(**IMAGE), TEXT, 6, end_id=19)
SIGLIP = SigLip(Encoder(**IMAGE, prefix_tokens=0), TEXT.clone(causal=False))
TASKS = {"softmax": Contrastive(CLIP), "sigmoid": Contrastive(SIGLIP, "sigmoid", max_scale=None)}


def batch(size=6, padding=2, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 19, (size, 5)).astype(np.int32)
    ids[:, -1] = 19
    arrays = {"image": rng.normal(size=(size, 8, 8, 3)).astype(np.float32), "input_ids": ids}
    arrays |= {"attention_mask": np.ones_like(ids), "mask": np.ones(size, np.float32)}
    empty = {name: np.zeros((padding, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
    return {name: jnp.asarray(np.concatenate([array, empty[name]])) for name, array in arrays.items()}


def spec(arrays):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


@pytest.fixture(params=TASKS, scope="module")
def case(request):
    task = TASKS[request.param]
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), spec(batch())))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    loss = jax.jit(jax.value_and_grad(lambda p, arrays: task.loss(p, arrays, jax.random.key(0))[0].compute()))
    return request.param, task, params, loss


def test_the_loss_is_as_published(case):
    name, task, params, loss = case
    arrays = batch()
    outputs = jax.jit(task.predict)(params, arrays, jax.random.key(0))
    images, texts = (np.asarray(outputs[side], np.float64)[:6] for side in ("image", "text"))
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    logits = np.exp(np.float64(params["logit_scale"])) * images @ texts.T
    if name == "softmax":
        either = [logits - np.log(np.exp(logits).sum(axis, keepdims=True)) for axis in (0, 1)]
        expected = -np.mean([np.diagonal(one).mean() for one in either])
    else:
        signs = 2 * np.eye(6) - 1
        expected = np.log1p(np.exp(-signs * (logits + np.float64(params["logit_bias"])))).sum() / 6
    assert float(loss(params, arrays)[0]) == pytest.approx(expected, rel=1e-4)
    assert len(task.describe({"text": np.asarray(outputs["text"][0])})["text"]) == texts.shape[1]


def test_padding_is_neither_positive_nor_negative(case):
    _, _, params, loss = case
    arrays = batch()
    other = {name: array if name == "mask" else array.at[6:].set(array[:2]) for name, array in arrays.items()}
    (one, gradient), (two, same) = loss(params, arrays), loss(params, other)
    assert float(one) == pytest.approx(float(two), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, same)
    assert float(loss(params, other | {"mask": jnp.ones(8)})[0]) > float(two) + 0.01


def test_a_batch_has_other_negatives_than_its_parts(case):
    _, _, params, loss = case
    whole = batch()
    halves = [
        whole | {"mask": jnp.asarray(np.isin(np.arange(8), half), jnp.float32)} for half in ((0, 1, 2), (3, 4, 5))
    ]
    assert float(loss(params, whole)[0]) > np.mean([float(loss(params, half)[0]) for half in halves]) + 0.01


def test_the_scale_is_bounded_while_training(case):
    name, _, params, loss = case
    one, two = (loss(params | {"logit_scale": jnp.full_like(params["logit_scale"], x)}, batch()) for x in (4.7, 7.0))
    assert (float(one[0]) == float(two[0])) == (name == "softmax")


def test_a_text_without_its_end_is_no_number_rather_than_wrong(case):
    name, _, params, loss = case
    arrays = batch()
    arrays["input_ids"] = arrays["input_ids"].at[2, -1].set(1)
    assert np.isnan(loss(params, arrays)[0]) == (name == "softmax")


def test_either_side_is_predicted_alone(case):
    _, task, params, _ = case
    arrays = {name: array for name, array in batch().items() if name != "image"}
    assert list(jax.eval_shape(task.predict, params, arrays, jax.random.key(0))) == ["text"]


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"config.task.loss_kind: unknown 'sigmoit'"):
        Contrastive(CLIP, "sigmoit")
    with pytest.raises(UserError, match=r"config.data.features: 'input_ids' is missing"):
        TASKS["softmax"].init(jax.random.key(0), spec({"image": batch()["image"]}))
    longer = spec(batch()) | {"input_ids": jax.ShapeDtypeStruct((6, 9), jnp.int32)}
    with pytest.raises(UserError, match="rows of 9 tokens are longer than the 5"):
        jax.eval_shape(lambda: TASKS["softmax"].init(jax.random.key(0), longer))
    shorter = spec(batch()) | {"input_ids": jax.ShapeDtypeStruct((6, 3), jnp.int32)}
    with pytest.raises(UserError, match="padded to max_positions=5; these have 3"):
        jax.eval_shape(lambda: TASKS["sigmoid"].init(jax.random.key(0), shorter))


def test_microbatches_are_refused():
    config = ConfigDict({"batch_size": 4, "seed": 0, "num_steps": 1, "num_epochs": None})
    rows = [{"image": np.zeros((8, 8, 3), np.float32), "input_ids": [19] * 5, "attention_mask": [1] * 5}] * 4
    call = "research.models"
    image = {"call": f"{call}.vit.Encoder", **IMAGE}
    text = {"call": f"{call}.clip.TextEncoder", "vocab_size": 20, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    text |= {"intermediate_size": 8, "max_positions": 5}
    model = {"call": f"{call}.clip.Clip", "image": image, "text": text, "end_id": 19}
    config.task = {"call": "research.tasks.contrastive.Contrastive", "model": model}
    config.data = {
        "call": "research.data.dataset.Dataset",
        "source": {"call": "research.data.source.examples", "records": [dict(row, image=0.0) for row in rows]},
        "features": ["image", "input_ids", "attention_mask"],
    }
    config.optimizer = {"learning_rate": 1e-3, "microbatches": 2}
    experiment = Experiment(config, source=rows)
    with pytest.raises(UserError, match=r"config.optimizer.microbatches: Contrastive compares the examples of a batch"):
        experiment.build()
