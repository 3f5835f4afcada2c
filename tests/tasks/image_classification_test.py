"""Mixed images and labels against the definitions in numpy, and distillation from one run into another."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from research import export, train
from research.configuration.variants import tiny_images
from research.errors import UserError
from research.evaluate import restore_params
from research.experiment import Experiment
from research.models import vit
from research.tasks import image_classification
from research.tasks.classification import Classification
from research.tasks.image_classification import Distillation, ImageClassification

CLASSES = 3
RNG = np.random.default_rng(0)


class Linear(nn.Module):
    """Logits are linear in the pixels, and take what images they get."""

    num_outputs: int = CLASSES

    inputs = ("image",)

    @nn.compact
    def __call__(self, image):
        return nn.Dense(self.num_outputs)(image.reshape(image.shape[0], -1))


def batch(rows=6, size=8):
    return {
        "image": RNG.normal(size=(rows, size, size, 1)).astype(np.float32),
        "label": np.arange(rows, dtype=np.int32) % CLASSES,
        "mask": np.ones(rows, np.float32),
    }


def params_of(task, rows):
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in rows.items()}
    return jax.jit(lambda: task.init(jax.random.key(1), spec))()


def seen(task, rows, rng):
    """Returns the mixed images, the partners' labels and the own share."""
    mixed, other, share = task._mix(rows, rng)
    return np.asarray(mixed["image"]), np.asarray(other["label"]), float(share)


