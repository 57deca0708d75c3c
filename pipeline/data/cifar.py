"""CIFAR-10 and CIFAR-100 from Hugging Face parquet (``uoft-cs/cifar10``, ``uoft-cs/cifar100``).

Both are described in A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from dataclasses import dataclass
from typing import ClassVar

from moe.valid_fields import Whole
from pipeline.data.stored_dataset import StoredDataset

SUPERCLASS = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)
"""Of each fine class of CIFAR-100 the coarse one, as in the files' ``coarse_label``."""
ANIMALS_FIRST = (8, 11, 12, 16, 0, 1, 15, 13, 7, 14, 17, 2, 4, 10, 9, 18, 19, 3, 5, 6)
"""The 20 superclasses, animals and people before plants and things: halves of 50 classes each."""


@dataclass(frozen=True, kw_only=True)
class Cifar10(StoredDataset):
    """32 x 32 colour photographs of ten kinds of animals and vehicles."""

    pad: Whole = 4
    num_classes: ClassVar[int] = 10
    image_size: ClassVar[int] = 32
    folder: ClassVar[str] = "cifar10"
    groups: ClassVar[tuple[int, ...]] = (0, 0, 1, 1, 1, 1, 1, 1, 0, 0)  # vehicles, animals


@dataclass(frozen=True, kw_only=True)
class Cifar100(StoredDataset):
    """32 x 32 colour photographs of a hundred kinds of things: the fine labels of CIFAR-100."""

    pad: Whole = 4
    num_classes: ClassVar[int] = 100
    image_size: ClassVar[int] = 32
    folder: ClassVar[str] = "cifar100"
    label_column: ClassVar[str] = "fine_label"
    groups: ClassVar[tuple[int, ...]] = tuple(ANIMALS_FIRST.index(s) for s in SUPERCLASS)
