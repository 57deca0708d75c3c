"""ResNet-18 (He et al., CVPR 2016) with mixture convolutions, in its 32 px and 224 px forms.

Shapes: B images, C channels, HW sides, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones.base import RouterScope
from moe.backbones.blocks import (
    ACTIVATIONS,
    Act,
    Activation,
    BasicBlock,
    assemble,
    mixture,
    plain,
    relu,
    scaled,
)
from moe.layers import ConvNorm
from moe.network import Network
from moe.routers import ImageRouter
from moe.routing import Routing, at_least_float32
from moe.valid_fields import CheckedFields, Count, Ratio


class ResidualBody(nn.Module):
    """Stem, residual stages, average pooling and a linear classifier."""

    def __init__(
        self,
        stem: ConvNorm,
        blocks: list[BasicBlock],
        channels: int,
        num_classes: int,
        pool: bool,
        act: Act = relu,
    ):
        super().__init__()
        self.stem, self.pool, self.act = stem, pool, act
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        x_BCHW = self.act(self.stem(x_BCHW, routing))
        if self.pool:
            x_BCHW = F.max_pool2d(x_BCHW, 3, 2, 1)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, routing)
        logits_BK: Tensor = self.head(x_BCHW.mean((2, 3)))
        return at_least_float32(logits_BK)


@dataclass(frozen=True, kw_only=True)
class ResNet18(CheckedFields):
    """ResNet-18 whose 3x3 convolutions are mixtures of ``num_experts`` of ``ratio`` the width.

    Up to 64 px: 3x3 stem, shortcuts plain (16 mixture convolutions); the stem of a mixture keeps
    its full width. Above: 7x7 stem with stride 2 and pooling, scaled by the ratio; shortcuts are
    mixtures too (19).

    Attributes:
        num_experts: 1 is a dense net.
        ratio: Width of one expert over the dense width, in (0, 1].
        router_scope: One route for the network, or one a layer.
        width: Channels of the stem and of the first stage, 64 in the paper; later stages have 2, 4
            and 8 times as many. Below 64 (down to 16) the router narrows with them, so that its
            share of the dense net stays at 7% at 32 px.
        activation: ``relu``, or smooth (arXiv:2006.14536): ``silu``, ``softplus``; of the body.
    """

    num_experts: Count = 2
    ratio: Ratio = 0.5
    router_scope: RouterScope = "shared"
    width: Count = 64
    activation: Activation = "relu"

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network for square images of ``image_size`` pixels."""
        large, act = image_size > 64, ACTIVATIONS[self.activation]
        make = mixture(self.num_experts, self.router_scope)
        thin = large or self.num_experts == 1  # S-Dense scales its stem, a CIFAR mixture does not
        channels = scaled(self.width, self.ratio) if thin else self.width
        stem, project = plain(3, channels, *((7, 2) if large else (3, 1))), make if large else plain
        blocks = []
        for stage in range(4):
            out = scaled(self.width * 2**stage, self.ratio)
            for block in range(2):
                stride = 2 if stage and not block else 1
                blocks.append(BasicBlock(channels, out, stride, make, project, act))
                channels = out
        narrow = min(max(self.width, 16), 64)
        return assemble(
            ResidualBody(stem, blocks, channels, num_classes, large, act),
            lambda: ImageRouter(self.num_experts, widths=(narrow // 4, narrow // 2, narrow)),
            num_experts=self.num_experts,
            router_scope=self.router_scope,
            statistics="imagenet" if large else "cifar",
        )
