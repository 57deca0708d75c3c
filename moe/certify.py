"""Radii inside which a mixture's answer provably stands, in L-inf and pixel units.

Every radius is that of an open ball around an image: no image nearer than it, in the box [0, 1], is
classified as anything but y. Nothing here is estimated; the constants come from ``moe.lipschitz``.

Shapes: B images, E experts, K classes, D pixels times channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from moe.lipschitz import NoBoundError, affine_rows, difference_constants
from moe.network import Network

BISECTIONS = 40  # of [0, 1]: to 1e-12


class Status(StrEnum):
    """What a certificate says of one image."""

    CERTIFIED = "certified"
    VACUOUS = "vacuous"  # true, but the ball holds no other image of 8 bits
    NOT_APPLICABLE = "not applicable"  # the gates jump inside the ball: no constant holds there
    WRONG = "wrong"  # the clean image is misclassified: there is nothing to certify


@dataclass(frozen=True)
class Constants:
    """What is proven about a mixture for all images at once.

    Attributes:
        logits_EKK: Lipschitz constants of the experts' differences of logits ``z_k - z_l``.
        scores_EE: Those of the differences of the router's scores; zeros (1, 1) for a dense net.
        router_ED: Matrix of the router, where its scores are affine in the pixels; else None.
        top_k: Experts that take part in an image; 1 is a hard gate.
        mix: What is mixed; the answer of one expert alone does not depend on it.
    """

    logits_EKK: Tensor
    scores_EE: Tensor
    router_ED: Tensor | None
    top_k: int
    mix: Literal["probabilities", "logits"]

    @property
    def jumps(self) -> bool:
        """Whether the gates are discontinuous: some experts are left out."""
        return self.top_k < len(self.scores_EE)


@dataclass(frozen=True)
class Seen:
    """What a mixture does at some images.

    Attributes:
        logits_BEK: Of every expert.
        scores_BE: Of the router.
        kept_BE: bool, the experts that take part.
    """

    logits_BEK: Tensor
    scores_BE: Tensor
    kept_BE: Tensor

    @property
    def gates_BE(self) -> Tensor:  # noqa: N802
        """Softmax over the experts that take part, zero elsewhere."""
        return self.scores_BE.masked_fill(~self.kept_BE, -math.inf).softmax(1)

    def outputs(self, mix: str) -> Tensor:
        """What is mixed, (B, E, K)."""
        return self.logits_BEK if mix == "logits" else self.logits_BEK.softmax(2)


def constants(model: Network, image_1CHW: Tensor) -> Constants:
    """Prove the constants of a network in eval mode, expert by expert.

    Args:
        model: In float64, for bounds above what rounding does.

    Raises:
        NoBoundError: The network does what has no bound, attention among it, or routes in every
            layer, where no shared route could be kept.
    """
    if model.num_layers:
        raise NoBoundError("no bound where every layer routes for itself (router_scope=per_layer)")
    experts = model.num_experts

    def along(expert: int) -> Tensor:
        route = torch.full((1,), expert, device=image_1CHW.device)
        return difference_constants(lambda x: model.along(x, route), image_1CHW)

    router = None
    if experts > 1:
        router = affine_rows(model.router_scores, image_1CHW)
        scores_EE = difference_constants(model.router_scores, image_1CHW)
    else:
        scores_EE = image_1CHW.new_zeros(1, 1)
    return Constants(
        torch.stack([along(expert) for expert in range(experts)]),
        scores_EE,
        router,
        min(getattr(model, "top_k", 1), experts),
        getattr(model, "mix", "logits"),
    )


@torch.no_grad()
def look(model: Network, x_BCHW: Tensor, top_k: int) -> Seen:
    """Run every expert and the router on some images."""
    every = range(model.num_experts)
    routes = [torch.full((len(x_BCHW),), expert, device=x_BCHW.device) for expert in every]
    logits_BEK = torch.stack([model.along(x_BCHW, route) for route in routes], 1)
    scores_BE = model.router_scores(x_BCHW)
    order_BE = scores_BE.argsort(dim=1, descending=True, stable=True)
    kept_BE = torch.zeros_like(scores_BE, dtype=torch.bool)
    return Seen(logits_BEK, scores_BE, kept_BE.scatter(1, order_BE[:, :top_k], True))


def margins(outputs_BEK: Tensor, y_B: Tensor) -> Tensor:
    """Differences of each expert's outputs, ``f_i^y - f_i^k``, (B, E, K); 0 at k = y."""
    own_BE1 = outputs_BEK.gather(2, y_B[:, None, None].expand(-1, outputs_BEK.shape[1], 1))
    return own_BE1 - outputs_BEK


def softmax_pairs(logits_EKK: Tensor) -> Tensor:
    """Constants of ``p_y - p_k`` from those of the logits' differences, (E, K, K).

    The gradient of ``p_y - p_k`` in the logits sums to zero and to at most 1/2 over its positive
    part, of which y or k is the only member on one side: the difference moves by at most half the
    largest of ``|z_y - z_l|`` and ``|z_k - z_l|`` over l. Never more than twice ``softmax_each``.
    """
    widest_EK = logits_EKK.amax(2)
    return (torch.maximum(widest_EK[:, :, None], widest_EK[:, None, :]) / 2).masked_fill(
        torch.eye(widest_EK.shape[1], dtype=torch.bool, device=widest_EK.device), 0
    )


