"""Tiny-ImageNet from Hugging Face parquet (``zh-plus/tiny-imagenet``).

Made for Stanford's course CS231n; described in Y. Le and X. Yang, "Tiny ImageNet Visual Recognition
Challenge", 2015.
"""

from dataclasses import dataclass
from typing import ClassVar

from moe.valid_fields import Whole
from pipeline.data.stored_dataset import StoredDataset


@dataclass(frozen=True, kw_only=True)
class TinyImageNet(StoredDataset):
    """64 x 64 photographs of two hundred kinds of things, 500 of each to train on.

    The official test labels were never published, so the official validation images, split
    ``valid``, are the test split, and validation images come from the train split.
    """

    pad: Whole = 8
    num_classes: ClassVar[int] = 200
    image_size: ClassVar[int] = 64
    folder: ClassVar[str] = "tiny-imagenet"
    split_names: ClassVar[tuple[str, str]] = ("train", "valid")
