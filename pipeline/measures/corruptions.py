"""How a model does on images that are worse by nature and not by an adversary.

In the manner of CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261), computed: its
severities for these six kinds, but neither its files nor its image library, so numbers are close to
those on its files and not comparable to the digit. Lengths grow with the image's side beyond 32.

Shapes: N images of a split, B of a batch, CHW channels and sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.measures.base import is_correct
from pipeline.seeding import generator_at

SEVERITIES = (1, 2, 3, 4, 5)
BATCH = 256


def gaussian_noise(x_CHW: Tensor, deviation: float, draws: Generator) -> Tensor:
    """Add normal numbers."""
    return x_CHW + deviation * torch.randn(x_CHW.shape, generator=draws)


def shot_noise(x_CHW: Tensor, photons: float, draws: Generator) -> Tensor:
    """Count so many photons for a white pixel."""
    return torch.poisson(x_CHW * photons, generator=draws) / photons


def gaussian_blur(x_CHW: Tensor, deviation: float, draws: Generator) -> Tensor:
    """Convolve with a normal density, cut at four deviations; edges are repeated."""
    deviation = deviation * max(1, x_CHW.shape[-1] / 32)
    reach = max(1, math.ceil(4 * deviation))
    kernel_R = (-((torch.arange(-reach, reach + 1) / deviation) ** 2) / 2).exp()
    kernel_R = kernel_R / kernel_R.sum()
    x_CHW = F.pad(x_CHW, (reach, reach, reach, reach), mode="replicate")
    for kernel_RR in (kernel_R.view(1, 1, 1, -1), kernel_R.view(1, 1, -1, 1)):
        x_CHW = F.conv2d(x_CHW[:, None], kernel_RR).squeeze(1)
    return x_CHW


def brightness(x_CHW: Tensor, more: float, draws: Generator) -> Tensor:
    """Raise the value (V of HSV) of each pixel; black becomes grey."""
    value_1HW = x_CHW.amax(0, keepdim=True)
    raised_1HW = (value_1HW + more).clamp(max=1)
    lit = value_1HW > 0
    return torch.where(lit, x_CHW * raised_1HW / value_1HW.where(lit, raised_1HW), raised_1HW)


def contrast(x_CHW: Tensor, factor: float, draws: Generator) -> Tensor:
    """Draw the pixels of each channel towards their mean."""
    mean_C11 = x_CHW.mean((1, 2), keepdim=True)
    return mean_C11 + factor * (x_CHW - mean_C11)


def pixelate(x_CHW: Tensor, factor: float, draws: Generator) -> Tensor:
    """Average down to a share of the side, and back by repetition."""
    height, width = x_CHW.shape[1:]
    rows, columns = max(1, int(height * factor)), max(1, int(width * factor))
    few_CHW = _boxes(height, rows) @ x_CHW @ _boxes(width, columns).T
    return F.interpolate(few_CHW[None], size=(height, width), mode="nearest-exact").squeeze(0)


def _boxes(side: int, few: int) -> Tensor:
    """Share of each of ``side`` pixels in the mean of each of ``few`` equal boxes, (few, side)."""
    edges, pixels = torch.arange(few + 1) * (side / few), torch.arange(side)
    ends = torch.minimum(edges[1:, None], pixels + 1)
    overlap = ends - torch.maximum(edges[:-1, None], pixels)
    return overlap.clamp(min=0) * (few / side)


Corruption = Callable[[Tensor, float, Generator], Tensor]
# Each with its strength at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}


def corrupt(images: Images, kind: str, severity: int, *, seed: int) -> Images:
    """Corrupt whole images; each one's noise follows from ``seed`` and its position alone.

    Raises:
        ValueError: There is no such kind or severity.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"corruption must be of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be in 1 to 5, got {severity}")
    change, strengths = CORRUPTIONS[kind]
    pixels = []
    for row, pixels_CHW in enumerate(images.pixels_NCHW):
        draws = generator_at("cpu", seed, "corruption", kind, severity, row)
        x_CHW = change(to_float(pixels_CHW[None])[0], strengths[severity - 1], draws)
        pixels.append((255 * x_CHW.clamp(0, 1)).round().to(torch.uint8))
    return Images(torch.stack(pixels) if pixels else images.pixels_NCHW, images.labels_N)


def corrupted(
    model: Network,
    images: Images,
    *,
    seed: int,
    device: torch.device,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
) -> dict[tuple[str, int], Tensor]:
    """Tell which images a model classifies right under each corruption: bool (N,) by both."""
    frozen = fold(model)
    return {
        (kind, severity): _right(frozen, corrupt(images, kind, severity, seed=seed), device)
        for kind in kinds
        for severity in severities
    }


def _right(frozen: Network, images: Images, device: torch.device) -> Tensor:
    parts = [torch.zeros(0, dtype=torch.bool)]
    for start in range(0, len(images), BATCH):
        rows = slice(start, start + BATCH)
        x_BCHW = to_float(images.pixels_NCHW[rows].to(device))
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        parts.append(is_correct(frozen, x_BCHW, images.labels_N[rows].to(device)).cpu())
    return torch.cat(parts)
