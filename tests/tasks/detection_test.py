"""Set prediction against its formulas, written out in numpy, and on drawn shapes."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.shapes import NAMES, shapes
from research.errors import UserError
from research.optimizer import make_optimizer
from research.step import init_state, train_step
from research.tasks.detection import Detection, generalised_iou

CLASSES, QUERIES, LAYERS = 3, 5, 2


class Given(nn.Module):
    """A model whose outputs are its parameters, one row of them for each image."""

    num_outputs: int = CLASSES
    num_queries: int = QUERIES
    rows: int = 4

    @nn.compact
    def __call__(self, image, pixel_mask=None):
        shape, init = (LAYERS, self.rows, self.num_queries), nn.initializers.normal(1.0)
        logits = self.param("logits", init, (*shape, self.num_outputs + 1))
        boxes = self.param("boxes", init, (*shape, 4))
        number = image[:, 0, 0, 0].astype(jnp.int32)
        return logits[:, number], boxes[:, number]


def problem(seed=0, counts=(2, 0, 4, 1), objects=4):
    """Returns parameters and a batch of images with so many objects."""
    rng = np.random.default_rng(seed)

    def boxes(*shape):
        return np.concatenate([rng.uniform(0.2, 0.8, (*shape, 2)), rng.uniform(0.1, 0.5, (*shape, 2))], axis=-1)

    params = {
        "logits": 2 * rng.normal(size=(LAYERS, 4, QUERIES, CLASSES + 1)),
        "boxes": boxes(LAYERS, 4, QUERIES),
    }
    batch = {
        "image": np.arange(4)[:, None, None, None] * np.ones((1, 2, 2, 1)),
        "boxes": boxes(4, objects),
        "classes": rng.integers(0, CLASSES, (4, objects)),
        "box_mask": np.arange(objects) < np.array(counts)[:, None],
        "mask": np.ones(4),
    }
    batch["boxes"] *= batch["box_mask"][..., None]

    def cast(x):
        return jnp.asarray(x, jnp.int32 if x.dtype == int else jnp.float32)

    return jax.tree.map(cast, params), jax.tree.map(cast, batch)


def overlap(one, other):
    """Generalised intersection over union by the definition, of two boxes."""
    a, b = ([c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2] for c in (one, other))
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    union = one[2] * one[3] + other[2] * other[3] - shared
    around = np.prod([max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)])
    return shared / union - (around - union) / around


def expected_loss(params, batch, weights=(1, 5, 2), no_object=0.1):
    """Returns the parts of the loss of each layer; matches by trying everything."""
    params, batch = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (params, batch))
    result = []
    for logits, boxes in zip(params["logits"], params["boxes"]):
        sums, counts = np.zeros(3), np.zeros(3)
        for b in range(len(logits)):
            if not batch["mask"][b]:
                continue
            real = np.flatnonzero(batch["box_mask"][b])
            probabilities = np.exp(logits[b]) / np.exp(logits[b]).sum(-1, keepdims=True)
            pairs = {
                (q, n): np.array(
                    [
                        -probabilities[q, int(batch["classes"][b, n])],
                        np.abs(boxes[b, q] - batch["boxes"][b, n]).sum(),
                        -overlap(boxes[b, q], batch["boxes"][b, n]),
                    ]
                )
                for q in range(QUERIES)
                for n in real
            }
            cost = {pair: value @ weights for pair, value in pairs.items()}
            every = itertools.permutations(range(QUERIES), len(real))
            best = min(every, key=lambda chosen: sum(cost[pair] for pair in zip(chosen, real)))
            for pair in zip(best, real):
                sums[1:] += pairs[pair][1:] + [0, 1]
                counts[1:] += 1
            of_query = dict(zip(best, real))
            for q in range(QUERIES):
                wanted = int(batch["classes"][b, of_query[q]]) if q in of_query else CLASSES
                weight = 1 if q in of_query else no_object
                sums[0] -= weight * np.log(probabilities[q, wanted])
                counts[0] += weight
        result.append(sums / np.maximum(counts, 1e-9))
    return np.array(result)


def values(means):
    return {name: float(mean.compute()) for name, mean in means.items()}


PARTS = ("class_loss", "box_loss", "giou_loss")


@pytest.mark.parametrize("auxiliary", [True, False])
def test_the_loss_is_its_formula(auxiliary):
    params, batch = problem()
    task = Detection(Given(), auxiliary=auxiliary)
    loss, parts = jax.jit(task.loss)(params, batch, jax.random.key(0))
    expected = expected_loss(params, batch)
    np.testing.assert_allclose([values(parts)[name] for name in PARTS], expected[-1], rtol=1e-5)
    layers = expected if auxiliary else expected[-1:]
    assert float(loss.compute()) == pytest.approx((layers @ [1, 5, 2]).sum(), rel=1e-5)
    assert float(loss.count) == batch["box_mask"].sum()
    assert values(task.metrics(params, batch)) == pytest.approx(values(parts) | {"loss": float(loss.compute())})


def test_its_weights():
    params, batch = problem()
    weights = (0.5, 3, 7)
    fields = dict(zip(("class_weight", "box_weight", "giou_weight"), weights))
    found = values(Detection(Given(), **fields, no_object_weight=0.3).metrics(params, batch))
    expected = expected_loss(params, batch, weights, 0.3)
    assert found["loss"] == pytest.approx((expected @ weights).sum(), rel=1e-5)


def test_the_order_of_the_targets_and_what_fills_up_change_nothing():
    params, batch = problem()
    task = Detection(Given())
    expected = values(task.metrics(params, batch))
    order = np.array([2, 0, 3, 1])
    turned = batch | {name: batch[name][:, order] for name in ("boxes", "classes", "box_mask")}
    assert values(task.metrics(params, turned)) == pytest.approx(expected)
    real = batch["box_mask"] != 0
    filled = batch | {
        "boxes": jnp.where(real[..., None], batch["boxes"], jnp.nan),
        "classes": jnp.where(real, batch["classes"], 1),
    }
    assert values(task.metrics(params, filled)) == pytest.approx(expected)
    gradients = jax.grad(lambda params: task.loss(params, filled, jax.random.key(0))[0].total)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_masked_examples_count_nothing_even_where_they_are_nan():
    params, batch = problem()
    batch = batch | {"mask": jnp.array([1.0, 1.0, 0.0, 1.0])}
    broken = jax.tree.map(lambda x: x.at[:, 2].set(jnp.nan), params)
    few = jax.tree.map(lambda x: x[jnp.array([0, 1, 3])], batch)
    task = Detection(Given())
    assert values(task.metrics(broken, batch)) == pytest.approx(values(task.metrics(params, few)))


def test_a_batch_without_objects_teaches_that_there_are_none():
    params, batch = problem(counts=(0, 0, 0, 0))
    loss, _ = Detection(Given()).loss(params, batch, jax.random.key(0))
    assert float(loss.compute()) == pytest.approx(expected_loss(params, batch)[:, 0].sum(), rel=1e-5)


def test_the_gradient_of_microbatches_of_as_many_boxes_is_that_of_the_batch():
    params, batch = problem(counts=(2, 1, 1, 2))
    task = Detection(Given())
    gradients = []
    for microbatches in (1, 2):
        optimizer = make_optimizer(10, 1e-3, clip_norm=None, microbatches=microbatches)
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        state = init_state(task, optimizer, spec, 0, params)
        _, metrics = jax.jit(functools.partial(train_step, task, optimizer))(state, batch)
        gradients.append(values(metrics))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)


@pytest.mark.parametrize("unknown", [CLASSES, -1])
def test_an_unknown_class_is_no_number(unknown):
    params, batch = problem()
    wrong = batch | {"classes": batch["classes"].at[0, 0].set(unknown)}
    assert np.isnan(values(Detection(Given()).metrics(params, wrong))["loss"])


def test_cardinality_error():
    params, batch = problem()
    found = (np.asarray(params["logits"][-1]).argmax(-1) != CLASSES).sum(-1)
    expected = np.abs(found - np.asarray(batch["box_mask"]).sum(-1)).mean()
    assert values(Detection(Given()).metrics(params, batch))["cardinality_error"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0.5, 0.5, 0.4, 0.2], 1.0),  # itself
        ([0.7, 0.5, 0.4, 0.2], 1 / 3),  # half of it
        ([0.5, 0.5, 0.2, 0.1], 1 / 4),  # within it
        ([0.9, 0.5, 0.4, 0.2], 0.0),  # beside it
        ([1.3, 0.5, 0.4, 0.2], -1 / 3),  # as far away as it is wide
        ([0.9, 0.7, 0.4, 0.2], -0.5),  # corner to corner
        ([0.5, 0.5, 0.0, 0.0], 0.0),  # a point in it
    ],
)
def test_generalised_iou(other, expected):
    box = jnp.array([0.5, 0.5, 0.4, 0.2])
    found = [float(generalised_iou(*pair)) for pair in ((box, jnp.array(other)), (jnp.array(other), box))]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_predict_and_describe():
    params, batch = problem()
    task = Detection(Given(), threshold=0.4, label_names=NAMES)
    outputs = task.predict(params, batch, jax.random.key(0))
    logits = np.asarray(params["logits"][-1])
    probabilities = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[..., :CLASSES]
    assert {name: (array.shape, array.dtype.name) for name, array in outputs.items()} == {
        "scores": ((4, QUERIES), "float32"),
        "classes": ((4, QUERIES), "int32"),
        "boxes": ((4, QUERIES, 4), "float32"),
    }
    np.testing.assert_allclose(outputs["scores"], probabilities.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(outputs["classes"], probabilities.argmax(-1))
    np.testing.assert_array_equal(outputs["boxes"], params["boxes"][-1])

    output = {"scores": [0.39, 0.4, 0.9], "classes": [0, 1, 2], "boxes": [[0.5] * 4, [0.5] * 4, [0.9, 0.5, 0.4, 0.5]]}
    output = {name: np.array(value, np.float32) for name, value in output.items()}
    described = task.describe(output | {"image_size": np.array([100, 200])})["objects"]
    assert [found["label"] for found in described] == ["cross", "square"]
    assert described[0]["score"] == pytest.approx(0.9)
    np.testing.assert_allclose(described[0]["box"], [140, 25, 200, 75], atol=1e-3)  # cut off at the edge
    np.testing.assert_allclose(task.describe(output)["objects"][1]["box"], [0.25, 0.25, 0.75, 0.75], atol=1e-6)
    sized = task.predict(params, batch | {"image_size": jnp.ones((4, 2), jnp.int32)}, jax.random.key(0))
    assert sized["image_size"].shape == (4, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"box_weight": -1.0}, "config.task.box_weight: -1.0 must not be negative"),
        ({"threshold": 1.5}, r"config.task.threshold: 1.5 must lie in \[0, 1\]"),
        ({"label_names": ("a", "b")}, "num_outputs: 3 outputs for 2 labels"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        Detection(Given(), **fields)


def test_features_that_do_not_fit():
    _, batch = problem(objects=6)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    with pytest.raises(UserError, match="num_queries: 5 are too few for up to 6 boxes"):
        Detection(Given()).init(jax.random.key(0), spec)
    del spec["box_mask"]
    with pytest.raises(UserError, match="features: 'box_mask' is missing"):
        Detection(Given()).init(jax.random.key(0), spec)


# On drawn shapes


def drawn(count, size=32, objects=1, seed=0):
    """Returns drawn shapes as a batch."""
    rows = [shapes(count, size, 3, objects, seed)[i] for i in range(count)]
    top, left, bottom, right = np.moveaxis(np.stack([row["objects"]["bbox"] for row in rows]), -1, 0)
    boxes = np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], axis=-1)
    return {
        "image": np.stack([row["image"] for row in rows]).astype(np.float32) / 128 - 1,
        "pixel_mask": np.ones((count, size, size), np.float32),
        "boxes": boxes.astype(np.float32),
        "classes": np.stack([row["objects"]["label"] for row in rows]).astype(np.int32),
        "box_mask": np.ones((count, objects), np.float32),
        "mask": np.ones(count, np.float32),
    }
