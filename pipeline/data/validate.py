"""Look at every row of a parquet folder, as ``data_tool check`` does."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.data.class_names import check_same_classes
from pipeline.data.files import DamagedDataError, Place, find_shards, find_splits
from pipeline.data.parquet import (
    Layout,
    class_names,
    decode_rows,
    open_parquet,
    read_rows,
)

LABEL_COLUMNS = ("label", "fine_label")


@dataclass(frozen=True)
class Summary:
    """What one split holds; counted by class, by size in pixels, and by Pillow's mode."""

    files: list[Place]
    classes: Counter[int] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)


def check_split(folder: Place, split: str, layout: Layout) -> Summary:
    """Decode all images of a split, one after the other.

    Raises:
        DamagedDataError: The split is missing, or a row is damaged; the message names it.
    """
    summary = Summary(find_shards(folder, split))
    for file in summary.files:
        names = class_names(file, layout.label)
        if names and layout.num_classes not in (None, len(names)):
            raise DamagedDataError(
                f"{file}: {layout.label} has {len(names)} classes, want {layout.num_classes}"
            )
        for rows in read_rows(file, layout):
            summary.classes.update(rows.labels.tolist())
            for picture in decode_rows(rows, layout):
                summary.sizes["{2} x {1}".format(*picture.pixels.shape)] += 1
                summary.modes[picture.mode] += 1
    return summary


def check_names(files: Sequence[Place], label: str) -> None:
    """Refuse files whose labels are not of the same classes, in the same order.

    Raises:
        ClassNamesError: Two of them name a label differently.
    """
    named = [(file, names) for file in files if (names := class_names(file, label))]
    for file, names in named:
        check_same_classes(str(named[0][0]), named[0][1], str(file), names)


def guess_layout(folder: Place) -> Layout:
    """Find the label column of a folder of unknown data, and how many classes it says it has.

    Raises:
        DamagedDataError: There is no parquet file, or it has no label column that is known.
    """
    if not (splits := find_splits(folder)):
        raise DamagedDataError(f"no <split>-*.parquet in {folder}")
    file = find_shards(folder, splits[0])[0]
    with open_parquet(file) as opened:
        columns = opened.schema_arrow.names
    for label in LABEL_COLUMNS:
        if label in columns:
            return Layout(label, len(class_names(file, label)) or None)
    wanted = " or ".join(LABEL_COLUMNS)
    raise DamagedDataError(f"{file}: has the columns {', '.join(columns)}; want {wanted}")
