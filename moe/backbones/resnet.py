"""ResNet-18 (He et al., CVPR 2016) with mixture convolutions, in its 32 px and 224 px forms.

Shapes: B images, C channels, HW sides, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones.parts import BasicBlock, assemble, check, mixture, plain, scaled
from moe.layers import ConvNorm
from moe.network import Network
from moe.routers import ImageRouter
from moe.routing import Routing, at_least_float32


class ResidualBody(nn.Module):
    """Stem, residual stages, average pooling and a linear classifier."""

    def __init__(
        self, stem: ConvNorm, blocks: list[BasicBlock], channels: int, num_classes: int, pool: bool
    ):
        super().__init__()
        self.stem, self.pool = stem, pool
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        x_BCHW = F.relu(self.stem(x_BCHW, routing), inplace=True)
        if self.pool:
            x_BCHW = F.max_pool2d(x_BCHW, 3, 2, 1)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, routing)
        logits_BK: Tensor = self.head(x_BCHW.mean((2, 3)))
        return at_least_float32(logits_BK)


@dataclass(frozen=True, kw_only=True)
class ResNet18:
    """ResNet-18 whose 3x3 convolutions are mixtures of ``num_experts`` of ``ratio`` the width.

    Up to 64 px: 3x3 stem of 64 channels, shortcuts plain (16 mixture convolutions). Above:
    7x7 stem with stride 2 and pooling, scaled by the ratio; shortcuts are mixtures too (19).

    Attributes:
        num_experts: 1 is a dense net.
        ratio: Width of one expert over the dense width, in (0, 1].
        router_scope: One route for the network, or one a layer.
    """

    num_experts: int = 2
    ratio: float = 0.5
    router_scope: Literal["shared", "per_layer"] = "shared"

    def __post_init__(self) -> None:
        check(self.num_experts, self.ratio, self.router_scope)

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network for square images of ``image_size`` pixels."""
        large = image_size > 64
        make = mixture(self.num_experts, self.router_scope)
        thin = large or self.num_experts == 1  # S-Dense scales its stem, a CIFAR mixture does not
        channels = scaled(64, self.ratio) if thin else 64
        stem = plain(3, channels, 7, 2) if large else plain(3, channels, 3, 1)
        blocks = []
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(2):
                stride, out = 2 if stage and not block else 1, scaled(width, self.ratio)
                blocks.append(BasicBlock(channels, out, stride, make, make if large else plain))
                channels = out
        return assemble(
            ResidualBody(stem, blocks, channels, num_classes, large),
            lambda: ImageRouter(self.num_experts),
            num_experts=self.num_experts,
            router_scope=self.router_scope,
            statistics="imagenet" if large else "cifar",
        )
