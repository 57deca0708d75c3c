"""Faithfulness of input gradients: those of the classifier's margin and of the router's gap.

Every attack by gradients believes them. A layer that rounds, hashes or permutes leaves gradients
that are finite and not zero, and lead nowhere; a gate without any is invisible to all attacks on
routes.

Shapes: B images, D decisions, E experts, J directions, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks import Objective
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, slope_of
from pipeline.optimization.losses import margin_per_image

DIRECTIONS = 16
CORRELATION, SLOPE = 0.5, (0.2, 5.0)  # what a faithful image keeps


@dataclass(frozen=True, kw_only=True)
class FaithfulLogits:
    """Whether the margin changes as its input gradient says, at the size of a step: bool (B,)."""

    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        def height(x: Tensor) -> Tensor:
            return margin_per_image(model(x).logits, y_B)

        return Attacked(is_faithful(height, x_BCHW, self.attack, noise), x_BCHW)


@dataclass(frozen=True, kw_only=True)
class FaithfulRouter:
    """The same of the gap between the two experts nearest to a change of route: bool (B,).

    Looked at where the image is, and where an attack on that gap leads it: far from a boundary and
    near one. An image whose gap has no gradient, or one that is not finite, is not faithful.
    """

    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        gap = nearest_gap(model, x_BCHW)
        fine_B = is_faithful(gap, x_BCHW, self.attack, noise)
        near = self.attack.ascend(lambda x: -gap(x), x_BCHW, x_BCHW, steps=10)
        return Attacked(fine_B & is_faithful(gap, near, self.attack, noise), near)


@dataclass(frozen=True, kw_only=True)
class RouterGradient:
    """Whether the gap between the two experts nearest to a change has an input gradient."""

    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        gradient = slope_of(nearest_gap(model, x_BCHW), x_BCHW).flatten(1)
        return Attacked(gradient.isfinite().all(1) & gradient.ne(0).any(1), x_BCHW)


def nearest_gap(model: Network, x_BCHW: Tensor) -> Objective:
    """Make the gap of the router's best over its second, of the decision that is the closest.

    Decision and experts are those of ``x_BCHW``, so that the gap crosses zero where the route
    changes and does not turn round there; the routes of other layers are held at those of
    ``x_BCHW``, since their changes make the scores behind them jump.
    """
    with torch.no_grad():
        clean = model(x_BCHW)
        scores_BDE = clean.router
        scores_BDE = scores_BDE.reshape(len(x_BCHW), -1, scores_BDE.shape[-1])
        top = scores_BDE.topk(2, dim=-1)
        place_B = (top.values[..., 0] - top.values[..., 1]).argmin(1)
    every_B = torch.arange(len(x_BCHW), device=x_BCHW.device)
    pair_B2 = top.indices[every_B, place_B]

    def gap(x: Tensor) -> Tensor:
        found = model.scores_along(x, clean.route)
        own_BE = found.reshape(len(x), -1, found.shape[-1])[every_B, place_B]
        pair = own_BE.gather(1, pair_B2)
        return pair[:, 0] - pair[:, 1]

    return gap


class GradientAgreement(NamedTuple):
    """Predicted against actual changes: rank correlation and slope of the regression, (B,) each."""

    correlation_B: Tensor
    slope_B: Tensor


def is_faithful(
    height: Callable[[Tensor], Tensor], x_BCHW: Tensor, attack: PGD, noise: Draw
) -> Tensor:
    """Tell where a height changes as its gradient says: bool (B,).

    The changes that the gradient predicts for sixteen moves must correlate with the actual ones in
    rank, and be of their size, see ``compare_changes``.
    """
    found = compare_changes(height, x_BCHW, attack, noise)
    right_B = (found.slope_B >= SLOPE[0]) & (found.slope_B <= SLOPE[1])
    return (found.correlation_B >= CORRELATION) & right_B


def compare_changes(
    height: Callable[[Tensor], Tensor], x_BCHW: Tensor, attack: PGD, noise: Draw
) -> GradientAgreement:
    """Compare the changes of a height that its gradient predicts with the actual ones.

    Sixteen moves of one step of the attack, from opposite to the gradient to along it: the
    probability that a pixel follows the gradient rises from 0 to 1 over the moves.
    """
    gradient, clean_B = slope_of(height, x_BCHW), height(x_BCHW).detach()
    predicted, actual = [], []
    for turn in range(DIRECTIONS):
        along = (noise.uniform(x_BCHW) + 1) / 2 < turn / (DIRECTIONS - 1)
        signs = torch.where(along, 1.0, -1.0) * torch.where(gradient < 0, -1.0, 1.0)
        if attack.norm == "l2":
            signs = signs * gradient.abs()
            signs = signs / signs.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
        moved = (x_BCHW + attack.step_size * signs).clamp(0, 1)
        with torch.no_grad():
            actual.append(height(moved) - clean_B)
        predicted.append((gradient * (moved - x_BCHW)).flatten(1).sum(1))
    predicted_BJ, actual_BJ = torch.stack(predicted, 1).double(), torch.stack(actual, 1).double()
    slope_B = (predicted_BJ * actual_BJ).sum(1) / predicted_BJ.square().sum(1)
    return GradientAgreement(rank_correlation(predicted_BJ, actual_BJ), slope_B)


def rank_correlation(a_BJ: Tensor, b_BJ: Tensor) -> Tensor:
    """Spearman's correlation of each row, (B,); of a row without two values, not a number."""
    ranks = [torch.argsort(torch.argsort(t, 1), 1).double() for t in (a_BJ, b_BJ)]
    flat_B = (b_BJ.amax(1) == b_BJ.amin(1)) | (a_BJ.amax(1) == a_BJ.amin(1))
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    both_B = (centred[0] * centred[1]).sum(1)
    sizes_B = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return torch.where(flat_B, torch.nan, both_B / sizes_B)
