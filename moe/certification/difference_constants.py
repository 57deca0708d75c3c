"""Lipschitz constants of a network: certified from above, or sampled from below.

All constants are of the largest change of a pixel: ``|f(x') - f(x)| <= L max_p |x'_p - x_p|``. What
is called sampled proves nothing but that no smaller constant holds.

Shapes: B images, K outputs, D pixels times channels, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe.certification.lipschitz_bounds import ROUND_UP, reach


def affine_rows(function: Callable[[Tensor], Tensor], image_1CHW: Tensor) -> Tensor | None:
    """Read the matrix (K, C H W) of a function that is affine in the pixels; None: it is not.

    Raises:
        NoBoundError: As ``reach``, which tells.
    """
    return _rows(function, image_1CHW) if reach(function, image_1CHW).affine else None


def difference_constants(function: Callable[[Tensor], Tensor], image_1CHW: Tensor) -> Tensor:
    """Bound the differences of K outputs, (K, K); exact where the function is affine.

    Raises:
        NoBoundError: As ``reach``.
    """
    found = reach(function, image_1CHW)
    if not found.affine:
        return found.pairs
    rows_KD = _rows(function, image_1CHW)
    return torch.cdist(rows_KD, rows_KD, p=1) * ROUND_UP


def _rows(function: Callable[[Tensor], Tensor], image_1CHW: Tensor) -> Tensor:
    blank = torch.zeros_like(image_1CHW)
    slopes = torch.autograd.functional.jacobian(function, blank)  # type: ignore[no-untyped-call]
    rows_KD: Tensor = slopes.reshape(-1, blank.numel()).detach()
    return rows_KD


def sampled_constant(
    function: Callable[[Tensor], Tensor],
    x_BCHW: Tensor,
    *,
    eps: float,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Search for the largest ``|f(x1) - f(x2)| / max |x1 - x2|`` near each image; return (B,).

    A lower bound of the local Lipschitz constant, and so of the global one: it proves that a
    constant is too small, never that one is large enough. Both images of a pair climb by sign
    steps inside the ball and [0, 1], which get smaller towards the end (as in Yang et al., NeurIPS
    2020, arXiv:2003.02460, who move one of them). The best pair seen counts.

    Args:
        function: One number per image.
        eps: Radius of the ball around each image, in pixel units.
        steps: Gradients.
    """

    def draw() -> Tensor:
        noise = torch.rand(x_BCHW.shape, generator=generator, dtype=x_BCHW.dtype)
        return noise.to(x_BCHW.device) * 2 - 1

    low, high = (x_BCHW - eps).clamp(min=0), (x_BCHW + eps).clamp(max=1)
    pair = [torch.clamp(x_BCHW + eps * draw(), low, high) for _ in range(2)]
    best_B = x_BCHW.new_zeros(len(x_BCHW))
    for step in range(steps + 1):
        pair = [image.detach().requires_grad_() for image in pair]
        with torch.enable_grad():
            rise_B = (function(pair[0]) - function(pair[1])).abs()
            slopes = torch.autograd.grad(rise_B.sum(), pair)
        apart_B = (pair[0] - pair[1]).detach().abs().flatten(1).amax(1)
        found_B = torch.where(apart_B > 0, rise_B.detach() / apart_B, 0.0)
        best_B = torch.maximum(best_B, found_B)
        size = eps * (1 - step / (steps + 1))
        pair = [
            torch.clamp(image.detach() + size * slope.sign(), low, high)
            for image, slope in zip(pair, slopes, strict=True)
        ]
    return best_B
