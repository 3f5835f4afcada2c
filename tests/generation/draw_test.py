"""--mode=generate of runs that draw images, and of published weights."""

import json
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest

from research import generate, main, train
from research.configuration import overrides
from research.errors import UserError
from research.generation import draw
from research.generation.diffusion import Sampling
from research.models.dit import DiT
from research.pretrained import huggingface
from research.tasks.diffusion import Diffusion

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "dit_fashion_mnist.py:tiny"
TASK = Diffusion(DiT(num_classes=3, num_channels=1), label_names=("a disc", "square", "T-shirt/top"))
LATENTS = Diffusion(DiT(num_classes=30))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dit"
    config = overrides.load(str(CONFIG))
    config.num_steps, config.log.evaluate_every_steps = 10, 0
    train.run(config, folder)
    return folder


@pytest.fixture
def generated(run, capsys):
    def generate(*flags, status=0):
        capsys.readouterr()
        assert main.main(["--mode=generate", f"--workdir={run}", *flags]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return generate


def test_arrays_are_repeatable(generated, tmp_path):
    def arrays(name, *flags):
        path = tmp_path / f"{name}.npz"
        assert generated(f"--output={path}", *flags) == f"{path}\n"
        return np.load(path)

    one = arrays("one", "--prompt=square*2, 0")
    np.testing.assert_array_equal(one["label"], [1, 1, 0])
    assert one["image"].shape == (3, 28, 28, 1)
    assert one["image"].dtype == np.float32
    np.testing.assert_array_equal(one["image"], arrays("again", "--prompt=1*2,disc")["image"])
    np.testing.assert_allclose(one["image"][:2], arrays("fewer", "--prompt=square*2")["image"], rtol=1e-4, atol=1e-5)
    for change in ("seed=1", "task.sampling.guidance=1.0", "task.sampling.steps=3", "task.sampling.sampler=ddpm"):
        other = arrays("other", "--prompt=square*2,0", f"--config.{change}")["image"]
        assert np.abs(one["image"] - other).max() > 1e-3, change


def test_pictures(generated, run, tmp_path):
    assert generated() == f"{run}/figures/generated.png\n"
    whole = np.asarray(PIL.Image.open(run / "figures" / "generated.png"))
    generated("--prompt=cross*4", f"--output={tmp_path}/few.png")
    few = np.asarray(PIL.Image.open(tmp_path / "few.png"))
    assert whole.shape[0] > few.shape[0]
    assert whole.shape[1] > few.shape[1]
    generated("--prompt=cross*2,disc", f"--output={tmp_path}/new/folder")
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in files] == ["00000-cross.png", "00001-cross.png", "00002-disc.png"]
    assert PIL.Image.open(files[0]).size == (28, 28)
    generated("--prompt=cross*2,disc", f"--output={tmp_path}/same.npz")
    pixels = (np.load(tmp_path / "same.npz")["image"][0, ..., 0] * 0.5 + 0.5).clip(0, 1) * 255
    np.testing.assert_allclose(np.asarray(PIL.Image.open(files[0])), pixels, atol=0.51)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=sqare"], "--prompt: unknown class 'sqare'; did you mean 'square'?"),
        (["--prompt=3"], "--prompt: unknown class '3'"),
        (["--prompt=disc*0"], "--prompt: it requests no images"),
        (["--input=-"], "--input: images are drawn by class"),
        (["--output=x.jpg"], "--output: 'x.jpg' is neither a .png file"),
        (["--config.task.sampling.sampler=dpm"], "'dpm' does not fit config.task.process"),
    ],
)
def test_mistakes(flags, message, generated):
    error = generated(*flags, status=2)
    assert message in error
    assert error.count("\n") == 1


def test_predict_says_where_to_go(run, capsys, tmp_path):
    PIL.Image.new("L", (28, 28)).save(tmp_path / "x.png")
    (tmp_path / "in.jsonl").write_text(json.dumps({"image": f"{tmp_path}/x.png"}))
    assert main.main(["--mode=predict", f"--workdir={run}", f"--input={tmp_path}/in.jsonl"]) == 2
    assert "nothing to predict; --mode=generate draws images" in capsys.readouterr().err


def test_it_is_exported_as_diffusers_has_it(run, tmp_path, capsys):
    assert main.main(["--mode=export", f"--workdir={run}", f"--output={tmp_path}/dit"]) == 0
    model = huggingface.load_model(str(tmp_path / "dit"), "denoiser")
    assert (model.num_classes, model.image_size, model.learned_variance) == (3, 28, False)


def test_classes():
    assert draw.classes(TASK, "") == [0] * 8 + [1] * 8 + [2] * 8
    assert draw.classes(TASK, " T-shirt/top * 2 ,a disc, 1") == [2, 2, 0, 1]
    assert draw.classes(LATENTS, "") == [label for label in range(10) for _ in range(8)]
    assert draw.classes(LATENTS, "29*3") == [29] * 3


def test_latents_are_no_pictures(tmp_path):
    assert draw.target(LATENTS, "-", tmp_path) == tmp_path / "figures" / "generated.npz"
    for output in ("x.png", "folder"):
        with pytest.raises(UserError, match="4 channels are latents, not images"):
            draw.target(LATENTS, output, tmp_path)


def test_published_weights_need_no_run(tmp_path, capsys):
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 4, "num_classes": 3, "hidden_size": 32}
    model = DiT(**sizes, num_layers=1, num_heads=2, intermediate_size=128)
    arguments = np.zeros((1, *model.shape), np.float32), np.zeros(1), np.zeros(1, np.int32)
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(model.init)(jax.random.key(0), *arguments)["params"])
    path = huggingface.save(tmp_path / "weights", model, params)
    config = overrides.load(str(CONFIG.with_name("dit_imagenet.py:published")))
    config.task.model.path = config.init.path = str(path)
    config.task.model.dtype = "float32"
    config.task.sampling.steps, config.batch_size = 3, 2
    generate.run(config, tmp_path / "none", prompt="2*3", output=str(tmp_path / "x.npz"))
    captured = capsys.readouterr()
    assert "holds no checkpoints: taking the weights" in captured.err
    found = np.load(tmp_path / "x.npz")["image"]
    assert found.shape == (3, 8, 8, 4)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(3))
    task = Diffusion(model, sampling=Sampling("ddpm", 3, guidance=1.5))
    wanted = task.draw(params, np.full(3, 2, np.int32), keys, task.sampling)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    assert not (tmp_path / "none").exists()
