"""What the rest of the project asks of a dataset."""

from typing import Protocol, runtime_checkable

from pipeline.data.splits import Splits


class Dataset(Protocol):
    """Settings are fields, reading the images is ``load``.

    Attributes:
        path: Folder with this dataset's parquet files; empty: ``$ROBUST_MOE_DATA/<name>``.
        train_images, test_images: Size of a class-balanced subset; None: all.
        validation: Fraction of the train images that is kept apart, in (0, 0.5].
        pad, flip: Augmentation: border of the random crop in pixels, and mirroring or not.
        num_classes, image_size: Classes, and pixels per side.
    """

    @property
    def path(self) -> str: ...
    @property
    def train_images(self) -> int | None: ...
    @property
    def test_images(self) -> int | None: ...
    @property
    def validation(self) -> float: ...
    @property
    def pad(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def image_size(self) -> int: ...

    def load(self, seed: int) -> Splits: ...


@runtime_checkable
class OnDisk(Dataset, Protocol):
    """A dataset that lies in parquet files.

    Attributes:
        folder: Name of its folder in ``$ROBUST_MOE_DATA``.
        label_column: Of the files.
        any_size: Whether its images differ in size.
        split_names: The splits it needs.
    """

    @property
    def folder(self) -> str: ...
    @property
    def label_column(self) -> str: ...
    @property
    def any_size(self) -> bool: ...
    @property
    def split_names(self) -> tuple[str, ...]: ...


def class_groups(dataset: Dataset) -> tuple[int, ...]:
    """Group of each class, for data sets that have such groups; empty for others.

    A data set states them as a field ``groups``: one number per class, from 0. Groups that look
    alike have numbers close to each other, so that any block of them is a sensible part.
    """
    found: tuple[int, ...] = getattr(dataset, "groups", ())
    return found
