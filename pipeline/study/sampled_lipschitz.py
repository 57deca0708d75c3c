"""Lipschitz constants of a mixture, its experts and its twin, and the jump at routing boundaries.

Shapes: B images, E experts, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe.certification.lipschitz_bounds import NoBoundError, reach
from moe.network import Network
from pipeline.study.findings import Row, StudyResult, mean
from pipeline.study.routing_under_attack import boundary_gap
from pipeline.study.subjects import StudySettings, Subject, chosen_per_decision, is_soft

Function = Callable[[Tensor], Tensor]


def margin_slope(function: Function, x_BCHW: Tensor) -> Tensor:
    """Length of the gradient of the gap of the two highest logits, in L1, (B,).

    The local Lipschitz constant of the gap for changes of the pixels in L-inf.
    """
    x = x_BCHW.detach().clone().requires_grad_()
    with torch.enable_grad():
        top_B2 = function(x).topk(2, 1).values
        (slope,) = torch.autograd.grad((top_B2[:, 0] - top_B2[:, 1]).sum(), x)
    return slope.flatten(1).abs().sum(1)


@torch.no_grad()
def boundary_jump(model: Network, x_BCHW: Tensor) -> Tensor:
    """Largest change of a logit as each image's closest decision goes the other way, (B,).

    At the boundary the two scores are equal, so both are set to their mean, and the one ahead is
    changed: what remains is the jump and not the slope of the gates.
    """
    scores = model.routing_scores(x_BCHW)
    flat = scores.reshape(len(x_BCHW), -1, scores.shape[-1])
    gap_BM = boundary_gap(model, scores).flatten(1)
    rows_B, closest_B = torch.arange(len(x_BCHW)), gap_BM.argmin(1)
    own_BE = flat[rows_B, closest_B]
    order_BE = own_BE.argsort(dim=1, descending=True, stable=True)
    k = min(chosen_per_decision(model), flat.shape[2] - 1)
    logits = []
    for ahead, behind in ((k - 1, k), (k, k - 1)):
        changed = own_BE.clone()
        middle_B = (own_BE[rows_B, order_BE[:, k - 1]] + own_BE[rows_B, order_BE[:, k]]) / 2
        hair_B = 1e-5 * middle_B.abs().clamp(min=1)
        changed[rows_B, order_BE[:, ahead]] = middle_B + hair_B
        changed[rows_B, order_BE[:, behind]] = middle_B - hair_B
        moved = flat.clone()
        moved[rows_B, closest_B] = changed
        logits.append(model.held(x_BCHW, moved.view_as(scores)))
    return (logits[0] - logits[1]).abs().amax(1)


def certified(function: Function, subject: Subject) -> float | str:
    """Largest certified constant of a logit; why there is none, in a word, where there is none."""
    x_BCHW, _, _ = next(subject.batches())
    try:
        return float(reach(function, x_BCHW[:1]).each.amax())
    except NoBoundError:
        return "no bound"


def lipschitz(subjects: Sequence[Subject], settings: StudySettings) -> StudyResult:
    """Sample local constants, bound them where there is a bound, and measure jumps."""
    rows: list[Row] = []
    for subject in subjects:
        model = subject.model
        parts: dict[str, Function] = {"deployed": lambda x, m=model: m(x).logits}  # type: ignore[misc]
        for expert in range(model.num_experts if model.num_experts > 1 else 0):

            def alone(x: Tensor, m: Network = model, e: int = expert) -> Tensor:
                with torch.no_grad():
                    route = m(x).route
                return m.along(x, torch.full_like(route, e))

            parts[f"expert {expert}"] = alone
        hard = model.num_experts > 1 and not is_soft(model)
        for name, function in parts.items():
            found = subject.over(
                lambda x, _y, _i, f=function: {"slope": margin_slope(f, x)}  # type: ignore[misc]
            )["slope"]
            jump = None
            if hard and name == "deployed":
                jump = subject.over(
                    lambda x, _y, _i, m=model: {"jump": boundary_jump(m, x)}  # type: ignore[misc]
                )["jump"]
            bound = "no bound" if hard and name == "deployed" else certified(function, subject)
            rows.append(
                {
                    "model": subject.name,
                    "part": name,
                    "sampled constant of the margin": mean(found),
                    "largest sampled": float(found.max()),
                    "bound of a logit": bound,
                    "jump at the closest boundary": mean(jump) if jump is not None else "",
                    "largest jump": float(jump.max()) if jump is not None else "",
                }
            )
    words = [
        "Constants are for changes of pixels in L-inf. A sampled constant is a lower bound of the "
        "true one. A hard route has no global constant, for it jumps; attention has none either.",
    ]
    y = "sampled constant of the margin"
    return StudyResult("Lipschitz constants", rows, "part", y, "model", words)
