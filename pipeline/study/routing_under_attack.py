"""Routing under attack, and what becomes of a model whose experts are replaced.

Shapes: B images, L layers that route, T decisions of a layer per image, E experts, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe.network import Network
from pipeline.study.findings import Cell, Row, StudyResult, mean, share
from pipeline.study.subjects import (
    StudySettings,
    Subject,
    chosen_per_decision,
    expert_weights,
    is_soft,
    layered,
    small_steps,
)

WIDTHS = (0.01, 0.1, 1.0)


@torch.no_grad()
def routing_change(model: Network, before: Tensor, after: Tensor) -> Tensor:
    """Routing change of each image and layer, (B, L), from two sets of ``routing_scores``.

    ``1 - IoU`` of the experts that take part, averaged over tokens. Where none takes part both
    times (a token that no expert chose) IoU is 1; the reference counts it as a change. Of Soft MoE
    ``1 - sum_tokens min(dispatch, dispatch')``, averaged over slots.
    """
    if is_soft(model):
        pair = [layered(model, scores).softmax(2) for scores in (before, after)]
        return 1 - torch.minimum(*pair).sum(2).mean(2)
    one, other = (expert_weights(model, scores) > 0 for scores in (before, after))
    shared_BLT, joint_BLT = (one & other).sum(3), (one | other).sum(3)
    iou_BLT = torch.where(joint_BLT > 0, shared_BLT / joint_BLT.clamp(min=1), 1.0)
    return 1 - iou_BLT.mean(2)


@torch.no_grad()
def boundary_gap(model: Network, scores: Tensor) -> Tensor:
    """Gap of the k-th best score over the next, (B, L, T): how far a decision is from another."""
    top = layered(model, scores).sort(dim=3, descending=True).values
    k = min(chosen_per_decision(model), top.shape[3] - 1)
    return top[..., k - 1] - top[..., k]


def routing(subjects: Sequence[Subject], settings: StudySettings) -> StudyResult:
    """Measure by layer and radius how routes change under attack, and who carries the load."""
    rows: list[Row] = []
    for subject in subjects:
        if (model := subject.model).num_experts == 1:
            continue
        for eps in (0.0, *settings.eps):

            def work(
                x_BCHW: Tensor, y_B: Tensor, _: Tensor, m: Network = model, e: float = eps
            ) -> dict[str, Tensor]:
                x_adv = small_steps(m, x_BCHW, y_B, e / 255, settings) if e else x_BCHW
                with torch.no_grad():
                    clean, moved = m(x_BCHW), m(x_adv)
                    before, after = m.routing_scores(x_BCHW), m.routing_scores(x_adv)
                    weights = [expert_weights(m, scores) for scores in (before, after)]
                gap = boundary_gap(m, before)
                return {
                    "changed": routing_change(m, before, after),
                    "predicted": clean.logits.argmax(1) != moved.logits.argmax(1),
                    "wrong": moved.logits.argmax(1) != y_B,
                    "near": torch.stack([(gap <= w).double().mean(2) for w in WIDTHS], 2),
                    "load": weights[0].gt(0).double().mean(2),
                    "load_adv": weights[1].gt(0).double().mean(2),
                }

            found = subject.over(work)
            for layer in range(found["changed"].shape[1]):
                busiest = [found[k][:, layer].mean(0).argmax() for k in ("load", "load_adv")]
                row: dict[str, Cell] = {
                    "model": subject.name,
                    "layer": layer,
                    "eps (1/255)": eps,
                    "line": f"{subject.name}, layer {layer}",
                    "routing change (1 - IoU)": mean(found["changed"][:, layer]),
                    "prediction changes": share(found["predicted"]),
                    "error": share(found["wrong"]),
                    "busiest expert, clean": mean(found["load"][:, layer, busiest[0]]),
                    "busiest expert, attacked": mean(found["load_adv"][:, layer, busiest[1]]),
                }
                for place, width in enumerate(WIDTHS):
                    row[f"P(gap <= {width:g})"] = mean(found["near"][:, layer, place])
                rows.append(row)
    if not rows:
        raise ValueError("routing needs a model with experts")
    words = ["Busiest expert: share of decisions in which it takes part; even use is k/E."]
    y = "routing change (1 - IoU)"
    return StudyResult("Routing under attack", rows, "eps (1/255)", y, "line", words)


def ranks_apart(scores: Tensor, k: int) -> Tensor:
    """Swap the scores of ranks 1..k with those of ranks k+1..2k in each decision."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1])
    rank[: 2 * k] = torch.cat([rank[k : 2 * k], rank[:k]])
    return torch.empty_like(scores).scatter(-1, order, ordered[..., rank])


def shuffled(scores: Tensor, seed: int) -> Tensor:
    """Permute the scores of each decision at random: the gates stay, the experts change."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(scores.shape, generator=generator).argsort(-1).to(scores.device)
    return scores.gather(-1, order)


Variant = Callable[[Network, Tensor, Tensor], Tensor]
"""From a model, the images judged and their clean or attacked counterparts to logits."""


def variants(model: Network, settings: StudySettings) -> dict[str, Variant]:
    """List the replacements that a model allows; each keeps the values of the gates."""
    k, experts = chosen_per_decision(model), model.num_experts
    found: dict[str, Variant] = {
        "deployed": lambda m, x, _: m(x).logits,
        "route of the counterpart": lambda m, x, other: m.held(x, m.routing_scores(other)),
        "routes of other images": lambda m, x, _: m.held(x, m.routing_scores(x).roll(1, 0)),
    }
    if not is_soft(model):
        if 2 * k <= experts:
            found[f"ranks {k + 1}..{2 * k}"] = lambda m, x, _: m.held(
                x, ranks_apart(m.routing_scores(x), k)
            )
        found["random experts"] = lambda m, x, _: m.held(
            x, shuffled(m.routing_scores(x), settings.seed)
        )
    for expert in range(experts):

        def alone(m: Network, x: Tensor, _: Tensor, e: int = expert) -> Tensor:
            return m.along(x, torch.full_like(m(x).route, e))

        found[f"expert {expert} alone"] = alone
    return found


def replace_experts(subjects: Sequence[Subject], settings: StudySettings) -> StudyResult:
    """Judge models whose chosen experts are replaced, on clean and on attacked images.

    The protocol of the paper's table is not public: this is a reproduction of its idea. The route
    of the counterpart is the clean one on attacked images, and the attacked one on clean images.
    """
    rows: list[Row] = []
    eps = max(settings.eps)
    for subject in subjects:
        if (model := subject.model).num_experts == 1:
            continue
        own = variants(model, settings)

        def work(
            x_BCHW: Tensor,
            y_B: Tensor,
            _: Tensor,
            m: Network = model,
            tried: dict[str, Variant] = own,
        ) -> dict[str, Tensor]:
            x_adv = small_steps(m, x_BCHW, y_B, eps / 255, settings)
            found = {}
            with torch.no_grad():
                for name, logits in tried.items():
                    found[f"clean {name}"] = logits(m, x_BCHW, x_adv).argmax(1) == y_B
                    found[f"adv {name}"] = logits(m, x_adv, x_BCHW).argmax(1) == y_B
            return found

        hits = subject.over(work)
        rows += [
            {
                "model": subject.name,
                "experts": name,
                "eps (1/255)": eps,
                "accuracy, clean": share(hits[f"clean {name}"]),
                "accuracy, attacked": share(hits[f"adv {name}"]),
            }
            for name in own
        ]
    if not rows:
        raise ValueError("replace needs a model with experts")
    words = ["Images were attacked on the deployed model, and are the same in all rows."]
    title = "Experts replaced"
    return StudyResult(title, rows, "experts", "accuracy, attacked", "model", words)
