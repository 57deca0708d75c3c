"""Tiny-ImageNet from Hugging Face parquet (``zh-plus/tiny-imagenet``).

Made for Stanford's course CS231n; described in Y. Le and X. Yang, "Tiny ImageNet Visual Recognition
Challenge", 2015.
"""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.data.splits import Splits
from pipeline.data.stored_dataset import check_small, load_small


@dataclass(frozen=True, kw_only=True)
class TinyImageNet:
    """64 x 64 photographs of two hundred kinds of things, 500 of each to train on.

    The official test labels were never published, so the official validation images, split
    ``valid``, are the test split, and validation images come from the train split.

    Attributes:
        path: Folder or URI with ``train-*.parquet`` and ``valid-*.parquet``; empty:
            ``$ROBUST_MOE_DATA/tiny-imagenet``.
        train_images, test_images: Size of a class-balanced subset; None: all.
        validation: Fraction of the train images that is kept apart, in (0, 0.5].
        pad, flip: Augmentation: border of the random crop in pixels, and mirroring or not.

    Raises:
        ValueError: A setting is outside its range.
    """

    path: str = ""
    train_images: int | None = None
    test_images: int | None = None
    validation: float = 0.1
    pad: int = 8
    flip: bool = True
    num_classes: ClassVar[int] = 200
    image_size: ClassVar[int] = 64
    any_size: ClassVar[bool] = False
    folder: ClassVar[str] = "tiny-imagenet"
    label_column: ClassVar[str] = "label"
    split_names: ClassVar[tuple[str, str]] = ("train", "valid")

    def __post_init__(self) -> None:
        check_small(self)

    def load(self, seed: int) -> Splits:
        """Read and split the images; ``seed`` draws the subsets and the validation split."""
        return load_small(self, seed)
