"""WRN-28-10 (Zagoruyko & Komodakis, BMVC 2016, arXiv:1605.07146) with mixture convolutions.

Shapes: B images, C channels, HW sides, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

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


class PreActBlock(nn.Module):
    """``y = s + conv2(act(bn2(conv1(h))))``, ``h = act(bn1(x))`` (He et al., ECCV 2016).

    The shortcut s is x where the shape stays (arXiv:1603.05027, section 4.1), and a 1x1 convolution
    of h where it changes, which AdvMoE's released code gets wrong. bn2 is what ``conv1`` ends with.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        make: Make,
        conv: MakeConv,
        act: Act,
    ):
        super().__init__()
        self.norm1, self.act = nn.BatchNorm2d(in_channels), act
        self.conv1 = make(in_channels, channels, 3, stride)
        self.conv2 = conv(channels, channels, 3, 1)
        changes = stride != 1 or in_channels != channels
        self.shortcut = conv(in_channels, channels, 1, stride) if changes else None

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        first_BCHW = self.act(self.norm1(x_BCHW))
        y_BCHW: Tensor = self.conv2(self.act(self.conv1(first_BCHW, routing)), routing)
        short_BCHW = x_BCHW if self.shortcut is None else self.shortcut(first_BCHW, routing)
        return y_BCHW.add_(short_BCHW)


@dataclass(frozen=True, kw_only=True)
class WideResNet(CheckedFields):
    """WRN-28-10: three groups of four pre-activation blocks, 160, 320 and 640 channels wide.

    All 27 convolutions of the blocks, shortcuts included, are mixtures; the stem of 16 channels is
    plain and scaled by the ratio. Up to 32 px the first group sees every pixel (5.24 GMAC dense).
    From there to 64 px the stem halves the side, so that the groups see the resolutions, and cost
    the 5.2 GMAC, that they were made for (21 otherwise). Above, ImageNet's stem of 64 channels and
    a first group of stride 2: at 224 px the groups see the 28, 14 and 7 px of a ResNet's last three
    stages. Ours, as the paper has no such form; 4.2 GMAC dense, about a ResNet-50's cost, where
    groups on 56, 28 and 14 px would take 16.

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
        large, act = image_size > 64, ACTIVATIONS[self.activation]
        make = mixture(self.num_experts, self.router_scope)
        conv = mixture_conv(self.num_experts, self.router_scope)
        channels, stride = scaled(64 if large else 16, self.ratio), 2 if image_size > 32 else 1
        stem = LargeStem(channels, act) if large else plain_conv(3, channels, 3, stride)
        blocks = []
        for group, width in enumerate((160, 320, 640)):
            out = scaled(width, self.ratio)
            for block in range(4):
                stride = 2 if (group or large) and not block else 1
                blocks.append(PreActBlock(channels, out, stride, make, conv, act))
                channels = out
        return assemble(
            PreActBody(stem, blocks, channels, num_classes, act),
            lambda: ImageRouter(self.num_experts),
            num_experts=self.num_experts,
            router_scope=self.router_scope,
            statistics="imagenet" if large else "cifar",
        )
