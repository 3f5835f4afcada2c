"""Trees from above: aerial photographs with a box around every crown, from the package deepforest 2.1.0 (MIT licence).

Weinstein 2019, "Individual tree-crown detection in RGB imagery using semi-supervised deep learning neural networks".
The four annotated images among the package's own data are of the National Ecological Observatory Network, at about 0.1
m a pixel: two of Yellowstone (574 and 279 trees), one of Ordway-Swisher in Florida (61), one of Soaproot Saddle in
California (37). They are cut into tiles. Four images cannot tell how well a detector finds trees elsewhere; the second
one of Yellowstone shows whether it learnt anything that holds beyond the image that it was trained on.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from research import assets
from research.data.boxes import clipped
from research.errors import UserError

SOURCE = (
    "pypi://deepforest==2.1.0/deepforest/data#sha256=8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
)
TILE = 128  # pixels, about
LEAST_VISIBLE = 0.5  # a tree of which a tile shows less is no object, and no background either


class Region(NamedTuple):
    """A part of an image, from a row to another one, as shares of its height.

    Attributes:
      image: the file's name without its ending.
      top: where it begins.
      bottom: where it ends.
      shift: whether tiles overlap by half, so that trees are seen in several places; otherwise they do not overlap.
    """

    image: str
    top: float = 0.0
    bottom: float = 1.0
    shift: bool = False


SPLITS = {
    "train": [Region("2019_YELL_2_528000_4978000_image_crop2", 0.0, 0.8, shift=True)],
    "validation": [Region("2019_YELL_2_528000_4978000_image_crop2", 0.8, 1.0)],
    "test": [Region("2019_YELL_2_541000_4977000_image_crop")],
    "other_sites": [Region("OSBS_029"), Region("SOAP_061")],
}

with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class Deepforest(tfds.core.GeneratorBasedBuilder):
        """Tiles of about 128 x 128 pixels: see SPLITS. No tile of a split overlaps one of another split.

        Features: `image`; `image/filename`; `region`, (top, left, bottom, right) of the tile in the image, in pixels;
        and `objects`: `bbox` (top, left, bottom, right as shares of the tile), `label` and `is_crowd`. Boxes are
        clipped to the tile. Those of which less than half is left are marked as crowds: they are not trained on, and
        evaluations neither ask for them nor count what is found there as wrong.
        """

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "image/filename": tfds.features.Text(),
                "region": tfds.features.Tensor(shape=(4,), dtype=np.int32),
                "objects": tfds.features.Sequence(
                    {
                        "bbox": tfds.features.BBoxFeature(),
                        "label": tfds.features.ClassLabel(names=["tree"]),
                        "is_crowd": np.bool_,
                    }
                ),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # assets fetch, check and cache
            folder = assets.resolve(SOURCE)
            return {split: self._generate_examples(folder, regions) for split, regions in SPLITS.items()}

        def _generate_examples(
            self, folder: pathlib.Path, regions: list[Region]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            made = itertools.chain.from_iterable(examples(folder, region) for region in regions)
            yield from enumerate(made)


def examples(folder: pathlib.Path, region: Region) -> Iterator[dict[str, Any]]:
    """Yield the tiles of a region, row by row, with their trees."""
    picture = PIL.Image.open(folder / f"{region.image}.png").convert("RGB")
    sides = np.array([picture.height, picture.width])
    trees = read(folder / f"{region.image}.xml") / np.tile(sides, 2)
    every = {"bbox": trees, "number": np.arange(len(trees))}
    top, bottom = (round(share * picture.height) for share in (region.top, region.bottom))
    for rows, columns in itertools.product(spans(top, bottom, region.shift), spans(0, picture.width, region.shift)):
        start, end = np.array([rows, columns]).T
        found, whole = (clipped(every, start / sides, (end - start) / sides, least) for least in (0.0, LEAST_VISIBLE))
        crowds = ~np.isin(found["number"], whole["number"])
        yield {
            "image": picture.crop((*start[::-1].tolist(), *end[::-1].tolist())),
            "image/filename": f"{region.image}.png",
            "region": np.concatenate([start, end]).astype(np.int32),
            "objects": [
                {"bbox": tfds.features.BBox(*box.tolist()), "label": "tree", "is_crowd": bool(crowd)}
                for box, crowd in zip(found["bbox"], crowds)
            ],
        }


def spans(start: int, end: int, shift: bool) -> list[tuple[int, int]]:
    """Cut a range into parts of about TILE; with `shift`, those from middle to middle of these come too."""
    edges = np.linspace(start, end, max(round((end - start) / TILE), 1) + 1).round().astype(int).tolist()
    middles = [(a + b) // 2 for a, b in itertools.pairwise(edges)] if shift else []
    return [*itertools.pairwise(edges), *itertools.pairwise(middles)]


def read(path: pathlib.Path) -> np.ndarray:
    """Return the boxes (top, left, bottom, right) in a Pascal VOC file, in pixels, float [n, 4]."""
    try:
        found = [
            [float(box.findtext(key, "")) for key in ("ymin", "xmin", "ymax", "xmax")]
            for box in ElementTree.parse(path).iter("bndbox")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"'{path}' is no file of boxes in Pascal VOC's format: {error}") from None
    return np.array(found).reshape(-1, 4)
