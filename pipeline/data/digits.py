"""scikit-learn's handwritten digits: 1,797 real grey images, there without a download."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pipeline.data.splits import Images, Splits, make_splits, stratified_split
from pipeline.data.stored_dataset import SplitSettings


@dataclass(frozen=True, kw_only=True)
class Digits(SplitSettings):
    """8 x 8 images of ten digits, grey repeated to three channels.

    The data are the test part of the UCI set "Optical Recognition of Handwritten Digits", with
    values 0..16 that are stretched to 0..255. A fifth of each class, always the same, is the test
    split.

    Attributes:
        path: Not used: scikit-learn carries the images.
        train_images, test_images: Size of a class-balanced subset; None: all 1,438 and 359.
        pad, flip: Off: shifted by a pixel or mirrored, these are other digits.

    Raises:
        ValueError: A setting is outside its range.
    """

    flip: bool = False
    num_classes: ClassVar[int] = 10
    image_size: ClassVar[int] = 8

    def load(self, seed: int) -> Splits:
        """Read and split the images; ``seed`` draws the subsets and the validation split."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        labels = np.asarray(digits.target, dtype=np.int64)
        sha256 = hashlib.sha256(grey_NHW.tobytes() + labels.tobytes()).hexdigest()
        pixels_N1HW = torch.from_numpy(grey_NHW)[:, None]
        every = Images(pixels_N1HW.repeat(1, 3, 1, 1), torch.from_numpy(labels))
        train_rows, test_rows = stratified_split(every.labels_N, 0.2, seed=0)
        return make_splits(
            every.pick(train_rows),
            every.pick(test_rows),
            seed,
            train_images=self.train_images,
            test_images=self.test_images,
            validation=self.validation,
            sha256=sha256,
            class_names=tuple(str(digit) for digit in range(10)),
        )
