"""Theory of linear experts, computed against closed forms (after arXiv:2210.10253).

(T1) Away from boundaries a hard mixture has the constant of its expert. (T2) Linear experts on E
orthogonal subspaces gain up to sqrt(E) over the dense interpolator. (T3) Softmax gates add at most
``max|w_i - w_j| max|f_i - f_j| / 4``: experts that differ cost. (T4) A hard gate jumps by
``gate (f_i - f_j)`` at a boundary. Derived and checked here; the paper's own statements are not
public.

Shapes: E experts, D features of a subspace, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.study.findings import Row, StudyResult
from pipeline.study.subjects import StudySettings, Subject

WIDTH, SAMPLES = 4, 200


def subspaces(experts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw orthonormal bases (E, D, E D) and unit targets (E, D) of each subspace."""
    size = experts * WIDTH
    draw = torch.randn(size, size, generator=generator, dtype=torch.float64)
    bases_EDF = torch.linalg.qr(draw)[0].view(experts, WIDTH, size)
    targets_ED = torch.randn(experts, WIDTH, generator=generator, dtype=torch.float64)
    return bases_EDF, targets_ED / targets_ED.norm(dim=1, keepdim=True)


def fitted_gain(experts: int, generator: torch.Generator) -> tuple[float, float]:
    """Fit a dense map and E experts to data on E subspaces: constant of each, in L2 (T1, T2)."""
    bases_EDF, targets_ED = subspaces(experts, generator)
    shape = (experts, SAMPLES, WIDTH)
    z_END = torch.randn(shape, generator=generator, dtype=torch.float64)
    x_ENF, y_EN = z_END @ bases_EDF, torch.einsum("end,ed->en", z_END, targets_ED)
    driver = "gelsd"  # the interpolator of least norm
    dense_F1 = torch.linalg.lstsq(x_ENF.flatten(0, 1), y_EN.flatten()[:, None], driver=driver)
    own_EF1 = [
        torch.linalg.lstsq(x_NF, y_N[:, None], driver=driver).solution
        for x_NF, y_N in zip(x_ENF, y_EN, strict=True)
    ]
    return float(dense_F1.solution.norm()), max(float(own.norm()) for own in own_EF1)


def soft_mixture(apart: float, generator: torch.Generator) -> tuple[float, float, float]:
    """Sample the constant of a softmax mixture of two linear experts in the unit ball (T3).

    Returns:
        The largest slope found, the constant of the worse expert, and the bound of T3.
    """
    draws = torch.randn(2, 2, WIDTH, generator=generator, dtype=torch.float64)
    gates_ED = draws[0] / draws[0].norm(dim=1, keepdim=True)
    common_D, differ_D = draws[1] / draws[1].norm(dim=1, keepdim=True)
    maps_ED = torch.stack([common_D + apart * differ_D / 2, common_D - apart * differ_D / 2])
    x_ND = torch.randn(20_000, WIDTH, generator=generator, dtype=torch.float64)
    x_ND = x_ND / x_ND.norm(dim=1, keepdim=True).clamp(min=1)
    x_ND.requires_grad_()
    f_N = ((x_ND @ gates_ED.T).softmax(1) * (x_ND @ maps_ED.T)).sum(1)
    (slope_ND,) = torch.autograd.grad(f_N.sum(), x_ND)
    steepest = float(maps_ED.norm(dim=1).max())
    apart_gates = float((gates_ED[0] - gates_ED[1]).norm())
    apart_maps = float((maps_ED[0] - maps_ED[1]).norm())  # the largest difference in the unit ball
    return float(slope_ND.norm(dim=1).max()), steepest, steepest + apart_gates * apart_maps / 4


def boundary_jump_of_linear(generator: torch.Generator) -> tuple[float, float]:
    """Cross the boundary of a hard gate of raw softmax weight 1/2: change, and T4's closed form."""
    draws = torch.randn(2, 2, WIDTH, generator=generator, dtype=torch.float64)
    gates_ED, maps_ED = draws
    x_D = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    normal_D = gates_ED[0] - gates_ED[1]
    x_D = x_D - (x_D @ normal_D) / (normal_D @ normal_D) * normal_D  # on the boundary
    sides = []
    for sign in (1.0, -1.0):
        at_D = x_D + sign * 1e-9 * normal_D
        soft_E = (gates_ED @ at_D).softmax(0)
        e = int(soft_E.argmax())
        sides.append(float(soft_E[e] * (maps_ED[e] @ at_D)))
    return abs(sides[0] - sides[1]), abs(float((maps_ED[0] - maps_ED[1]) @ x_D)) / 2


def theory(subjects: Sequence[Subject], settings: StudySettings) -> StudyResult:
    """Compute T1 to T4 and compare each with its closed form; takes no runs."""
    generator, rows = torch.Generator().manual_seed(settings.seed), list[Row]()
    for experts in settings.num_experts:
        dense, own = fitted_gain(experts, generator)
        rows.append(_row("T1 constant of the experts", experts, own, 1.0, "equal"))
        rows.append(_row("T2 gain over dense", experts, dense / own, math.sqrt(experts), "equal"))
    for apart in (0.0, 0.5, 1.0, 2.0, 4.0):
        found, steepest, bound = soft_mixture(apart, generator)
        rows.append(_row("T3 constant, experts apart", apart, found, bound, "at most"))
        rows.append(_row("T3 the worse expert alone", apart, steepest, bound, "at most"))
    for trial in range(1, 4):
        found, form = boundary_jump_of_linear(generator)
        rows.append(_row("T4 jump at a boundary", trial, found, form, "equal"))
    bad = [row for row in rows if row["holds"] != "yes"]
    words = [
        f"{len(rows) - len(bad)} of {len(rows)} rows agree with their closed form.",
        "T1, T2: x is the number of experts; T3: how far their maps differ; T4: a trial.",
    ]
    return StudyResult("Theory of linear experts", rows, "x", "computed", "statement", words)


def _row(statement: str, x: float, found: float, form: float, relation: str) -> Row:
    close = abs(found - form) <= 1e-6 * max(1.0, abs(form))
    holds = close if relation == "equal" else found <= form * (1 + 1e-9)
    return {
        "statement": statement,
        "x": float(x),
        "computed": found,
        "closed form": form,
        "relation": relation,
        "holds": "yes" if holds else "no",
    }
