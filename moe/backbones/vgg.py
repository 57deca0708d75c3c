"""VGG-16 with BatchNorm (Simonyan & Zisserman, ICLR 2015, arXiv:1409.1556), mixture convolutions.

Shapes: B images, C channels, HW sides, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones.base import RouterScope
from moe.backbones.blocks import (
    ACTIVATIONS,
    Act,
    Activation,
    assemble,
    mixture,
    plain,
    scaled,
)
from moe.layers import ConvNorm
from moe.network import Network
from moe.routers import ImageRouter
from moe.routing import Routing, at_least_float32
from moe.valid_fields import CheckedFields, Count, Ratio

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, convolutions
HIDDEN, SIDE = 256, 2


class VGGBody(nn.Module):
    """Stages of 3x3 convolutions with max pooling between them, and three linear maps."""

    def __init__(self, stages: list[list[ConvNorm]], channels: int, num_classes: int, act: Act):
        super().__init__()
        self.stages, self.act = nn.ModuleList(nn.ModuleList(stage) for stage in stages), act
        sizes = (channels * SIDE**2, HIDDEN, HIDDEN)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(HIDDEN, num_classes)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for layer in stage:
                x_BCHW = self.act(layer(x_BCHW, routing))
            if min(x_BCHW.shape[2:]) >= 2 * SIDE:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
        x_BC = F.adaptive_avg_pool2d(x_BCHW, SIDE).flatten(1)
        for layer in self.hidden:
            x_BC = self.act(layer(x_BC))
        logits_BK: Tensor = self.head(x_BC)
        return at_least_float32(logits_BK)


@dataclass(frozen=True, kw_only=True)
class VGG16(CheckedFields):
    """VGG-16: 13 convolutions with BatchNorm, and a head of 256, 256 and K outputs.

    All convolutions but the first are mixtures (12); the first is plain and scaled by the ratio,
    the head is plain. Stages end with max pooling for as long as 2x2 pixels are left, which the
    head sees: the released form at 32 px, where the fifth pooling falls away; all five of the paper
    from 64 px on. At 224 px they leave 7x7, which are averaged to 2x2 (as torchvision's VGG
    averages to a fixed size), so that the head stays the one that it is at 32 px.

    Attributes:
        num_experts: 1 is a dense net.
        ratio: Width of one expert over the dense width, in (0, 1].
        router_scope: One route for the network, or one a layer.
        activation: ``relu``, or smooth (arXiv:2006.14536): ``silu``, ``softplus``; of the body.
    """

    num_experts: Count = 2
    ratio: Ratio = 0.5
    router_scope: RouterScope = "shared"
    activation: Activation = "relu"

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network for square images of ``image_size`` pixels."""
        act, make = ACTIVATIONS[self.activation], mixture(self.num_experts, self.router_scope)
        stages: list[list[ConvNorm]] = []
        channels = 3
        for width, depth in STAGES:
            stages.append([])
            for _ in range(depth):
                out = scaled(width, self.ratio)
                stages[-1].append((plain if channels == 3 else make)(channels, out, 3, 1))
                channels = out
        return assemble(
            VGGBody(stages, channels, num_classes, act),
            lambda: ImageRouter(self.num_experts),
            num_experts=self.num_experts,
            router_scope=self.router_scope,
            statistics="imagenet" if image_size > 64 else "cifar",
        )