@pytest.mark.parametrize("fields", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_images_and_labels_are_mixed_by_the_same_share(fields):
    task, rows = ImageClassification(Linear(), **fields), batch()
    partner = np.roll(rows["image"], 1, axis=0)
    shares, averaged = set(), 0
    for seed in range(12):
        mixed, label, share = seen(task, rows, jax.random.key(seed))
        np.testing.assert_array_equal(label, np.roll(rows["label"], 1))
        own, other = np.isclose(mixed, rows["image"]), np.isclose(mixed, partner)
        if own.all(axis=(0, 3)).any() or share in (0, 1):  # pixels come from one or the other
            assert (own | other).all()
            assert own.mean() == pytest.approx(share, abs=1e-6)
        else:
            averaged += 1
            assert share >= 0.5
            np.testing.assert_allclose(mixed, share * rows["image"] + (1 - share) * partner, atol=1e-5)
        shares.add(round(share, 4))
    assert len(shares) > 3
    assert (averaged > 0) == ("mixup" in fields)
    assert (averaged < 12) == ("cutmix" in fields)


def test_the_cut_is_a_rectangle_around_a_pixel():
    for seed in range(20):
        kept = np.asarray(image_classification.cutmix_weights(jax.random.key(seed), (10, 16), 1.0))
        rows, columns = np.nonzero((kept == 0).any(axis=1))[0], np.nonzero((kept == 0).any(axis=0))[0]
        if len(rows):
            box = kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert (box == 0).all()
            assert (kept == 0).sum() == box.size


def test_the_loss_is_that_of_mixed_labels():
    task, rows = ImageClassification(Linear(), mixup=0.5, label_smoothing=0.3), batch()
    params, rng = params_of(task, rows), jax.random.key(3)
    loss, metrics = task.loss(params, rows, rng)
    mixed, other, share = seen(task, rows, jax.random.split(rng)[0])
    logits = np.asarray(task.model.apply({"params": params}, mixed), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    eye = np.eye(CLASSES) * 0.7 + 0.1
    targets = share * eye[rows["label"]] + (1 - share) * eye[other]
    assert float(loss.compute()) == pytest.approx(-(targets * log_probabilities).sum(axis=1).mean(), rel=1e-5)
    assert float(metrics["accuracy"].compute()) == pytest.approx((logits.argmax(axis=1) == rows["label"]).mean())


def test_without_mixing_it_is_plain_classification():
    rows = batch()
    plain, task = Classification(Linear(), label_smoothing=0.1), ImageClassification(Linear(), label_smoothing=0.1)
    params = params_of(plain, rows)
    assert task.loss(params, rows, jax.random.key(0)) == plain.loss(params, rows, jax.random.key(0))


@pytest.mark.parametrize("field", ["mixup", "cutmix"])
def test_rows_that_fill_a_batch_up_are_mixed_into_nothing(field):
    task, rows = ImageClassification(Linear(), **{field: 1.0}), batch()
    rows["mask"][[2, 3, 5]] = 0
    params, rng = params_of(task, rows), jax.random.key(2)
    expected = task.loss(params, rows, rng)[0]
    broken = rows | {"image": np.where(rows["mask"][:, None, None, None] > 0, rows["image"], np.nan)}
    assert float(task.loss(params, broken, rng)[0].compute()) == pytest.approx(float(expected.compute()))


def test_each_step_draws_anew_and_again_the_same():
    task, rows = ImageClassification(Linear(), mixup=1.0), batch()
    shares = [seen(task, rows, jax.random.fold_in(jax.random.key(0), step))[2] for step in (0, 1, 0)]
    assert shares[0] == shares[2] != shares[1]


ENCODER = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
STUDENT = vit.DistilledClassifier(vit.Encoder(**ENCODER, intermediate_size=16, prefix_tokens=2), CLASSES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageClassification(Linear(), mixup=-0.1), r"config\.task\.mixup: -0\.1 must be 0 \(off\) or more"),
        (lambda: ImageClassification(Linear(1), "regression", cutmix=1.0), "cutmix: objective 'regression' has no"),
        (lambda: Distillation(STUDENT, "sigmoid", teacher=Linear()), "a teacher chooses one class"),
        (lambda: Distillation(Linear(), teacher=Linear()), "Linear has no distillation token; use models.vit.Dist"),
        (lambda: Distillation(STUDENT, teacher=Linear(4)), "the teacher knows 4 classes, the model 3"),
    ],
)
def test_what_does_not_go_together(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_distillation_token_learns_the_teachers_choice():
    task, rows = Distillation(STUDENT, teacher=Linear(), label_smoothing=0.1), batch()
    params = params_of(task, rows)
    (loss, metrics) = task.loss(params, rows, jax.random.key(0))
    said = np.asarray(Linear().apply({"params": params["teacher"]}, rows["image"])).argmax(axis=1)
    label, teacher = STUDENT.apply({"params": params}, rows["image"], method="heads")
    plain = Classification(Linear(), label_smoothing=0.1)._loss(label, rows, 0.1)
    taught = Classification(Linear())._loss(teacher, {**rows, "label": jnp.asarray(said)}, 0.0)
    assert float(loss.compute()) == pytest.approx(float(plain.compute() + taught.compute()) / 2, rel=1e-6)
    assert float(metrics["teacher_accuracy"].compute()) == pytest.approx((said == rows["label"]).mean())
    gradients = jax.grad(lambda p: task.loss(p, rows, jax.random.key(0))[0].total)(params)
    assert all(not np.any(x) for x in jax.tree.leaves(gradients["teacher"]))
    assert np.any(gradients["head_distillation"]["kernel"])


def config(**task):
    """Returns the config of a tiny run on drawn shapes."""
    result = ConfigDict()
    result.seed, result.num_epochs, result.batch_size = 0, 1.0, 8
    result.task = task
    result.data = {
        "call": "research.data.dataset.Dataset",
        "ops": [
            {"call": "research.data.image.Decode", "channels": 1},
            {"call": "research.data.image.Normalize", "mean": [0.2], "std": [0.4]},
        ],
        "features": ["image", "label"],
    }
    test = {"call": "research.evaluators.image_classification.ImageScores", "data": result.data.to_dict()}
    result.evals = {"test": test | {"mistakes": 3}}
    result.optimizer, result.checkpoint = {"learning_rate": 1e-2, "weight_decay": 0.1}, {"every_steps": 10}
    result = tiny_images(result, size=16, channels=1)
    result.num_steps, result.log = 6, {"every_steps": 2}
    return result


SIZES = {"image_size": 16, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
SIZES |= {"intermediate_size": 16, "call": "research.models.vit.Encoder"}
TEACHER = {"call": "research.models.vit.ImageClassifier", "num_outputs": 3, "encoder": SIZES}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train.run(config(call="research.tasks.image_classification.ImageClassification", model=TEACHER), folder)
    return folder


def student(teacher):
    result = config(
        call="research.tasks.image_classification.Distillation",
        cutmix=1.0,
        teacher=TEACHER,
        model={
            "call": "research.models.vit.DistilledClassifier",
            "num_outputs": 3,
            "encoder": SIZES | {"prefix_tokens": 2},
        },
    )
    result.init = {
        "call": "research.configuration.transfer.load_params",
        "path": str(teacher),
        "renames": [["^", "teacher/"]],
        "new": ["^(?!teacher/)"],
    }
    result.optimizer.freeze = ["^teacher/"]
    return result


def test_a_teacher_of_another_run_stays_as_it_is(teacher, tmp_path):
    result = train.run(student(teacher), tmp_path / "whole")
    _, taught = restore_params(Experiment(student(teacher)), tmp_path / "whole", "latest")
    own = config(call="research.tasks.image_classification.ImageClassification", model=TEACHER)
    _, trained = restore_params(Experiment(own), teacher, "latest")
    jax.tree.map(np.testing.assert_array_equal, taught["teacher"], trained)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all("train/teacher_accuracy" in row for row in rows if "train/loss" in row)
    assert set(result["metrics"]) == {"test/loss", "test/accuracy"}

    stopped = student(teacher)
    stopped.checkpoint.every_steps = 3
    train.run(stopped, tmp_path / "resumed")
    for name in ("6", "run.json", "result.json"):  # as if it had been killed after step 3
        path = tmp_path / "resumed" / ("checkpoints" if name == "6" else "") / name
        if path.is_dir():
            path.rename(tmp_path / "last")
        else:
            path.unlink()
    train.run(stopped, tmp_path / "resumed")
    _, resumed = restore_params(Experiment(stopped), tmp_path / "resumed", "latest")
    jax.tree.map(np.testing.assert_array_equal, resumed, taught)

    folder = export.run(student(teacher), tmp_path / "whole")
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "DeiTForImageClassificationWithTeacher"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: setattr(c, "init", None),
            r"config\.init: it is missing, and the parameters '\^teacher/' of Distillation",
        ),
        (lambda c: c.optimizer.update(freeze=()), r"config\.optimizer\.freeze: '\^teacher/' is missing"),
        (lambda c: c.init.update(new=("",)), r"config\.init: it lacks teacher/encoder/"),
    ],
)
def test_a_teacher_must_be_brought_and_kept(teacher, change, message, tmp_path):
    wrong = student(teacher)
    with wrong.unlocked():
        change(wrong)
    with pytest.raises(UserError, match=message):
        train.run(wrong, tmp_path)
