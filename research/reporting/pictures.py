"""Pictures that evaluators return: arrays uint8 [height, width, 3], drawn without a display."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from research.data.image import Normalize

DOTS_PER_INCH = 120


def render(figure: Figure) -> np.ndarray:
    """Return a figure as an array."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DOTS_PER_INCH)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def grid(images: Sequence[np.ndarray], titles: Sequence[str], columns: int, title: str = "") -> np.ndarray:
    """Draw images [H, W] or [H, W, 1 or 3], uint8 or float in [0, 1], row by row, each under its title.

    Args:
      images: what to draw.
      titles: one for each image, broken into lines where it is longer than its image is wide; "" for none.
      columns: how many images stand in a row.
      title: above all.
    """
    rows = max(math.ceil(len(images) / columns), 1)
    names = ["\n".join(textwrap.fill(line, 22) for line in name.split("\n")) for name in titles]
    lines = max((name.count("\n") + 1 for name in names if name), default=0)
    size = (max(1.3 * columns, 4), (1.22 + 0.14 * lines) * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    for i, (image, name) in enumerate(zip(images, names)):
        axes = figure.add_subplot(rows, columns, i + 1)
        show(axes, image)
        axes.set_title(name, fontsize=8)
    _head(figure, title)
    return render(figure)


def _head(figure: Figure, title: str) -> None:
    """Write a title above a figure, in as many lines as it takes."""
    figure.suptitle(textwrap.fill(title, int(13 * figure.get_figwidth())), fontsize=10)


def show(axes: Axes, image: np.ndarray) -> None:
    """Draw one image, without ticks."""
    image = np.squeeze(image, -1) if image.ndim == 3 and image.shape[-1] == 1 else image
    top = 255 if image.dtype == np.uint8 else 1
    axes.imshow(np.clip(image, 0, top), cmap="gray", vmin=0, vmax=top, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def boxes(
    images: Sequence[np.ndarray],
    truths: Sequence[tuple[np.ndarray, np.ndarray]],
    predictions: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    names: Sequence[str],
    title: str = "",
    pairs: int = 2,
) -> np.ndarray:
    """Draw images twice, side by side: with their true boxes, and with the predicted ones and their scores.

    Args:
      images: as `grid` takes them.
      truths: for each image boxes [n, 4] (left, top, right, bottom in pixels) and classes int [n].
      predictions: the same, and scores [n].
      names: of the classes; where there is but one, it is not written beside every box.
      title: above all.
      pairs: how many images stand in a row.
    """
    rows = max(math.ceil(len(images) / pairs), 1)
    height = max((image.shape[0] / image.shape[1] for image in images), default=1.0)
    figure = Figure(figsize=(5.6 * pairs, (2.75 * height + 0.3) * rows + 0.5), layout="constrained")
    for i, (image, (right, labels), (found, classes, scores)) in enumerate(zip(images, truths, predictions)):
        for side, heading in enumerate(("true", "predicted")):
            axes = figure.add_subplot(rows, 2 * pairs, 2 * i + side + 1)
            show(axes, image)
            axes.set_title(f"{heading}, image {i}", fontsize=8)
            drawn = zip(found, classes, scores) if side else zip(right, labels, [None] * len(labels))
            for box, label, score in drawn:
                _box(axes, box, int(label), names, score)
    _head(figure, title)
    return render(figure)


def _box(axes: Axes, box: np.ndarray, label: int, names: Sequence[str], score: float | None) -> None:
    """Draw one box in the colour of its class; pixels' centres have whole coordinates.

    What is written stands on the box, from its left, but in it at the top of the image, and up to its right where the
    image soon ends.
    """
    left, top, right, bottom = box - 0.5
    colour = f"C{label % 10}"
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2))
    name = [] if len(names) == 1 else [names[label] if label < len(names) else str(label)]
    text = " ".join([*name, *([] if score is None else [f"{score:.2f}"])])
    background = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
    width, height = axes.get_xlim()[1] + 0.5, axes.get_ylim()[0] + 0.5
    x, ha = (min(right, width - 0.5), "right") if left > 0.7 * width else (max(left, -0.5), "left")
    y, va = (max(top, -0.5), "top") if top < 0.06 * height else (top, "bottom")
    if text:
        axes.text(x, y, text, fontsize=5.5, color="white", ha=ha, va=va, clip_on=True, bbox=background)


def confusion(counts: np.ndarray, names: Sequence[str], title: str = "") -> np.ndarray:
    """Draw a confusion matrix: how often each class (a row) was taken for each (a column).

    Args:
      counts: int [classes, classes]. The colour is the share of the row.
      names: of the classes; of more than 40, only some are written, and no counts.
      title: above all.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(names) <= 40
    side = min(max(0.5 * len(names) + 1.5, 4.0), 14.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the true class")
    ticks = list(range(0, len(names), 1 if few else math.ceil(len(names) / 40)))
    written = [names[i] for i in ticks]
    axes.set_xticks(ticks, written, rotation=90, fontsize=8)
    axes.set_yticks(ticks, written, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10)
    for row, column in np.argwhere(counts) if few else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=colour)
    return render(figure)


def pixels(images: Any, ops: Sequence[Any]) -> Any:
    """Return images [..., H, W, C] as they were before the `Normalize` of `ops`, in [0, 1]; numpy or JAX arrays."""
    for op in reversed(ops):
        if isinstance(op, Normalize):
            images = images * op.std + op.mean
    return images.clip(0, 1)


def by_class(rows: Sequence[np.ndarray], names: Sequence[str], title: str) -> np.ndarray:
    """Draw rows of images, each behind the name of its class.

    Args:
      rows: for each class images [N, H, W, C], C 1 or 3, in [0, 1]; the longest row says how many columns there are.
      names: of the classes.
      title: above all.
    """
    height, width, channels = rows[0].shape[1:]
    gap = max(height // 16, 1)
    columns = max(len(row) for row in rows)
    canvas = np.ones(((height + gap) * len(rows) - gap, (width + gap) * columns - gap, channels), np.float32)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = image
    across = 1.3 + 0.75 * columns
    figure = Figure(figsize=(max(across, 4), 0.75 * len(rows) * (height + gap) / (width + gap) + 0.6), layout="tight")
    axes = figure.add_subplot()
    show(axes, canvas)
    axes.set_yticks([i * (height + gap) + height / 2 for i in range(len(rows))], names, fontsize=9)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    _head(figure, title)
    return render(figure)


def reconstructions(
    true: Sequence[np.ndarray], predicted: Sequence[np.ndarray], hidden: Sequence[np.ndarray], title: str
) -> np.ndarray:
    """Draw images without their hidden parts, which are blue, as predicted, and as they are, side by side.

    Args:
      true: images, as `grid` takes them, float in [0, 1].
      predicted: as many, of the same shapes.
      hidden: as many, bool [H, W].
      title: above all.
    """
    blue, images = (0.45, 0.6, 0.8), []  # a colour that no grey image has
    for image, prediction, where in zip(true, predicted, hidden, strict=True):
        colours = np.broadcast_to(image, (*image.shape[:2], 3))
        images += [np.where(where[..., None], blue, colours), prediction, image]
    across = min(2, len(true))  # triples in a row
    return grid(images, ["masked", "predicted", "true"] * len(true), 3 * across, title)