def softmax_each(logits_EKK: Tensor) -> Tensor:
    """Constants of ``p_k``, (E, K): ``p_k (1 - p_k) <= 1/4`` of the largest ``|z_k - z_l|``."""
    return logits_EKK.amax(2) / 4


def _reached(scores_EE: Tensor, kept_BE: Tensor) -> Tensor:
    """Constants of score differences among the experts that take part, (B, E, E), else 0."""
    return scores_EE * (kept_BE[:, :, None] & kept_BE[:, None, :])


def theorem_radius(seen: Seen, proven: Constants, y_B: Tensor, *, need: float = 0.0) -> Tensor:
    """Theorem 5.4's radius with constants of differences, (B,); of mixed probabilities only.

    ``eps* = min_k [F^y - F^k - need] / sum_i (r_i M_i + a_i(x) L_i)`` (arXiv:2502.06832, theorem
    5.4), ``d_i = f_i^y - f_i^k``. Sound as it stands, with a_i at the clean image, since
    ``a_i(x') d_i(x') - a_i(x) d_i(x) = (a_i(x') - a_i(x)) d_i(x') + a_i(x) (d_i(x') - d_i(x))``,
    and ``|d_i| <= M_i = 1`` everywhere. r_i is 1/4 of the largest constant of ``s_i - s_j``, L_i
    that of ``d_i``: constants of single classes would need a factor of two
    (``theorem_radius_per_class``). Where experts are left out it holds only while the same ones
    take part: up to ``route_radius``.

    Args:
        need: Margin that has to be left: see ``need_of_dual``.
    """
    assert proven.mix == "probabilities" or proven.top_k == 1
    margin_BEK = margins(seen.outputs("probabilities"), y_B)
    slope_BEK = softmax_pairs(proven.logits_EKK)[:, y_B].transpose(0, 1)
    gates_BE1 = seen.gates_BE[:, :, None]
    router_B = _reached(proven.scores_EE, seen.kept_BE).amax(2).sum(1) / 4
    slope_BK = router_B[:, None] + (gates_BE1 * slope_BEK).sum(1)
    return _least((gates_BE1 * margin_BEK).sum(1) - need, slope_BK, y_B)


def theorem_radius_per_class(seen: Seen, proven: Constants, y_B: Tensor) -> Tensor:
    """The same with constants of the classes: two may move towards each other, so half of it.

    ``min_k [F^y - F^k] / (2 sum_i (r_i M_i + a_i(x) max_c L_i^c))``; never above
    ``theorem_radius``.
    """
    margin_BEK = margins(seen.outputs("probabilities"), y_B)
    gates_BE = seen.gates_BE
    router_B = _reached(proven.scores_EE, seen.kept_BE).amax(2).sum(1) / 4
    slope_B = router_B + (gates_BE * softmax_each(proven.logits_EKK).amax(1)).sum(1)
    margin_BK = (gates_BE[:, :, None] * margin_BEK).sum(1)
    return _least(margin_BK, (2 * slope_B)[:, None].expand_as(margin_BK), y_B)


def _least(margin_BK: Tensor, slope_BK: Tensor, y_B: Tensor) -> Tensor:
    """Least of the radii towards the other classes; 0 where a margin is not positive."""
    safe_BK = torch.where(margin_BK > 0, margin_BK / slope_BK, 0.0)
    return safe_BK.scatter(1, y_B[:, None], math.inf).amin(1)


def need_of_dual(alpha: float) -> float:
    """Margin that the robust half must keep for ``(1 - alpha) F_S + alpha F_R`` to stand.

    ``F_D^y - F_D^k >= alpha m_R(x') - (1 - alpha)`` whatever F_S says, as probabilities differ by
    at most one: with ``need = (1 - alpha) / alpha``, ``theorem_radius`` of F_R is
    ``[alpha m_R(x) - (1 - alpha)] / (alpha K)`` (ours). No margin is above 1, so alpha must be
    above 1/2.

    Raises:
        ValueError: alpha is not in (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
    return (1 - alpha) / alpha


def floor_radius(seen: Seen, proven: Constants, y_B: Tensor, *, need: float = 0.0) -> Tensor:
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
    seen: Seen, proven: Constants, y_B: Tensor, eps_B: Tensor, *, probabilities: bool = False
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


def _gate_interval(seen: Seen, proven: Constants, eps_B: Tensor) -> tuple[Tensor, Tensor]:
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
    seen: Seen, proven: Constants, y_B: Tensor, eps_B: Tensor, probabilities: bool
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


def route_radius(seen: Seen, proven: Constants, x_BCHW: Tensor, *, box: bool = True) -> Tensor:
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


def statuses(
    radius_B: Tensor, route_B: Tensor, correct_B: Tensor, *, least: float = 1 / 255
) -> list[Status]:
    """Say what the radii are worth, image by image.

    Args:
        radius_B: Inside ``route_B`` already.
        route_B: Distance to where the gates jump.
        least: A ball no larger holds no other image of 8 bits.
    """
    rows = zip(radius_B.tolist(), route_B.tolist(), correct_B.tolist(), strict=True)
    return [_status(radius, route, bool(correct), least) for radius, route, correct in rows]


def _status(radius: float, route: float, correct: bool, least: float) -> Status:
    if not correct:
        return Status.WRONG
    if route <= least:
        return Status.NOT_APPLICABLE
    return Status.CERTIFIED if radius > least else Status.VACUOUS
