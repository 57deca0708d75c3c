"""Radii inside which a mixture's answer provably stands, in L-inf and pixel units.

Every radius is that of an open ball around an image: no image nearer than it, in the box [0, 1], is
classified as anything but y. Nothing here is estimated; the constants come from
``moe.certification.difference_constants``.

Shapes: B images, E experts, K classes, D pixels times channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from moe.certification.difference_constants import affine_rows, difference_constants
from moe.certification.lipschitz_bounds import NoBoundError
from moe.network import Network


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
class MixtureOutputs:
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
def look(model: Network, x_BCHW: Tensor, top_k: int) -> MixtureOutputs:
    """Run every expert and the router on some images."""
    every = range(model.num_experts)
    routes = [torch.full((len(x_BCHW),), expert, device=x_BCHW.device) for expert in every]
    logits_BEK = torch.stack([model.along(x_BCHW, route) for route in routes], 1)
    scores_BE = model.router_scores(x_BCHW)
    order_BE = scores_BE.argsort(dim=1, descending=True, stable=True)
    kept_BE = torch.zeros_like(scores_BE, dtype=torch.bool)
    return MixtureOutputs(logits_BEK, scores_BE, kept_BE.scatter(1, order_BE[:, :top_k], True))


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


def theorem_radius(
    seen: MixtureOutputs, proven: Constants, y_B: Tensor, *, need: float = 0.0
) -> Tensor:
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


def theorem_radius_per_class(seen: MixtureOutputs, proven: Constants, y_B: Tensor) -> Tensor:
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
