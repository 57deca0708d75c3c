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
from pipeline.data.loading import Splits, locate

if TYPE_CHECKING:
    from pipeline.data.parquet import Layout

ABOUT = """\
Datasets are looked for in $ROBUST_MOE_DATA/<name> (without it: data/<name>), as Hugging Face
exports them: <split>-*.parquet with an image column img or image, and label or fine_label.

  list                 which datasets there are, where they are looked for, and what is there
  fetch NAME           download cifar10 or cifar100
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
    fetch.add_argument("name", metavar="NAME", help="cifar10 or cifar100")
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
        if isinstance(settings, OnDisk):
            where, rows = str(locate("", name)), rows_there(locate("", name), settings.split_names)
        classes, size = str(settings.num_classes), str(settings.image_size)
        table.add_row(name, classes, f"{size} x {size}", where, rows)
    show(table)


def rows_there(folder: Path, splits: Sequence[str]) -> str:
    """Count the rows of each split, or say in a few words why not."""
    from pipeline.data.parquet import DamagedDataError, count_rows, find_shards

    if not folder.is_dir():
        return "not there"
    try:
        counts = {
            split: sum(count_rows(file) for file in find_shards(folder, split)) for split in splits
        }
    except DamagedDataError as error:
        return str(error)
    return ", ".join(f"{split} {count}" for split, count in counts.items())


def fetch(parser: Parser, name: str, to: Path | None) -> None:
    """Download a dataset, or say that it needs no download."""
    from pipeline.data.fetching import FETCHED
    from pipeline.data.fetching import fetch as fetch_named

    if name not in DATASETS:
        parser.error(f"no dataset {name!r}, only {', '.join(DATASETS)}")
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
    label = getattr(DATASETS.get(name), "label_column", "label")
    found = scan(folder)
    for file in import_folder(found, target_folder(name, to), image_column="image", label=label):
        print(f"wrote {file}")
    print(f"{len(found.class_names)} classes: {', '.join(found.class_names)}")
    if found.ignored:
        print(f"ignored {found.ignored} files that are not .png, .jpg or .jpeg")


def target_folder(name: str, to: Path | None) -> Path:
    return to / name if to else locate("", name)


def check(parser: Parser, target: str) -> None:
    """Decode every row of a dataset or a folder, and show what is there."""
    from pipeline.data.checking import guess_layout
    from pipeline.data.parquet import Layout, find_splits

    settings = DATASETS[target]() if target in DATASETS else None
    if isinstance(settings, OnDisk):
        layout = Layout(settings.label_column, settings.num_classes, settings.image_size)
        check_files(locate("", target), settings.split_names, layout)
    elif settings:
        show_made(target, settings.load(seed=0))
    elif there := [path for path in (Path(target), locate("", target)) if path.is_dir()]:
        check_files(there[0], find_splits(there[0]), guess_layout(there[0]))
    else:
        parser.error(f"no folder and no dataset {target!r}, only {', '.join(DATASETS)}")


def check_files(folder: Path, splits: Sequence[str], layout: "Layout") -> None:
    """Decode every row of these splits, and show their counts and hashes."""
    from pipeline.data.checking import check_split
    from pipeline.data.parquet import fingerprint

    table = Table("split", "rows", "classes", "per class", "pixels", "modes")
    hashes, files = [], []
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
