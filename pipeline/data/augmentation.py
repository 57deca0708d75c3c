"""Augmentation beyond crop and mirror: RandAugment and CutMix.

Shapes: B images of a batch on one worker, C channels, H x W pixels, K classes. Draws are made for
the global batch of ``world`` times B images, of which this worker has the ``rank``-th B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pipeline.seeding import generator_at

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What a run does to its images beside crop and mirror, on one worker.

    Each part draws from a stream of its own, which follows from (seed, epoch, update): crops and
    attack noise are the same with and without it.

    Attributes:
        raw: ``none``, or ``randaugment`` of the raw pixels.
        cutmix: Share of the images that get a box of another.
        num_classes: Of the labels.
        seed: Of the run.
        rank, world: This worker, and how many share a batch.
    """

    raw: str
    cutmix: float
    num_classes: int
    seed: int
    rank: int = 0
    world: int = 1

    def before(self, pixels_BCHW: Tensor, epoch: int, step: int) -> Tensor:
        """Change raw pixels, uint8 on the CPU, before crop and mirror."""
        if self.raw == "none":
            return pixels_BCHW
        draws = generator_at("cpu", self.seed, self.raw, epoch, step)
        return randaugment(pixels_BCHW, generator=draws, rank=self.rank, world=self.world)

    def after(self, x_BCHW: Tensor, y_B: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Change cropped images in [0, 1], and with them the labels."""
        if not self.cutmix:
            return x_BCHW, y_B
        return cutmix(
            x_BCHW,
            y_B,
            probability=self.cutmix,
            num_classes=self.num_classes,
            generator=generator_at("cpu", self.seed, "cutmix", epoch, step),
            rank=self.rank,
            world=self.world,
        )


def randaugment(
    pixels_BCHW: Tensor, *, generator: Generator, rank: int = 0, world: int = 1
) -> Tensor:
    """Apply two random operations of RandAugment to each image; uint8 in, uint8 out.

    Torchvision's, with its settings (2 operations, magnitude 9 of 31; Cubuk et al., 2020,
    arXiv:1909.13719). It draws from torch's global generator, which is seeded for each image from
    ``generator`` and then put back.
    """
    from torchvision.transforms.v2 import RandAugment

    transform, b, images = RandAugment(), len(pixels_BCHW), []
    seeds_B = torch.randint(2**62, (world * b,), generator=generator)[rank * b :][:b]
    before = torch.get_rng_state()
    try:
        for pixels_CHW, seed in zip(pixels_BCHW, seeds_B.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)
            images.append(transform(pixels_CHW))
    finally:
        torch.set_rng_state(before)
    return torch.stack(images)


def cutmix(
    x_BCHW: Tensor,
    y_B: Tensor,
    *,
    probability: float,
    num_classes: int,
    generator: Generator,
    rank: int = 0,
    world: int = 1,
) -> tuple[Tensor, Tensor]:
    """Paste a box of another image into each, with a probability; labels become shares (B, K).

    The box covers a uniform share of the image (the paper's Beta(1, 1)) around a uniform pixel, as
    far as it lies inside; each class gets the share of pixels that shows it (Yun et al., ICCV
    2019, arXiv:1905.04899). Torchvision's cuts one box for a whole batch and pairs images across
    it; here each image has its own box and the images 2i and 2i + 1 are partners, so that neither
    depends on the number of workers. The last of an odd number stays as it is.
    """
    b, _, h, w = x_BCHW.shape
    device = x_BCHW.device
    draws_4B = torch.rand(4, world * b, generator=generator, device=generator.device)
    coin_B, area_B, row_B, column_B = draws_4B[:, rank * b :][:, :b].to(device)
    half_B = 0.5 * area_B.sqrt() * (coin_B < probability)
    rows_BH = inside((row_B * h).long(), (half_B * h).long(), h)
    columns_BW = inside((column_B * w).long(), (half_B * w).long(), w)
    box_BHW = rows_BH[:, :, None] & columns_BW[:, None, :]
    partner_B = (torch.arange(b, device=device) ^ 1).clamp(max=b - 1)
    mixed_BCHW = torch.where(box_BHW[:, None], x_BCHW[partner_B], x_BCHW)
    share_B1 = box_BHW.sum((1, 2))[:, None] / (h * w)
    classes_BK = F.one_hot(y_B, num_classes)
    return mixed_BCHW, (1 - share_B1) * classes_BK + share_B1 * classes_BK[partner_B]


def inside(centre_B: Tensor, half_B: Tensor, side: int) -> Tensor:
    """Mark the places of a side from ``centre - half`` to below ``centre + half``, (B, side)."""
    place_S = torch.arange(side, device=centre_B.device)
    return (place_S >= (centre_B - half_B)[:, None]) & (place_S < (centre_B + half_B)[:, None])


def to_float(pixels: Tensor) -> Tensor:
    """Map uint8 in 0..255 to float32 in [0, 1].

    Raises:
        ValueError: The pixels are not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, got {pixels.dtype}")
    return pixels.float() / 255


def augment(
    x_BCHW: Tensor,
    *,
    pad: int,
    flip: bool,
    generator: Generator,
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """Crop each image at random from its zero-padded self, and mirror half of them.

    The draws are made for the global batch of ``world`` times B images, of which this worker has
    the ``rank``-th B: an image is treated alike however many workers share the batch.

    Raises:
        ValueError: ``pad`` is negative, or ``rank`` is not in 0..world-1.
    """
    if pad < 0:
        raise ValueError(f"pad must be at least 0, got {pad}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in 0..{world - 1}, got {rank}")
    b, c, h, w = x_BCHW.shape
    device, mine = x_BCHW.device, slice(rank * b, (rank + 1) * b)
    rows_BH = torch.arange(h, device=device).expand(b, h)
    cols_BW = torch.arange(w, device=device).expand(b, w)
    if flip:
        coin_B = torch.rand(world * b, generator=generator, device=generator.device)[mine] < 0.5
        cols_BW = torch.where(coin_B.to(device)[:, None], w - 1 - cols_BW, cols_BW)
    if pad:
        shape = (2, world * b)
        shift_2B = torch.randint(2 * pad + 1, shape, generator=generator, device=generator.device)
        rows_B1, cols_B1 = shift_2B[:, mine, None].to(device)
        rows_BH, cols_BW = rows_BH + rows_B1, cols_BW + cols_B1
        x_BCHW = F.pad(x_BCHW, (pad, pad, pad, pad))
    elif not flip:
        return x_BCHW
    image_B, channel_C = torch.arange(b, device=device), torch.arange(c, device=device)
    return x_BCHW[
        image_B[:, None, None, None],
        channel_C[None, :, None, None],
        rows_BH[:, None, :, None],
        cols_BW[:, None, None, :],
    ]
