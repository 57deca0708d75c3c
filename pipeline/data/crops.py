"""Views of large pictures: a random crop for training, the centre for tests.

What is drawn for a picture depends on the seed, the epoch and the picture's row alone, never on
which thread, task or worker decodes it.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.splits import stream

ASPECT = (3 / 4, 4 / 3)  # of the random crops, width over height
TRIES = 10
MARGIN = 256 / 224  # of the shorter side over that of its centre crop


class View(Protocol):
    """Turns a picture of any size into uint8 (3, size, size)."""

    @property
    def size(self) -> int: ...
    def __call__(self, picture: Image.Image, row: int) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class RandomCrop:
    """A part of random area and aspect, resized to a square.

    Area ~ U(min_area, 1) of the picture, log aspect ~ U(log 3/4, log 4/3), place uniform (Szegedy
    et al., CVPR 2015, arXiv:1409.4842, section 6). Drawn as torchvision's ``RandomResizedCrop``
    draws it, but from a generator of the picture's own.
    """

    size: int
    min_area: float
    seed: int
    epoch: int

    def __call__(self, picture: Image.Image, row: int) -> NDArray[np.uint8]:
        from torchvision.transforms.v2 import functional

        generator = stream("crop", self.seed, self.epoch, row)
        box = random_box(picture.width, picture.height, self.min_area, generator)
        side = [self.size, self.size]
        return to_array(functional.resized_crop(picture, *box, side, antialias=True))


@dataclass(frozen=True)
class CentreCrop:
    """The middle square, after resizing the shorter side to 256/224 of it."""

    size: int

    def __call__(self, picture: Image.Image, row: int) -> NDArray[np.uint8]:
        from torchvision.transforms.v2 import functional

        resized = functional.resize(picture, [round(MARGIN * self.size)], antialias=True)
        return to_array(functional.center_crop(resized, [self.size, self.size]))


def random_box(
    width: int, height: int, min_area: float, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a crop.

    A draw that does not fit is made again; after ten, the largest centred part of a valid aspect
    is taken.
    """
    low, high = (math.log(aspect) for aspect in ASPECT)
    for _ in range(TRIES):
        area = width * height * torch.empty(1).uniform_(min_area, 1, generator=generator).item()
        aspect = torch.empty(1).uniform_(low, high, generator=generator).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,), generator=generator))
            left = int(torch.randint(width - w + 1, (1,), generator=generator))
            return top, left, h, w
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def to_array(picture: Image.Image) -> NDArray[np.uint8]:
    """Copy RGB to (3, H, W)."""
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
