"""Folders of images, one folder for each class, as torchvision's ImageFolder reads them."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.class_names import ClassNamesError, check_same_classes
from pipeline.data.decode import open_picture, to_rgb
from pipeline.data.write_parquet import write_parquet

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLITS = ("train", "training", "validation", "valid", "val", "test", "testing")
AHEAD = 256  # images that are read and checked at a time


@dataclass(frozen=True)
class Folder:
    """What a tree of images holds.

    Attributes:
        class_names: In the order of their labels.
        splits: Of each split its image files, by class.
        label_of: Of each image file the position of its class.
        ignored: How many files are left out, by what they are: a suffix, or ``hidden``.
    """

    class_names: tuple[str, ...]
    splits: dict[str, list[Path]]
    label_of: dict[Path, int]
    ignored: Counter[str]


def scan(folder: Path) -> Folder:
    """Find ``<folder>/<split>/<class>/**/<image>``, or ``<folder>/<class>/**/<image>`` as train.

    A class has the images of all folders below its own, as for torchvision's ImageFolder. With
    images at two depths, only folders named like splits are taken for splits.

    Raises:
        ValueError: The folder is laid out in another way, a class has no images, two splits have
            other classes, or an image is a link that leads nowhere.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    named = [child for child in children(folder) if child.name.lower() in SPLITS]
    flat = any(images_in(child) for child in children(folder)) and not named
    deep = any(images_below(inner) for child in children(folder) for inner in children(child))
    if not (flat or deep) or images_in(folder):
        raise ValueError(
            f"{folder} must hold <split>/<class>/<image> or <class>/<image>, the images ending in "
            f"{', '.join(SUFFIXES)}"
        )
    parts = {"train": folder} if flat else {child.name: child for child in children(folder)}
    if wrong := [name for name in parts if not re.fullmatch(r"\w+", name)]:
        raise ValueError(f"split names must be letters, digits and _, got {wrong[0]!r}")
    names = {
        split: by_number([kind.name for kind in children(part)]) for split, part in parts.items()
    }
    check_splits(folder, names)
    found = {
        split: {name: filled(part / name) for name in names[split]} for split, part in parts.items()
    }
    class_names = next(iter(names.values()))
    splits = {
        split: [f for files in kinds.values() for f in files] for split, kinds in found.items()
    }
    label_of = {
        file: class_names.index(name)
        for kinds in found.values()
        for name, files in kinds.items()
        for file in files
    }
    left = [path for path in folder.rglob("*") if path.is_file() and path not in label_of]
    return Folder(tuple(class_names), splits, label_of, Counter(map(what_is, left)))


def by_number(names: list[str]) -> list[str]:
    """Order classes whose names are all numbers by these: 2 before 10, as published labels are."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def check_splits(folder: Path, names: Mapping[str, Sequence[str]]) -> None:
    """Refuse splits whose classes differ, with the likely cause.

    Raises:
        ValueError: A split has other classes than the first one.
    """
    first = next(iter(names))
    for split, own in names.items():
        try:
            check_same_classes(f"{folder / first}", names[first], f"{folder / split}", own)
        except ClassNamesError as error:
            layout = "" if split.lower() in SPLITS else f"; is {split!r} a class and no split?"
            raise ValueError(f"splits must have the same class folders: {error}{layout}") from None


def what_is(path: Path) -> str:
    """Say what a file is that is left out: hidden, its suffix, or that it has none."""
    return "hidden" if path.name.startswith(".") else path.suffix.lower() or "no suffix"


def children(folder: Path) -> list[Path]:
    """List the folders in a folder by name, without hidden ones."""
    found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(found)


def images_in(folder: Path) -> list[Path]:
    """List the images that lie in a folder by name, without hidden ones.

    Raises:
        ValueError: One is a link that leads nowhere (git-annex, DVC: the file was not fetched).
    """
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    images = sorted(path for path in found if not path.name.startswith(".") and not path.is_dir())
    for path in images:
        if not path.exists():
            raise ValueError(f"{path} is a link to {path.readlink()}, which is not there")
    return images


def images_below(folder: Path) -> list[Path]:
    """List the images of a folder, and of the folders below it, without hidden ones."""
    below = [image for child in children(folder) for image in images_below(child)]
    return [*images_in(folder), *below]


def filled(folder: Path) -> list[Path]:
    """List the images of a class folder, which has some."""
    if not (found := images_below(folder)):
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
    splits = found.splits
    if mixed:
        splits = {name: random.Random(name).sample(f, len(f)) for name, f in splits.items()}
    return [
        write_parquet(
            target,
            split,
            ((data, file.name) for data, file in zip(verified(files), files, strict=True)),
            {label: [found.label_of[file] for file in files]},
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
