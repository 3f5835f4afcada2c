"""preprocessor_config.json: what Transformers does to an image before a model sees it, as a config's ops do it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data import boxes
from research.data.image import CenterCrop, Normalize, Resize

FILE = "preprocessor_config.json"
_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def describe(ops: Sequence[Any], shape: Sequence[int]) -> dict[str, Any] | None:
    """Return what the file holds; None where the ops do not normalise images.

    Args:
      ops: of a dataset whose images are not augmented; known are `Resize`, `CenterCrop` and `Normalize`, and of
        detectors `boxes.Resize` and `boxes.Targets`.
      shape: height, width and channels of what the model is trained on. Images are made as large where no op resizes.
    """
    height, width, channels = shape
    normalize = next((op for op in ops if isinstance(op, Normalize)), None)
    resize = next((op for op in ops if isinstance(op, Resize)), Resize((height, width)))
    crop = next((op for op in ops if isinstance(op, CenterCrop)), None)
    if normalize is None:
        return None
    keys: dict[str, Any] = {
        "image_processor_type": "BitImageProcessor",  # of those of Transformers one that does all of this
        "do_resize": True,
        "size": {"shortest_edge": resize.size[0]} if resize.keep_shape else _size(resize.size),
        "resample": _FILTERS[resize.interpolation],
        "do_center_crop": crop is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _each(normalize.mean, channels),
        "image_std": _each(normalize.std, channels),
        "do_convert_rgb": channels == 3,
    }
    if any(isinstance(op, boxes.Targets) for op in ops):
        return keys | _detector(ops, shape)
    return keys | ({"crop_size": _size(crop.size)} if crop else {})


def _detector(ops: Sequence[Any], shape: Sequence[int]) -> dict[str, Any]:
    """Return what the file of a detector says otherwise: images keep their shape and are padded."""
    resize = next((op for op in ops if isinstance(op, boxes.Resize)), None)
    keys = {"image_processor_type": "DetrImageProcessor", "do_pad": True, "pad_size": _size(shape)}
    if resize is None:
        return keys | {"do_resize": False}
    size = {"shortest_edge": resize.shorter, "longest_edge": resize.longer}
    return keys | {"size": size, "resample": _FILTERS[resize.interpolation]}


def _size(size: Sequence[int]) -> dict[str, int]:
    return {"height": int(size[0]), "width": int(size[1])}


def _each(numbers: np.ndarray, channels: int) -> list[float]:
    """Return a number for each channel, as the shortest decimals that 32 bits can stand for."""
    return [float(str(number)) for number in np.broadcast_to(numbers, (channels,))]
