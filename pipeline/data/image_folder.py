"""Folders of images, one folder for each class, as torchvision's ImageFolder reads them."""

import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.decode import open_picture, to_rgb
from pipeline.data.write_parquet import write_parquet

SUFFIXES = (".png", ".jpg", ".jpeg")
AHEAD = 256  # images that are read and checked at a time


@dataclass(frozen=True)
class Folder:
    """Class names in the order of their labels; for each split its image files, by class."""

    class_names: tuple[str, ...]
    splits: dict[str, list[Path]]
    ignored: int


def scan(folder: Path) -> Folder:
    """Find ``<folder>/<split>/<class>/<image>``, or ``<folder>/<class>/<image>`` as split train.

    Raises:
        ValueError: The folder is laid out in another way, or a class has no images.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    flat = any(images_in(child) for child in children(folder))
    deep = any(images_in(inner) for child in children(folder) for inner in children(child))
    if flat == deep or images_in(folder):
        raise ValueError(
            f"{folder} must hold <split>/<class>/<image> or <class>/<image>, the images ending in "
            f"{', '.join(SUFFIXES)}"
        )
    parts = {"train": folder} if flat else {child.name: child for child in children(folder)}
    if wrong := [name for name in parts if not re.fullmatch(r"\w+", name)]:
        raise ValueError(f"split names must be letters, digits and _, got {wrong[0]!r}")
    splits = {
        name: [f for kind in children(part) for f in filled(kind)] for name, part in parts.items()
    }
    class_names = sorted({kind.name for part in parts.values() for kind in children(part)})
    files = sum(1 for path in folder.rglob("*") if path.is_file())
    ignored = files - sum(len(found) for found in splits.values())
    return Folder(tuple(class_names), splits, ignored)


def children(folder: Path) -> list[Path]:
    """List the folders in a folder by name, without hidden ones."""
    found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(found)


def images_in(folder: Path) -> list[Path]:
    """List the images that lie in a folder by name, without hidden ones."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def filled(folder: Path) -> list[Path]:
    """List the images of a class folder, which has some."""
    if not (found := images_in(folder)):
        raise ValueError(f"class folder {folder} holds no images")
    return found


def import_folder(
    found: Folder, target: Path, *, image_column: str, label: str, mixed: bool = False
) -> list[Path]:
    """Write all splits as parquet with the bytes of the images unchanged.

    Rows go class by class, or ``mixed``, always in the same way: a set that is streamed is shuffled
    by row groups, and a row group of one class would spoil that.

    Raises:
        ValueError: An image cannot be decoded; the message names it.
    """
    number_of = {name: number for number, name in enumerate(found.class_names)}
    splits = found.splits
    if mixed:
        splits = {name: random.Random(name).sample(f, len(f)) for name, f in splits.items()}
    return [
        write_parquet(
            target,
            split,
            ((data, file.name) for data, file in zip(verified(files), files, strict=True)),
            {label: [number_of[file.parent.name] for file in files]},
            {label: found.class_names},
            image_column=image_column,
        )
        for split, files in splits.items()
    ]


def verified(files: Sequence[Path]) -> Iterator[bytes]:
    """Read image files in order, each one decoded once to be sure that it can be."""

    def read(file: Path) -> bytes:
        data = file.read_bytes()
        try:
            to_rgb(open_picture(data))
        except ValueError as error:
            raise ValueError(f"{file}: image {error}") from error
        return data

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), AHEAD):
            yield from pool.map(read, files[start : start + AHEAD])
