"""Which images a folder holds, here or in a bucket."""

import os
import pathlib

from research import storage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def find(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Return the images in a folder, at any depth, and the other files, both in the order of their names.

    An image is what ends in one of `SUFFIXES`; what systems put everywhere (.DS_Store, Thumbs.db, ...) is neither. A
    link to a folder is followed, unless it stands in that folder.
    """
    if storage.is_remote(folder):
        found = [folder / name for name in storage.find(folder) if not any(map(is_hidden, name.split("/")))]
    else:
        found = _walk(folder)
    images = [path for path in found if path.suffix.lower() in SUFFIXES]
    return sorted(images, key=_parts), sorted(set(found) - set(images), key=_parts)


def _parts(path: pathlib.Path) -> tuple[str, ...]:
    return path.parts


def _walk(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        here = pathlib.Path(place)
        above = {path.resolve() for path in (here, *here.parents)}
        folders[:] = [name for name in folders if not is_hidden(name) and (here / name).resolve() not in above]
        found += [pathlib.Path(place, name) for name in names if not is_hidden(name)]
    return found


def is_hidden(name: str) -> bool:
    """Return whether a file or a folder of this name is one that systems put everywhere."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")
