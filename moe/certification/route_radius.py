"""How far an image can move before other experts take part.

Shapes: B images, E experts, D pixels times channels, CHW channels and sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.certification.radii import Constants, MixtureOutputs


def route_radius(
    seen: MixtureOutputs, proven: Constants, x_BCHW: Tensor, *, box: bool = True
) -> Tensor:
    """Distance within which the same experts take part, (B,); infinite where all of them do.

    Exact for an affine router, see ``exact_route_radius``; otherwise the gap of the scores over the
    constant of their difference, which is sound. 0 at a tie.
    """
    pairs_BEE = seen.kept_BE[:, :, None] & ~seen.kept_BE[:, None, :]
    gap_BEE = seen.scores_BE[:, :, None] - seen.scores_BE[:, None, :]
    if proven.router_ED is None or not proven.jumps:
        radius_BEE = gap_BEE / proven.scores_EE
        return torch.where(pairs_BEE, radius_BEE, math.inf).flatten(1).amin(1)
    x_BD, weights_ED = x_BCHW.flatten(1), proven.router_ED
    least_B = torch.full_like(gap_BEE[:, 0, 0], math.inf)
    for one, other in pairs_BEE.any(0).nonzero().tolist():
        normal_D = weights_ED[one] - weights_ED[other]
        found_B = plane_distance(x_BD, normal_D, gap_BEE[:, one, other], box=box)
        least_B = torch.where(pairs_BEE[:, one, other], least_B.minimum(found_B), least_B)
    return least_B


def plane_distance(x_BD: Tensor, normal_D: Tensor, gap_B: Tensor, *, box: bool = True) -> Tensor:
    """L-inf distance to where ``gap + <normal, x' - x>`` reaches 0, exactly, (B,).

    Without the box [0, 1] that is ``gap / |normal|_1``. In it, pixel p can move against the normal
    by ``min(eps, room_p)`` only, so that eps solves ``sum_p |normal_p| min(eps, room_p) = gap``:
    piecewise linear, solved between two of the sorted rooms. Infinite where no image in the box
    gets there; 0 where the gap is not positive.
    """
    size_D = normal_D.abs()
    if not box:
        return (gap_B / size_D.sum()).clamp(min=0)
    room_BD = torch.where(normal_D > 0, x_BD, 1 - x_BD).clamp(min=0)
    room_BD, order_BD = room_BD.sort(1)
    size_BD = size_D[order_BD]
    spent_BD = (size_BD * room_BD).cumsum(1)  # by the pixels that have no room left
    left_BD = size_D.sum() - size_BD.cumsum(1)
    falls_BD = spent_BD + left_BD * room_BD  # the fall at eps = room_p
    at_B = (falls_BD < gap_B[:, None]).sum(1)  # rooms that are used up before the plane
    before_B1 = (at_B - 1).clamp(min=0)[:, None]
    first_B = at_B == 0
    spent_B = torch.where(first_B, 0.0, spent_BD.gather(1, before_B1)[:, 0])
    left_B = torch.where(first_B, size_D.sum(), left_BD.gather(1, before_B1)[:, 0])
    eps_B = (gap_B - spent_B) / left_B
    eps_B = torch.where(at_B == x_BD.shape[1], math.inf, eps_B)
    return torch.where(gap_B > 0, eps_B, 0.0)
