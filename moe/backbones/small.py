"""A small residual net for laptops, tests and first looks: ours, from no paper."""

from __future__ import annotations

from dataclasses import dataclass

from moe.backbones.base import RouterScope
from moe.backbones.blocks import (
    ACTIVATIONS,
    Activation,
    BasicBlock,
    assemble,
    mixture,
    plain,
    scaled,
)
from moe.backbones.resnet import ResidualBody
from moe.network import Network
from moe.routers import ImageRouter
from moe.valid_fields import CheckedFields, Count, Ratio


@dataclass(frozen=True, kw_only=True)
class Small(CheckedFields):
    """One residual block a stage at widths 96, 192, 384 behind a stem of 48 channels.

    From 32 px on the stem halves the image's side, as do the last two stages. At 32 px and
    ``ratio=0.5`` one route costs 28 MMAC, of which the router (one block a stage, widths 8, 16 and
    32, on at most 16 px) takes 0.8.

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
        make, act = mixture(self.num_experts, self.router_scope), ACTIVATIONS[self.activation]
        channels = stem = scaled(48, self.ratio) if self.num_experts == 1 else 48
        blocks = []
        for stage, width in enumerate((96, 192, 384)):
            out = scaled(width, self.ratio)
            blocks.append(BasicBlock(channels, out, 2 if stage else 1, make, plain, act))
            channels = out
        halve = 2 if image_size >= 32 else 1
        return assemble(
            ResidualBody(plain(3, stem, 3, halve), blocks, channels, num_classes, False, act),
            lambda: ImageRouter(self.num_experts, blocks=1, widths=(8, 16, 32), max_side=16),
            num_experts=self.num_experts,
            router_scope=self.router_scope,
        )
