"""List, fetch, import and check datasets: ``python -m pipeline.data_tool --help``."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.table import Table

from pipeline.data import DATASETS, OnDisk
from pipeline.data.splits import Splits, locate

if TYPE_CHECKING:
    from pipeline.data.files import Place
    from pipeline.data.image_folder import Folder
    from pipeline.data.parquet import Layout

ABOUT = """\
Datasets are looked for in $ROBUST_MOE_DATA/<folder> (without it: data/<folder>), as Hugging Face
exports them: <split>-*.parquet with an image column img or image, and label or fine_label.
ROBUST_MOE_DATA may be a URI that pyarrow reads: s3://bucket/prefix, gs://bucket/prefix.

  list                 which datasets there are, where they are looked for, and what is there
  fetch NAME           download cifar10, cifar100, tiny_imagenet or imagenette; for imagenet:
                       what to put where, since its terms must be accepted first
  import FOLDER NAME   FOLDER/<split>/<class>/*.png|jpg, or FOLDER/<class>/*.png|jpg, to parquet
  check NAME|FOLDER    decode and verify every row
"""
EXITS = (
    "Exits with 0, with 1 and one line that says what is damaged or failed, or with 2 on bad usage."
)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m pipeline.data_tool",
        description=ABOUT,
        epilog=EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="show which datasets there are")
    fetch = commands.add_parser("fetch", help="download a dataset")
    fetch.add_argument("name", metavar="NAME", help="of a dataset")
    bring = commands.add_parser("import", help="turn folders of images into parquet")
    bring.add_argument("folder", metavar="FOLDER", type=Path)
    bring.add_argument("name", metavar="NAME", help="name of the dataset to write")
    for command in (fetch, bring):
        command.add_argument(
            "--to", metavar="DIR", type=Path, help="write DIR/NAME; default: $ROBUST_MOE_DATA/NAME"
        )
    check = commands.add_parser("check", help="decode and verify every row")
    check.add_argument("target", metavar="NAME|FOLDER")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    try:
        match given.command:
            case "list":
                show_list()
            case "fetch":
                fetch(parser, given.name, given.to)
            case "import":
                bring(parser, given.folder, given.name, given.to)
            case "check":
                check(parser, given.target)
    except (ValueError, OSError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def show_list() -> None:
    """Show every dataset of the registry with the rows of its splits."""
    table = Table("dataset", "classes", "pixels", "looked for in", "rows")
    for name, kind in DATASETS.items():
        settings = kind()
        where, rows = "needs no files", "always there"
        size = f"{settings.image_size} x {settings.image_size}"
        if isinstance(settings, OnDisk):
            folder = locate("", settings.folder)
            where, rows = str(folder), rows_there(folder, settings)
            size = f"any, to {size}" if settings.any_size else size
        table.add_row(name, str(settings.num_classes), size, where, rows)
    show(table)


def splits_of(settings: OnDisk, folder: "Place") -> list[str]:
    """Name the splits of a dataset; the one to test on as it is called in this folder."""
    from pipeline.data.files import TESTS, find_test

    return [(name in TESTS and find_test(folder)) or name for name in settings.split_names]


def rows_there(folder: "Place", settings: OnDisk) -> str:
    """Count the rows of each split, or say in a few words why not."""
    from pipeline.data.files import DamagedDataError, find_shards
    from pipeline.data.parquet import count_rows

    try:
        if not folder.is_dir():
            return "not there"
        counts = {
            split: sum(count_rows(file) for file in find_shards(folder, split))
            for split in splits_of(settings, folder)
        }
    except DamagedDataError as error:
        return str(error)
    return ", ".join(f"{split} {count}" for split, count in counts.items())


def fetch(parser: Parser, name: str, to: Path | None) -> None:
    """Download a dataset, or say what to do instead."""
    from pipeline.data.download import BY_HAND, FETCHED
    from pipeline.data.download import fetch as fetch_named

    if name not in DATASETS and name not in FETCHED:
        parser.error(f"no dataset {name!r}, only {', '.join(dict.fromkeys([*DATASETS, *FETCHED]))}")
    if name in BY_HAND:
        raise ValueError(BY_HAND[name].format(folder=target_folder(name, to)))
    if name not in FETCHED:
        print(f"{name} needs no files: there is nothing to fetch")
        return
    try:
        written = fetch_named(name, target_folder(name, to))
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"{name} could not be fetched: {error}") from error
    for file in written:
        print(f"wrote {file}")


def bring(parser: Parser, folder: Path, name: str, to: Path | None) -> None:
    """Turn folders of images into parquet."""
    from pipeline.data.image_folder import import_folder, scan

    if not re.fullmatch(r"\w[\w.-]*", name):
        parser.error(f"NAME must be letters, digits, '_', '-' and '.', got {name!r}")
    if not folder.is_dir():
        parser.error(f"folder {folder} does not exist")
    kind = DATASETS.get(name)
    label, target = getattr(kind, "label_column", "label"), target_folder(name, to)
    found = scan(folder)
    written = import_folder(
        found,
        target,
        image_column="image",
        label=label,
        mixed=getattr(kind, "any_size", False),
    )
    for file in written:
        print(f"wrote {file}")
    print(f"{len(found.class_names)} classes: {', '.join(found.class_names)}")
    for what, count in sorted(found.ignored.items()):
        print(f"ignored {count} files: {what}")
    check_leftovers(target, label, found)


def check_leftovers(folder: Path, label: str, found: "Folder") -> None:
    """Say which splits of an earlier import are still in the folder.

    Raises:
        ValueError: One of them has other classes than the new ones.
    """
    from pipeline.data.class_names import ClassNamesError, check_same_classes
    from pipeline.data.files import find_shards, find_splits
    from pipeline.data.parquet import class_names

    for split in set(find_splits(folder)) - set(found.splits):
        for file in find_shards(folder, split):
            print(f"{file} is of an earlier import, and stays")
            try:
                old = class_names(file, label)
                check_same_classes("the new import", found.class_names, str(file), old)
            except ClassNamesError as error:
                raise ValueError(f"{error}; remove that file, or import its split again") from None


def target_folder(name: str, to: Path | None) -> Path:
    """Name the folder to write."""
    name = getattr(DATASETS.get(name), "folder", name)
    folder = to / name if to else locate("", name)
    if not isinstance(folder, Path):
        raise ValueError(f"{folder} cannot be written: give a folder by --to and copy it there")
    return folder


def check(parser: Parser, target: str) -> None:
    """Decode every row of a dataset or a folder, and show what is there."""
    from pipeline.data.files import find_splits, place
    from pipeline.data.parquet import Layout
    from pipeline.data.validate import guess_layout

    settings = DATASETS[target]() if target in DATASETS else None
    if isinstance(settings, OnDisk):
        size = None if settings.any_size else settings.image_size
        layout = Layout(settings.label_column, settings.num_classes, size)
        folder = locate("", settings.folder)
        check_files(folder, splits_of(settings, folder), layout)
    elif settings:
        show_made(target, settings.load(seed=0))
    elif there := [path for path in (place(target), locate("", target)) if path.is_dir()]:
        check_files(there[0], find_splits(there[0]), guess_layout(there[0]))
    else:
        parser.error(f"no folder and no dataset {target!r}, only {', '.join(DATASETS)}")


def check_files(folder: "Place", splits: Sequence[str], layout: "Layout") -> None:
    """Decode every row of these splits, and show their counts and hashes."""
    from pipeline.data.files import Place, find_shards, fingerprint
    from pipeline.data.validate import check_names, check_split

    every = [file for split in splits for file in find_shards(folder, split)]
    check_names(every, layout.label)
    table = Table("split", "rows", "classes", "per class", "pixels", "modes")
    hashes, files = [], list[Place]()
    for split in splits:
        found = check_split(folder, split, layout)
        counts = found.classes.values()
        table.add_row(
            split,
            str(sum(counts)),
            f"{len(counts)} of {layout.num_classes or 'unknown'}",
            f"{min(counts)}-{max(counts)}",
            shorten(found.sizes),
            shorten(found.modes),
        )
        hashes.append(f"sha256 {fingerprint(found.files)} {split}")
        files += found.files
    print(f"{folder}: every row is sound")
    show(table)
    print("\n".join([*hashes, f"sha256 {fingerprint(files)} all"]))


def show_made(name: str, splits: Splits) -> None:
    """Show what a dataset without files holds."""
    table = Table("split", "rows", "classes", "per class")
    for split, images in (
        ("train", splits.train),
        ("validation", splits.validation),
        ("test", splits.test),
    ):
        counts = Counter(images.labels_N.tolist()).values()
        classes = f"{len(counts)} of {len(splits.class_names)}"
        table.add_row(split, str(len(images)), classes, f"{min(counts)}-{max(counts)}")
    print(f"{name} needs no files")
    show(table)
    print(f"sha256 {splits.sha256} all")


def shorten(counts: Counter[str]) -> str:
    """List the most frequent values and how many others there are."""
    few = [f"{value}: {count}" for value, count in counts.most_common(4)]
    return ", ".join(few) + (f", {len(counts) - 4} others" if len(counts) > 4 else "")


def show(table: Table) -> None:
    for column in table.columns:
        column.overflow = "fold"
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
