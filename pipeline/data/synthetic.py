"""Made-up images that a small net learns in seconds: for tests and for dry runs."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.valid_fields import Within
from pipeline.data.splits import Images, Splits, make_splits, stream
from pipeline.data.stored_dataset import SplitSettings


@dataclass(frozen=True, kw_only=True)
class Synthetic(SplitSettings):
    """A smooth random pattern for each class, plus noise.

    The images follow from ``classes`` and ``size`` alone, so that runs with different seeds are
    about the same data, as they are with real images.

    Attributes:
        path: Not used: the images are made in memory.
        train_images, test_images: How many images to make; None: 512 and 128.
        classes: Number of classes, at least 2.
        size: Pixels per side, at least 4.

    Raises:
        ValueError: A setting is outside its range.
    """

    flip: bool = False
    classes: Annotated[int, Within(2)] = 10
    size: Annotated[int, Within(4)] = 32

    @property
    def num_classes(self) -> int:
        return self.classes

    @property
    def image_size(self) -> int:
        return self.size

    def load(self, seed: int) -> Splits:
        """Make and split the images; ``seed`` draws the validation split."""
        train = self.make("train", 512 if self.train_images is None else self.train_images)
        test = self.make("test", 128 if self.test_images is None else self.test_images)
        sha256 = hashlib.sha256()
        for tensor in (train.pixels_NCHW, train.labels_N, test.pixels_NCHW, test.labels_N):
            sha256.update(tensor.numpy().tobytes())
        return make_splits(
            train,
            test,
            seed,
            train_images=None,
            test_images=None,
            validation=self.validation,
            sha256=sha256.hexdigest(),
            class_names=tuple(f"pattern {label}" for label in range(self.classes)),
        )

    def patterns(self) -> Tensor:
        """Draw one pattern for each class: (K, 3, size, size) in [0.1, 0.9]."""
        generator = stream("patterns", self.classes, self.size)
        coarse_KC44 = torch.rand(self.classes, 3, 4, 4, generator=generator)
        return 0.1 + 0.8 * F.interpolate(coarse_KC44, size=self.size, mode="nearest")

    def make(self, split: str, count: int) -> Images:
        """Make ``count`` images, as many of each class as of any other, or one more."""
        generator = stream(split, self.classes, self.size)
        labels_N = torch.arange(count) % self.classes
        noise_NCHW = torch.randn(count, 3, self.size, self.size, generator=generator)
        pixels_NCHW = (self.patterns()[labels_N] + 0.1 * noise_NCHW).clamp(0, 1)
        return Images((pixels_NCHW * 255).round().to(torch.uint8), labels_N)
