"""How faithful the gradients of trained networks are, by checkpoint folder.

Run as ``python -m tests.helpers.faithful_distribution FOLDER ...``.

Prints for each checkpoint folder how many of the first test images of the digits are not faithful,
quantiles (0, 10, 50%) of the rank correlation, and (0, 10, 50, 90, 100%) of the slope.

Shapes: B images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline import checkpoint
from pipeline.attacks import Objective
from pipeline.attacks.pgd import PGD
from pipeline.data.augmentation import to_float
from pipeline.data.digits import Digits
from pipeline.measures.sanity.continuous import Continuous
from pipeline.measures.sanity.faithful import compare_changes, is_faithful, nearest_gap
from pipeline.optimization.losses import margin_per_image
from pipeline.seeding import ImageNoise

IMAGES = 128
ATTACK = PGD(eps=0.1, step_size=0.025, steps=50)


def line(height: Objective, x_BCHW: Tensor) -> str:
    """Describe one height on images: how many are not faithful, and the two quantiles."""

    def noise() -> ImageNoise:
        return ImageNoise(0, torch.arange(len(x_BCHW)))

    bad = int((~is_faithful(height, x_BCHW, ATTACK, noise())).sum())
    found = compare_changes(height, x_BCHW, ATTACK, noise())
    rank = quantiles(found.correlation_B, (0.0, 0.1, 0.5))
    slope = quantiles(found.slope_B, (0.0, 0.1, 0.5, 0.9, 1.0))
    return f"{bad:3d} of {len(x_BCHW)} | rank {rank} | slope {slope}"


def quantiles(values_B: Tensor, at: tuple[float, ...]) -> str:
    """Write quantiles; what is not a number counts as -9."""
    filled_B = torch.nan_to_num(values_B.double(), nan=-9.0)
    return " ".join(f"{v:.2f}" for v in filled_B.quantile(torch.tensor(at).double()).tolist())


def describe(name: str, model: Network, x_BCHW: Tensor, y_B: Tensor) -> None:
    """Print one network's lines: logits, and the router's gap far from a boundary and near."""
    net = fold(model)
    noise = ImageNoise(0, torch.arange(len(x_BCHW)))
    jumps = int((~Continuous()(net, x_BCHW, y_B, noise).correct_B).sum())
    print(name, "continuous", f"{jumps:3d} of {len(x_BCHW)} jump", flush=True)
    print(name, "logits", line(lambda x: margin_per_image(net(x).logits, y_B), x_BCHW), flush=True)
    if net.num_experts == 1:
        return
    gap = nearest_gap(net, x_BCHW)
    near = ATTACK.ascend(lambda x: -gap(x), x_BCHW, x_BCHW, steps=10)
    print(name, "router, far", line(gap, x_BCHW), flush=True)
    print(name, "router, near", line(gap, near), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    split = Digits().load(0).test
    pixels, labels = to_float(split.pixels_NCHW[:IMAGES]), split.labels_N[:IMAGES]
    for folder in map(Path, sys.argv[1:]):
        describe(folder.parent.parent.name, checkpoint.load_model(folder), pixels, labels)
