"""ImageNet from Hugging Face parquet (``ILSVRC/imagenet-1k``), streamed, or a small stand-in.

Described in O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015
(arXiv:1409.0575).
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor

from moe.valid_fields import Within
from pipeline.data.splits import Images, Splits, choose, hold_out, locate
from pipeline.data.stored_dataset import SplitSettings

if TYPE_CHECKING:
    from pipeline.data.files import Place
    from pipeline.data.parquet import Layout
    from pipeline.data.row_groups import Index

STAND_INS = ("imagenette",)


@dataclass(frozen=True, kw_only=True)
class ImageNet(SplitSettings):
    """Photographs of a thousand kinds of things, of any size: random crops, tested on the centre.

    Training images are read again each epoch and never held, see ``streaming.py``. The validation
    and test images are resized to 256/224 of ``image_size``, cropped in the centre, and kept as
    uint8 in a mapped file: 7.5 GB of disk for all 50,000 at 224 px, of memory what is in use.

    Attributes:
        path: Folder or URI with ``train-*.parquet`` and ``validation-*`` (or ``valid-*``,
            ``val-*``); empty: the folder of ``variant`` in ``$ROBUST_MOE_DATA``.
        variant: ``imagenet``, or a small set with its thousand labels: ``imagenette`` (10 classes)
            or ``imagenet-sample``. ``auto``: ``imagenet``, or ``imagenette`` where that is not
            there, with a warning.
        test_fraction: Of a set without a test split: the fraction of its train images that is the
            test split, always the same ones, in [0, 0.5]; 0: such a set is an error.
        pad, flip: Augmentation after the random crop: border of a shift in pixels, and mirroring.
        image_size: Pixels per side, 16 to 1024.
        min_area: Least part of a picture that a random crop shows, in (0, 1].
        reader: ``ray``: Ray Data decodes; ``threads``: of each worker; ``auto``: Ray Data where
            Ray runs the worker. The images and their order are the same.

    Raises:
        ValueError: A setting is outside its range.
    """

    variant: Literal["auto", "imagenet", "imagenette", "imagenet-sample"] = "auto"
    validation: Annotated[float, Within(0, 0.5, above=True)] = 0.01
    test_fraction: Annotated[float, Within(0, 0.5)] = 0.0
    image_size: Annotated[int, Within(16, 1024)] = 224
    min_area: Annotated[float, Within(0, 1, above=True)] = 0.08
    reader: Literal["auto", "ray", "threads"] = "auto"
    num_classes: ClassVar[int] = 1000
    any_size: ClassVar[bool] = True
    folder: ClassVar[str] = "imagenet"
    label_column: ClassVar[str] = "label"
    split_names: ClassVar[tuple[str, str]] = ("train", "validation")

    def load(self, seed: int) -> Splits:
        """Index the images, and decode those of validation and test where they are not cached.

        ``seed`` draws the subsets and the validation split.
        """
        from pipeline.data.files import find_shards, fingerprint  # only here: needs pyarrow
        from pipeline.data.parquet import Layout, names_of_classes
        from pipeline.data.row_groups import read_index
        from pipeline.data.streaming import Streamed

        folder = self.place()
        train_files = find_shards(folder, "train")
        test_name = self.test_split(folder)
        test_files = find_shards(folder, test_name) if test_name else []
        layout = Layout(self.label_column, self.num_classes)
        every = [*train_files, *test_files]
        names = names_of_classes(every, self.label_column, self.num_classes)
        sha256 = fingerprint(every)
        index = read_index(train_files, layout)
        if test_name:
            rows, test_index = torch.arange(len(index.labels_N)), read_index(test_files, layout)
            test_rows = torch.arange(len(test_index.labels_N))
        else:
            rows, test_rows = hold_out(torch.from_numpy(index.labels_N), self.test_fraction, 0)
            test_index = index
        rows = subset(index, rows, self.train_images, seed, "train_images")
        test_rows = subset(test_index, test_rows, self.test_images, seed, "test_images")
        kept, apart = hold_out(torch.from_numpy(index.labels_N)[rows], self.validation, seed)
        train = Streamed(
            index, rows[kept].numpy(), layout, self.image_size, self.min_area, self.reader
        )
        validation = self.centre(index, rows[apart], layout, sha256)
        test = self.centre(test_index, test_rows, layout, sha256)
        return Splits(train, validation, test, sha256, names)

    def place(self) -> Place:
        """Name the folder or URI of the files; warns where a stand-in is taken."""
        if self.path or self.variant != "auto":
            return locate(self.path, self.variant)
        wanted = locate("", "imagenet")
        for name in STAND_INS:
            if not wanted.is_dir() and (other := locate("", name)).is_dir():
                text = f"{wanted} does not exist: {other} stands for it (dataset.variant={name})"
                warnings.warn(text, stacklevel=3)
                return other
        return wanted

    def test_split(self, folder: Place) -> str:
        """Name the test split of a folder; empty if a part of the train split takes its place.

        Raises:
            DamagedDataError: There is neither.
        """
        from pipeline.data.files import TESTS, DamagedDataError, find_test

        found = find_test(folder)
        if not found and not self.test_fraction:
            raise DamagedDataError(
                f"{folder} has no test split ({', '.join(TESTS)}): add {TESTS[0]}-*.parquet, or "
                "set dataset.test_fraction=0.2 to test on a fifth of its train images"
            )
        if found and self.test_fraction:
            raise ValueError(
                f"dataset.test_fraction must be 0 for {folder}, whose test split is {found}, got "
                f"{self.test_fraction}"
            )
        return found

    def centre(self, index: Index, rows: Tensor, layout: Layout, content: str) -> Images:
        """Decode rows of a split to centre crops, or map them if cached."""
        from pipeline.data import cache
        from pipeline.data.crops import CentreCrop
        from pipeline.data.row_groups import fill_centre

        names = sorted({file.name for file, *_ in index.groups})
        chosen = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        key = repr((cache.VERSION, content, names, chosen, layout, self.image_size, "centre"))
        pixels, labels = cache.cached(
            hashlib.sha256(key.encode()).hexdigest(),
            (len(rows), 3, self.image_size, self.image_size),
            fill_centre(index, rows.numpy(), layout, CentreCrop(self.image_size)),
        )
        return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def subset(index: Index, rows: Tensor, count: int | None, seed: int, name: str) -> Tensor:
    """Choose ``count`` of some rows (None: all), evenly over the classes."""
    return rows[choose(torch.from_numpy(index.labels_N)[rows], count, seed, name=name)]
