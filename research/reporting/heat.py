"""Maps of numbers as pictures, uint8 [H, W, 3], alone and over an image.

Images are float [H, W, 1 or 3] in [0, 1]; maps that lie over one have its height and width.
"""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw

FOR, AGAINST = (0, 114, 178), (213, 94, 0)  # as the page's text has them: Okabe and Ito's blue and vermilion
PALE, DEEP = (247, 251, 255), (8, 48, 107)
LEAST, MOST = 240, 512  # pixels of the longer side of what is drawn over an image


def over(image: np.ndarray, map_HxW: np.ndarray) -> np.ndarray:
    """Return a grey image in which what raises a number is blue and what lowers it orange; the largest is opaque."""
    largest = np.abs(map_HxW).max()
    share_HxWx1 = (np.abs(map_HxW) / largest if largest else np.zeros_like(map_HxW))[..., None] * 0.8
    colour = np.where(map_HxW[..., None] >= 0, np.array(FOR, float), np.array(AGAINST, float))
    grey = 64 + 0.6 * 255 * image.mean(axis=-1, keepdims=True)
    return enlarged((grey * (1 - share_HxWx1) + colour * share_HxWx1).astype(np.uint8))


def lit(image: np.ndarray, map_HxW: np.ndarray) -> np.ndarray:
    """Return an image that is as bright as a map of numbers that are not negative; a fifth where it is 0."""
    largest = map_HxW.max()
    share = (map_HxW / largest if largest else np.zeros_like(map_HxW))[..., None]
    colours = np.broadcast_to(image, (*image.shape[:2], 3))
    return enlarged((255 * colours * (0.2 + 0.8 * share)).astype(np.uint8))


def scaled(map_TxS: np.ndarray) -> np.ndarray:
    """Return a map of numbers that are not negative from pale, 0, to deep blue, its largest."""
    share = (map_TxS / (map_TxS.max() or 1.0))[..., None]
    return (np.array(PALE) * (1 - share) + np.array(DEEP) * share).astype(np.uint8)


def boxed(image: np.ndarray, box: Sequence[float] | None) -> np.ndarray:
    """Return an image, float or drawn, with a box: left, top, right, bottom as shares of it; None for none."""
    if image.dtype != np.uint8:
        image = enlarged((255 * np.broadcast_to(image, (*image.shape[:2], 3))).round().astype(np.uint8))
    if box is None:
        return image
    picture = PIL.Image.fromarray(image)
    draw = PIL.ImageDraw.Draw(picture)
    width, height = picture.size
    left, top, right, bottom = box[0] * (width - 1), box[1] * (height - 1), box[2] * (width - 1), box[3] * (height - 1)
    for inset, colour in ((0, "black"), (1, "white"), (2, "white"), (3, "black")):  # seen on any ground
        if right - left > 2 * inset and bottom - top > 2 * inset:
            draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=colour)
    return np.asarray(picture)


def enlarged(image: np.ndarray) -> np.ndarray:
    """Return an image of a size to look at: small ones with their pixels as squares, large ones made smaller."""
    longest = max(image.shape[:2])
    if longest < LEAST:
        times = -(-LEAST // longest)
        return image.repeat(times, axis=0).repeat(times, axis=1)
    if longest <= MOST:
        return image
    height, width = (max(round(side * MOST / longest), 1) for side in image.shape[:2])
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.LANCZOS))


def grid(values_S: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """Return values of places as the rows and columns that equal strides over an image make, or None."""
    for stride in range(1, max(shape) + 1):
        rows, columns = (-(-side // stride) for side in shape)
        if rows * columns == len(values_S):
            return values_S.reshape(rows, columns)
    return None


def spread(grid_hxw: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a grid's values over all pixels of an image."""
    rows = np.arange(shape[0]) * grid_hxw.shape[0] // shape[0]
    columns = np.arange(shape[1]) * grid_hxw.shape[1] // shape[1]
    return grid_hxw[rows][:, columns]
