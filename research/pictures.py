"""Pictures that evaluators return: arrays uint8 [height, width, 3], drawn without a display."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DOTS_PER_INCH = 120


def render(figure: Figure) -> np.ndarray:
    """Returns a figure as an array."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DOTS_PER_INCH)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def grid(images: Sequence[np.ndarray], titles: Sequence[str], columns: int, title: str = "") -> np.ndarray:
    """Draws images [H, W] or [H, W, 1 or 3], uint8 or float in [0, 1], row by row, each under its title.

    Args:
      images: what to draw.
      titles: one for each image; "" for none.
      columns: how many images stand in a row.
      title: above all.
    """
    rows = max(math.ceil(len(images) / columns), 1)
    extra = 0.3 if any(titles) else 0.05
    figure = Figure(figsize=(1.3 * columns, (1.2 + extra) * rows + 0.5), layout="constrained")
    for i, (image, name) in enumerate(zip(images, titles)):
        axes = figure.add_subplot(rows, columns, i + 1)
        show(axes, image)
        axes.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return render(figure)


def show(axes: Axes, image: np.ndarray) -> None:
    """Draws one image, without ticks."""
    image = np.squeeze(image, -1) if image.ndim == 3 and image.shape[-1] == 1 else image
    top = 255 if image.dtype == np.uint8 else 1
    axes.imshow(np.clip(image, 0, top), cmap="gray", vmin=0, vmax=top, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
