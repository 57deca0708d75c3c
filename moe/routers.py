"""Routers that look at the whole image.

Shapes: B images, E experts, CHW channels and sides.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import ConvNorm, plain_conv
from moe.routing import Routing

NOWHERE = Routing()  # routers are plain networks: their layers read no route


class _Block(nn.Module):
    """Two convolutions and a parameter-free shortcut: subsampled, padded with zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride, self.extra = stride, channels - in_channels
        self.conv1 = ConvNorm(plain_conv(in_channels, channels, stride=stride), channels)
        self.conv2 = ConvNorm(plain_conv(channels, channels), channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.conv1(x_BCHW, NOWHERE), inplace=True)
        y_BCHW = self.conv2(y_BCHW, NOWHERE)
        short_BCHW = x_BCHW[:, :, :: self.stride, :: self.stride]
        if self.extra:
            before = self.extra // 2
            short_BCHW = F.pad(short_BCHW, (0, 0, 0, 0, before, self.extra - before))
        return F.relu(y_BCHW.add_(short_BCHW), inplace=True)


class ImageRouter(nn.Module):
    """CIFAR-ResNet that scores the experts for an image (He et al., 2016, section 4.2; option A).

    AdvMoE's router is the 20-layer form (three blocks a stage, widths 16, 32, 64): 269,202
    parameters for 2 experts, 0.0406 GMAC at 32 px. Larger images are averaged down to
    ``max_side``, so that the router's cost does not grow with them.

    Ours: scores are normalized over the batch, without parameters (running statistics in eval
    mode). The straight-through gradient reaches the chosen score alone, so whichever expert is
    ahead at the start stays ahead: without this the ``trades`` router loss sent every image of
    digits to one expert in each setting that we tried.

    Args:
        num_experts: E.
        blocks, widths: Residual blocks a stage, and the width of each stage.
        max_side: Largest image side in pixels that the router sees.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        blocks: int = 3,
        widths: tuple[int, ...] = (16, 32, 64),
        max_side: int = 32,
    ):
        super().__init__()
        self.max_side = max_side
        self.stem = ConvNorm(plain_conv(3, widths[0]), widths[0])
        stages, channels = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(_Block(channels, width, 2 if stage and not block else 1))
                channels = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_experts)
        self.balance = nn.BatchNorm1d(num_experts, affine=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalized images to scores (B, E)."""
        if max(x_BCHW.shape[2:]) > self.max_side:
            x_BCHW = F.adaptive_avg_pool2d(x_BCHW, self.max_side)
        y_BCHW = self.blocks(F.relu(self.stem(x_BCHW, NOWHERE), inplace=True))
        scores_BE: Tensor = self.balance(self.head(y_BCHW.mean((2, 3))))
        return scores_BE
