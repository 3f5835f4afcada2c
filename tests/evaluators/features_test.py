"""Features of a classifier that this code has trained."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research import train
from research.configuration import overrides
from research.errors import UserError
from research.evaluate import restore_params
from research.evaluators.features import Inception, TrainedRun
from research.experiment import Experiment
from research.models import inception
from research.reporting.record import load_config

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "vit_fashion_mnist.py:tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "shapes classifier"
    config = overrides.load(str(CONFIG))
    config.num_steps, config.log.evaluate_every_steps = 10, 0
    train.run(config, folder)
    return folder


def test_a_trained_run_gives_its_features_and_logits(run):
    network = TrainedRun(str(run))
    assert network.metric == "frechet_shapes classifier"
    network.check((28, 28, 1), ())
    pixels = np.random.default_rng(0).uniform(size=(3, 28, 28, 1)).astype(np.float32)
    found = jax.jit(lambda params, pixels: network(params, pixels))(network.params, pixels)
    experiment = Experiment(load_config(run), workdir=run)
    _, params = restore_params(experiment, run, "")
    batch = {"image": jnp.asarray((pixels - 0.286) / 0.353)}
    logits = experiment.task.predict(params, batch, jax.random.key(0))["logits"]
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    head = params["head_output"]
    np.testing.assert_allclose(found["features"] @ head["kernel"] + head["bias"], logits, atol=1e-5)


def test_what_cannot_see(run, tmp_path):
    with pytest.raises(
        UserError, match=r"takes images of shape \(28, 28, 1\), but the samples have shape \(32, 32, 3\)"
    ):
        TrainedRun(str(run)).check((32, 32, 3), ())
    names = Experiment(load_config(run), workdir=run).label_names
    TrainedRun(str(run)).check((28, 28, 1), names)
    with pytest.raises(UserError, match=r"classifies .*, but the samples are of"):
        TrainedRun(str(run)).check((28, 28, 1), names[::-1])
    with pytest.raises(UserError, match=r"no run in '.*nowhere'; train the classifier first"):
        TrainedRun(str(tmp_path / "nowhere"))


# --- Inception ------------------------------------------------------------------------------------


def inception_files(folder, seed=0):
    """Writes random weights by their published names, for every convolution that the model has."""
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    shapes = jax.eval_shape(inception.Inception().init, jax.random.key(0), image)["params"]
    rng, tensors = np.random.default_rng(seed), {}
    for name, leaf in shapes.items():
        height, width, inputs, outputs = leaf["kernel"].shape
        weight = rng.normal(0, (height * width * inputs / 2) ** -0.5, (outputs, inputs, height, width))
        norm = {"weight": 1 + 0.2 * rng.normal(size=outputs), "running_var": rng.uniform(0.5, 1.5, outputs)}
        norm |= {part: 0.2 * rng.normal(size=outputs) for part in ("bias", "running_mean")}
        tensors |= {f"{name}.conv.weight": weight} | {f"{name}.bn.{part}": value for part, value in norm.items()}
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "inception.safetensors")
    return tensors


def test_inception_has_the_published_size(tmp_path):
    """27,161,264 parameters of the classifier, less those of the auxiliary head (3,326,696) and of the last layer."""
    tensors = inception_files(tmp_path)
    learned = [value for name, value in tensors.items() if not name.endswith(("running_mean", "running_var"))]
    assert sum(value.size for value in learned) == 27_161_264 - 3_326_696 - (2048 * 1000 + 1000)
    network = Inception(str(tmp_path / "inception.safetensors"))
    assert network.metric == "fid"
    name = "Mixed_6b.branch7x7_2"
    bias = tensors[f"{name}.bn.bias"] - tensors[f"{name}.bn.running_mean"] * tensors[f"{name}.bn.weight"] / np.sqrt(
        tensors[f"{name}.bn.running_var"] + 1e-3
    )
    np.testing.assert_allclose(network.params[name]["bias"], bias, rtol=1e-5, atol=1e-6)
    shape = jax.eval_shape(network, network.params, jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32))
    assert shape["features"].shape == (2, 2048)


def test_weights_of_another_network(tmp_path):
    tensors = inception_files(tmp_path)
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file(tensors | {"Mixed_7c.branch1x1.conv.weight": np.zeros((8, 8, 1, 1), np.float32)}, path)
    with pytest.raises(UserError, match=r"another network: its Mixed_7c.branch1x1.conv.weight is \(8, 8, 1, 1\)"):
        Inception(str(path))
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match=r"not contain the weights of Inception-v3: it lacks \w+.conv.weight"):
        Inception(str(path))
    with pytest.raises(UserError, match="images of 1 or 3 channels, not 4"):
        Inception(str(tmp_path / "inception.safetensors")).check((8, 8, 4), ())


@pytest.mark.peers
def test_inception_equals_pytorch(tmp_path):
    """Against the same network written with PyTorch's own layers, on images resized by PyTorch."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    tensors = {name: torch.tensor(value) for name, value in inception_files(tmp_path).items()}

    def conv(x, name, stride=1, padding=0):
        x = functional.conv2d(x, tensors[f"{name}.conv.weight"], stride=stride, padding=padding)
        parts = (tensors[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.relu(functional.batch_norm(x, *parts, eps=1e-3))

    def mean(x):
        return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(x, block):
        five = conv(conv(x, f"{block}.branch5x5_1"), f"{block}.branch5x5_2", padding=2)
        double = conv(conv(x, f"{block}.branch3x3dbl_1"), f"{block}.branch3x3dbl_2", padding=1)
        double = conv(double, f"{block}.branch3x3dbl_3", padding=1)
        return torch.cat([conv(x, f"{block}.branch1x1"), five, double, conv(mean(x), f"{block}.branch_pool")], 1)

    def b(x, block):
        double = conv(conv(x, f"{block}.branch3x3dbl_1"), f"{block}.branch3x3dbl_2", padding=1)
        double = conv(double, f"{block}.branch3x3dbl_3", 2)
        return torch.cat([conv(x, f"{block}.branch3x3", 2), double, functional.max_pool2d(x, 3, 2)], 1)

    def c(x, block):
        seven = conv(conv(x, f"{block}.branch7x7_1"), f"{block}.branch7x7_2", padding=(0, 3))
        seven = conv(seven, f"{block}.branch7x7_3", padding=(3, 0))
        double = conv(x, f"{block}.branch7x7dbl_1")
        for i in (2, 3, 4, 5):
            double = conv(double, f"{block}.branch7x7dbl_{i}", padding=(0, 3) if i % 2 else (3, 0))
        return torch.cat([conv(x, f"{block}.branch1x1"), seven, double, conv(mean(x), f"{block}.branch_pool")], 1)

    def d(x, block):
        three = conv(conv(x, f"{block}.branch3x3_1"), f"{block}.branch3x3_2", 2)
        seven = conv(conv(x, f"{block}.branch7x7x3_1"), f"{block}.branch7x7x3_2", padding=(0, 3))
        seven = conv(conv(seven, f"{block}.branch7x7x3_3", padding=(3, 0)), f"{block}.branch7x7x3_4", 2)
        return torch.cat([three, seven, functional.max_pool2d(x, 3, 2)], 1)

    def e(x, block, pooled):
        three = conv(x, f"{block}.branch3x3_1")
        double = conv(conv(x, f"{block}.branch3x3dbl_1"), f"{block}.branch3x3dbl_2", padding=1)
        pairs = [(three, "3x3_2a", (0, 1)), (three, "3x3_2b", (1, 0))]
        pairs += [(double, "3x3dbl_3a", (0, 1)), (double, "3x3dbl_3b", (1, 0))]
        middle = [conv(y, f"{block}.branch{name}", padding=padding) for y, name, padding in pairs]
        return torch.cat([conv(x, f"{block}.branch1x1"), *middle, conv(pooled, f"{block}.branch_pool")], 1)

    pixels = np.random.default_rng(1).uniform(size=(2, 40, 40, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.tensor(pixels.transpose(0, 3, 1, 2))
        x = 2 * functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
        x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
        x = conv(conv(functional.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
        x = functional.max_pool2d(x, 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = a(x, block)
        x = b(x, "Mixed_6a")
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = c(x, block)
        x = d(x, "Mixed_7a")
        x = e(x, "Mixed_7b", mean(x))
        theirs = e(x, "Mixed_7c", functional.max_pool2d(x, 3, 1, 1)).mean(dim=(2, 3)).numpy()
    network = Inception(str(tmp_path / "inception.safetensors"))
    ours = jax.jit(network)(network.params, pixels)["features"]
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{error:.2e} of the largest feature")
    assert error < 5e-5
