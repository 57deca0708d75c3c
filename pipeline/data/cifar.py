"""CIFAR-10 and CIFAR-100 from Hugging Face parquet (``uoft-cs/cifar10``, ``uoft-cs/cifar100``).

Both are described in A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.data.splits import Splits
from pipeline.data.stored_dataset import check_small, load_small


@dataclass(frozen=True, kw_only=True)
class Cifar10:
    """32 x 32 colour photographs of ten kinds of animals and vehicles.

    Attributes:
        path: Folder with ``train-*.parquet`` and ``test-*.parquet``; empty:
            ``$ROBUST_MOE_DATA/cifar10``.
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
    pad: int = 4
    flip: bool = True
    num_classes: ClassVar[int] = 10
    image_size: ClassVar[int] = 32
    any_size: ClassVar[bool] = False
    folder: ClassVar[str] = "cifar10"
    label_column: ClassVar[str] = "label"
    split_names: ClassVar[tuple[str, str]] = ("train", "test")

    def __post_init__(self) -> None:
        check_small(self)

    def load(self, seed: int) -> Splits:
        """Read and split the images; ``seed`` draws the subsets and the validation split."""
        return load_small(self, seed)


@dataclass(frozen=True, kw_only=True)
class Cifar100:
    """32 x 32 colour photographs of a hundred kinds of things: the fine labels of CIFAR-100.

    Attributes:
        path: Folder with ``train-*.parquet`` and ``test-*.parquet``; empty:
            ``$ROBUST_MOE_DATA/cifar100``.
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
    pad: int = 4
    flip: bool = True
    num_classes: ClassVar[int] = 100
    image_size: ClassVar[int] = 32
    any_size: ClassVar[bool] = False
    folder: ClassVar[str] = "cifar100"
    label_column: ClassVar[str] = "fine_label"
    split_names: ClassVar[tuple[str, str]] = ("train", "test")

    def __post_init__(self) -> None:
        check_small(self)

    def load(self, seed: int) -> Splits:
        """Read and split the images; ``seed`` draws the subsets and the validation split."""
        return load_small(self, seed)
