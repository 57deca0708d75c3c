"""A mixture of two experts whose robust accuracy is known to be 0, by a flip of the route alone.

Shapes: B images, K classes (4), E experts (2), CHW channels and sides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.network import Network
from moe.routing import Routing
from pipeline.data.splits import Images

CLASSES, SIZE = 4, 8
EPS = {"linf": 0.1, "l2": 1.0}  # the radii at which the robust accuracy is 0
GAP = 0.06  # of the router: flipped from this radius on in L-inf, from 0.68 on in L2


def pattern() -> Tensor:
    """Signs (2, H, W), half of them +1: the direction in which the router looks."""
    order = torch.randperm(2 * SIZE * SIZE, generator=torch.Generator().manual_seed(0))
    return (2.0 * (order < SIZE * SIZE) - 1).view(2, SIZE, SIZE)


class SignRouter(nn.Module):
    """Scores ``scale * (-h, h)``, ``h`` the mean of ``sign * pixel`` over channels 1 and 2."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.w_CHW = nn.Parameter(pattern())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height_B = self.scale * (x_BCHW[:, 1:] * self.w_CHW).mean((1, 2, 3))
        return torch.stack([-height_B, height_B], 1)


class QuadrantExperts(nn.Module):
    """Expert 0 says which quadrant of channel 0 is brightest, expert 1 the class after that one.

    ``logits = 20 * mean of the quadrant``: expert 0 is right with a margin of 10, of which an
    L-inf attack of radius r takes 40 r, and an L2 attack at most 7.1 r; expert 1 is never right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        assert routing.shared is not None
        route = routing.shared
        half = SIZE // 2
        quadrants_BK = x_BCHW[:, 0].unfold(1, half, half).unfold(2, half, half).mean((3, 4))
        logits_BK = self.scale * quadrants_BK.flatten(1)
        wrong_BK = logits_BK.roll(1, 1)
        sorted_B = torch.repeat_interleave(
            torch.arange(2, device=x_BCHW.device), torch.tensor(route.counts, device=x_BCHW.device)
        )
        routed_BK = torch.where(sorted_B[:, None] == 1, wrong_BK, logits_BK)
        return routed_BK * route.gate_B[:, None]


def route_flip(scale: float = 20.0) -> Network:
    """Build the mixture. Its clean accuracy is 1, its robust accuracy at ``EPS`` is 0.

    Expert 0 alone is robust there, and its gradient is zero where the router looks, so an attack
    by the true gradient of the deployed network leaves every image standing: the route has to be
    attacked. Random starts do not flip it: over 128 pixels they move ``h`` by a tenth of the gap.

    Args:
        scale: Of the router's scores; the deployed network does not depend on it.
    """
    return Network(
        QuadrantExperts(),
        SignRouter(scale),
        normalize=nn.Identity(),  # type: ignore[arg-type]
        num_experts=2,
    ).eval()


def route_flip_images(count: int) -> Images:
    """Make images of all classes that expert 0 gets and classifies right, with noise of 2/255."""
    generator = torch.Generator().manual_seed(1)
    labels_N = torch.arange(count) % CLASSES
    x_NCHW = torch.empty(count, 3, SIZE, SIZE)
    half, rows = SIZE // 2, torch.arange(count)
    bright_NK = 0.3 + torch.zeros(count, CLASSES).index_put((rows, labels_N), torch.tensor(0.5))
    bright_N22 = bright_NK.view(count, 2, 2)
    x_NCHW[:, 0] = bright_N22.repeat_interleave(half, 1).repeat_interleave(half, 2)
    x_NCHW[:, 1:] = 0.5 - GAP * pattern()
    pixels_NCHW = (255 * x_NCHW).round()
    pixels_NCHW += torch.randint(-2, 3, pixels_NCHW.shape, generator=generator)
    return Images(pixels_NCHW.to(torch.uint8), labels_N)
