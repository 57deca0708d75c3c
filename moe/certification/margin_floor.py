"""The least margin that a mixture can have near an image, and the radius that follows from it.

Shapes: B images, E experts, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.certification.radii import Constants, MixtureOutputs, margins, softmax_pairs

BISECTIONS = 40  # of [0, 1]: to 1e-12


def floor_radius(
    seen: MixtureOutputs, proven: Constants, y_B: Tensor, *, need: float = 0.0
) -> Tensor:
    """Largest radius at which ``margin_floor`` stays above ``need``, (B,), at most 1 (ours).

    Raises:
        ValueError: A margin of probabilities is needed, and logits are mixed.
    """
    if need and proven.mix == "logits" and proven.top_k > 1:
        raise ValueError(f"need must be 0 where logits are mixed, got {need}")

    def stands(eps_B: Tensor) -> Tensor:
        return margin_floor(seen, proven, y_B, eps_B, probabilities=need > 0) > need

    low_B = torch.zeros_like(y_B, dtype=seen.logits_BEK.dtype)
    high_B = torch.ones_like(low_B)
    high_B = torch.where(stands(low_B), high_B, 0.0)
    for _ in range(BISECTIONS):
        middle_B = (low_B + high_B) / 2
        stands_B = stands(middle_B)
        low_B = torch.where(stands_B, middle_B, low_B)
        high_B = torch.where(stands_B, high_B, middle_B)
    return low_B


def margin_floor(
    seen: MixtureOutputs,
    proven: Constants,
    y_B: Tensor,
    eps_B: Tensor,
    *,
    probabilities: bool = False,
) -> Tensor:
    """Bound the margin ``min_k F^y - F^k`` of all images within eps from below, (B,).

    What theorem 5.4 does with one slope, done with what the constants say at this eps: a score
    difference moves by at most its constant times eps, which confines each gate to an interval, a
    logit difference likewise, which bounds each expert's ``d_i`` from below; and the worst gates in
    these intervals that sum to one are found exactly. Holds for mixed logits too. Its radius is
    never below theorem 5.4's, whose slope bounds the same quantities (the same experts take part,
    see ``route_radius``).

    Args:
        probabilities: Whether the margin must be one of probabilities where one expert alone takes
            part, whose logits tell more.
    """
    low_BEK = _differences(seen, proven, y_B, eps_B, probabilities)
    least_BE, most_BE = _gate_interval(seen, proven, eps_B)
    order_BEK = low_BEK.argsort(1)
    low_BEK = low_BEK.gather(1, order_BEK)
    room_BEK = (most_BE - least_BE)[:, :, None].expand_as(low_BEK).gather(1, order_BEK)
    base_BEK = least_BE[:, :, None].expand_as(low_BEK).gather(1, order_BEK)
    free_B11 = (1 - least_BE.sum(1)).clamp(min=0)[:, None, None]
    filled_BEK = room_BEK.cumsum(1).minimum(free_B11)  # the worst expert gets all it can
    share_BEK = filled_BEK.diff(dim=1, prepend=torch.zeros_like(filled_BEK[:, :1]))
    worst_BK = ((base_BEK + share_BEK) * low_BEK).sum(1)
    return worst_BK.scatter(1, y_B[:, None], math.inf).amin(1)


def _gate_interval(seen: MixtureOutputs, proven: Constants, eps_B: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest gate that each expert can get, (B, E): ``1 / sum_j exp(s_j - s_i)``."""
    gap_BEE = seen.scores_BE[:, None, :] - seen.scores_BE[:, :, None]  # [i, j] = s_j - s_i
    room_BEE = eps_B[:, None, None] * proven.scores_EE
    out_BEE = ~(seen.kept_BE[:, :, None] & seen.kept_BE[:, None, :])
    bounds = [
        (1 / gap.masked_fill(out_BEE, -math.inf).exp().sum(2)).masked_fill(~seen.kept_BE, 0)
        for gap in (gap_BEE + room_BEE, gap_BEE - room_BEE)
    ]
    return bounds[0], bounds[1]


def _differences(
    seen: MixtureOutputs, proven: Constants, y_B: Tensor, eps_B: Tensor, probabilities: bool
) -> Tensor:
    """Lowest ``f_i^y - f_i^k`` within eps, (B, E, K)."""
    eps_B11 = eps_B[:, None, None]
    slope_BEK = proven.logits_EKK[:, y_B].transpose(0, 1)
    ahead_BEK = margins(seen.logits_BEK, y_B)
    alone = proven.top_k == 1
    if not probabilities and (alone or proven.mix == "logits"):
        return ahead_BEK - eps_B11 * slope_BEK
    # p_y falls at most to what it is with every other logit as near as it can come
    own_BE1 = 1 / (eps_B11 * slope_BEK - ahead_BEK).exp().sum(2, keepdim=True)
    # and p_k rises at most to what it is with every other logit as far below as it can get
    behind_BEKK = seen.logits_BEK[:, :, None, :] - seen.logits_BEK[:, :, :, None]  # z_l - z_k
    fall_BEKK = eps_B11[..., None] * proven.logits_EKK
    other_BEK = 1 / (behind_BEKK - fall_BEKK).exp().sum(3)
    apart_BEK = own_BE1 - other_BEK
    pairs_BEK = softmax_pairs(proven.logits_EKK)[:, y_B].transpose(0, 1)
    straight_BEK = margins(seen.outputs("probabilities"), y_B) - eps_B11 * pairs_BEK
    return torch.maximum(apart_BEK, straight_BEK).clamp(min=-1)
