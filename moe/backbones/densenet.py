"""DenseNet-BC (Huang et al., CVPR 2017, arXiv:1608.06993) with mixture convolutions.

Shapes: B images, C channels, HW sides, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones.base import RouterScope
from moe.backbones.blocks import (
    ACTIVATIONS,
    Act,
    Activation,
    LargeStem,
    Make,
    MakeConv,
    PreActBody,
    assemble,
    mixture,
    mixture_conv,
    scaled,
)
from moe.layers import plain_conv
from moe.network import Network
from moe.routers import ImageRouter
from moe.routing import Routing
from moe.valid_fields import CheckedFields, Count, Ratio


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution, each after BatchNorm and activation; appends its output.

    ``y = [x, conv2(act(bn2(conv1(act(bn1(x))))))]``; bn2 is the one that ``conv1`` ends with.
    """

    def __init__(self, in_channels: int, growth: int, make: Make, conv: MakeConv, act: Act):
        super().__init__()
        self.norm1, self.act = nn.BatchNorm2d(in_channels), act
        self.conv1 = make(in_channels, 4 * growth, 1, 1)
        self.conv2 = conv(4 * growth, growth, 3, 1)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        y_BCHW = self.act(self.conv1(self.act(self.norm1(x_BCHW)), routing))
        return torch.cat([x_BCHW, self.conv2(y_BCHW, routing)], 1)


class Transition(nn.Module):
    """BatchNorm, activation, a plain 1x1 convolution to fewer channels, 2x2 average pooling."""

    def __init__(self, in_channels: int, channels: int, act: Act):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(in_channels), act
        self.conv = plain_conv(in_channels, channels, 1)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        return F.avg_pool2d(self.conv(self.act(self.norm(x_BCHW))), 2)


@dataclass(frozen=True, kw_only=True)
class DenseNet(CheckedFields):
    """DenseNet-BC whose growth rate is scaled by the ratio; compression 0.5.

    Both convolutions of a dense layer are mixtures; transitions and stem are plain. Their widths
    follow from the growth rate, so that one expert with them is S-Dense.

    Up to 64 px: 40 layers, growth 12, three blocks of six dense layers (36 mixture convolutions),
    3x3 stem of 24 channels; 0.072 GMAC dense at 32 px and four times that at 64. AdvMoE's router
    would be 56% of it at 32 px, with more parameters than the net. Ours has one block a stage and
    half the widths (8, 16, 32): 3.2 MMAC, 4.4% of the dense net, 19 thousand parameters. Above:
    DenseNet-121, the paper's smallest form for ImageNet (growth 32; blocks of 6, 12, 24 and 16
    layers, 116 mixture convolutions; 7x7 stem with stride 2 and pooling), 2.8 GMAC dense, of which
    AdvMoE's own router is 1.4%.

    Attributes:
        num_experts: 1 is a dense net.
        ratio: Growth rate of one expert over the dense one, in (0, 1].
        router_scope: One route for the network, or one a layer.
        activation: ``relu``, or smooth (arXiv:2006.14536): ``silu``, ``softplus``; of the body.
    """

    num_experts: Count = 2
    ratio: Ratio = 0.5
    router_scope: RouterScope = "shared"
    activation: Activation = "relu"

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network for square images of ``image_size`` pixels."""
        large, act = image_size > 64, ACTIVATIONS[self.activation]
        growth = scaled(32 if large else 12, self.ratio)
        make = mixture(self.num_experts, self.router_scope)
        conv = mixture_conv(self.num_experts, self.router_scope)
        channels = 2 * growth
        stem = LargeStem(channels, act) if large else plain_conv(3, channels)
        layers: list[nn.Module] = []
        for block, depth in enumerate((6, 12, 24, 16) if large else (6, 6, 6)):
            if block:
                layers.append(Transition(channels, channels // 2, act))
                channels //= 2
            for _ in range(depth):
                layers.append(DenseLayer(channels, growth, make, conv, act))
                channels += growth
        blocks, widths = (3, (16, 32, 64)) if large else (1, (8, 16, 32))
        return assemble(
            PreActBody(stem, layers, channels, num_classes, act),
            lambda: ImageRouter(self.num_experts, blocks=blocks, widths=widths),
            num_experts=self.num_experts,
            router_scope=self.router_scope,
            statistics="imagenet" if large else "cifar",
        )
