"""Image generation with a diffusion model, for --mode=generate."""

import pathlib
import re
from collections.abc import Sequence

import numpy as np
import PIL.Image
from ml_collections import ConfigDict

from research import storage
from research.build import build
from research.errors import UserError, nearest
from research.evaluators import samples
from research.experiment import Experiment
from research.reporting import pictures
from research.task import Params
from research.tasks.diffusion import Diffusion

EACH = 8  # default number of images per class
SHOWN = 10  # default number of classes


def experiment(config: ConfigDict, workdir: pathlib.Path) -> Experiment:
    """Return the objects of a config without loading its training data."""
    if config.get("derived"):
        return Experiment(config, workdir=workdir)
    config = ConfigDict(config.to_dict())
    config.derived = {"label_names": [], "num_steps": config.get("num_steps") or 1, "spec": {}}
    shape = Experiment(config).task.model.shape
    config.derived.spec = {
        "image": {"shape": [1, *shape], "dtype": "float32"},
        "label": {"shape": [1], "dtype": "int32"},
    }
    return Experiment(config, workdir=workdir)


def classes(task: Diffusion, prompt: str) -> list[int]:
    """Return the class of each requested image.

    Args:
      task: the diffusion task.
      prompt: names or numbers of classes, separated by commas, each optionally with "*8" for eight images; "" for a few
        images of the first classes.

    Raises:
      UserError: a class is unknown, or no image is requested.
    """
    known = samples.names(task)
    numbers = {str(i): i for i in range(len(known))} | {name: i for i, name in enumerate(known)}
    labels = []
    for part in prompt.split(",") if prompt.strip() else [f"{i}*{EACH}" for i in range(min(SHOWN, len(known)))]:
        match = re.fullmatch(r"(?P<name>.*?)(?:\*\s*(?P<count>\d+))?", part.strip())
        name, count = (match["name"].strip(), match["count"]) if match else (part, None)
        if name not in numbers:
            raise UserError(f"--prompt: unknown class '{name}'{nearest(name, known)}")
        labels += [numbers[name]] * int(count or 1)
    if not labels:
        raise UserError("--prompt: it requests no images; name at least one class")
    return labels


def target(task: Diffusion, output: str, workdir: pathlib.Path) -> pathlib.Path:
    """Return the path of the output: `output`, or for "-" a file in figures/ of the run.

    Raises:
      UserError: it is neither a .png file, a folder nor an .npz file, or the samples are latents.
    """
    visible = task.model.num_channels in (1, 3)
    path = storage.path(output)
    if output == "-":
        path = workdir / "figures" / ("generated.png" if visible else "generated.npz")
    if path.suffix not in (".png", ".npz", ""):
        raise UserError(f"--output: '{output}' is neither a .png file, for a grid, nor a folder, nor an .npz file")
    if path.suffix != ".npz":
        samples.check_pixels(task)
    if path.suffix and path.is_dir():
        raise UserError(f"--output: {path} is an existing folder, not a file")
    return path


def write(experiment: Experiment, task: Diffusion, params: Params, labels: Sequence[int], path: pathlib.Path) -> None:
    """Draw images of classes.

    Args:
      experiment: of the run; its seed makes images repeatable.
      task: of the run; its `sampling` says how.
      params: of the model.
      labels: of the images.
      path: a .png file gets a grid of them, a folder a PNG file each, an .npz file "image", float32 [N, H, W, C] in the
        units of the data, and "label".
    """
    config = experiment.config
    drawing = samples.Drawing(task, task.sampling, config.get("seed", 0))
    images = samples.draw(drawing, params, labels, config.batch_size, experiment.mesh)
    (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, image=images, label=np.asarray(labels))
        return
    pixels = pictures.pixels(images, build(config.data.get("ops", ()), "config.data.ops"))
    names = samples.names(task)
    if path.suffix == ".png":
        shown = list(dict.fromkeys(labels))
        rows = [pixels[np.asarray(labels) == label] for label in shown]
        title = samples.describe(drawing.sampling)
        PIL.Image.fromarray(pictures.by_class(rows, [names[label] for label in shown], title)).save(path)
        return
    for i, (image, label) in enumerate(zip(pixels, labels)):
        name = re.sub(r"[^\w-]+", "_", names[label])
        colours = (image[..., 0] if image.shape[-1] == 1 else image) * 255
        PIL.Image.fromarray(colours.round().astype(np.uint8)).save(path / f"{i:05d}-{name}.png")
