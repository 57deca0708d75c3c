"""Judging a model on images: every measure, per image, then as shares with intervals.

Shapes: N images of a split, B of a batch, E experts, L self-routing layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe.diagnostics import entropy, flip_rate, load
from moe.folding import fold
from moe.network import Network
from pipeline.data.loading import Images, to_float
from pipeline.measures import END_OF_RUN, MEASURES, ROUTED
from pipeline.measures.attacked import Measure
from pipeline.measures.interval import wilson
from pipeline.measures.settings import Evaluation
from pipeline.seeding import ImageNoise

BATCH = 256
NAMES = {"ra_pgd": "ra_pgd{}", "ra_pgd_margin": "ra_pgd{}_margin"}


@dataclass(frozen=True)
class Verdicts:
    """What became of each image.

    Attributes:
        correct: By measure, bool (N,).
        route, route_attacked: Experts chosen for the clean images, and for those of the white-box
            attack, int64 (N,) or (N, L).
    """

    correct: Mapping[str, Tensor]
    route: Tensor
    route_attacked: Tensor


def suite(evaluation: Evaluation, *, dense: bool) -> dict[str, Measure]:
    """Make the measures of the end of a run, by the name of their metric."""
    attack = evaluation.attack(evaluation.steps)
    return {
        NAMES.get(name, name).format(evaluation.steps): MEASURES[name](attack=attack)
        for name in END_OF_RUN
        if not (dense and name in ROUTED)
    }


def judge(
    model: Network,
    images: Images,
    measures: Mapping[str, Measure],
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], None] = lambda _: None,
    tell: Callable[[int, int], None] = lambda _done, _all: None,
) -> Verdicts:
    """Attack every image under every measure, this worker's share of them, and join the shares.

    The random starts follow from ``seed`` and the image's position in the split: the outcome is
    the same for any batch size and number of workers.

    Args:
        measures: By name; the first that attacks tells how the routes change.
        total: Sums a tensor over the workers, in place.
        tell: Called with the images done and to do, on this worker.
    """
    frozen, n = fold(model), len(images)
    mine_N = torch.arange(rank, n, world)
    shape = (n, frozen.num_layers) if frozen.num_layers else (n,)
    correct = {name: torch.zeros(n, dtype=torch.int64) for name in measures}
    routes = [torch.zeros(shape, dtype=torch.int64) for _ in range(2)]
    for done in range(0, len(mine_N), BATCH):
        rows_B = mine_N[done : done + BATCH]
        x_BCHW = to_float(images.pixels_NCHW[rows_B].to(device))
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        y_B, attacked_yet = images.labels_N[rows_B].to(device), False
        with torch.no_grad():
            routes[0][rows_B] = frozen(x_BCHW).route.cpu()
        for name, measure in measures.items():
            outcome = measure(frozen, x_BCHW, y_B, ImageNoise(seed, rows_B))
            correct[name][rows_B] = outcome.correct_B.long().cpu()
            if name != "sa" and not attacked_yet:
                attacked_yet = True
                with torch.no_grad():
                    routes[1][rows_B] = frozen(outcome.x_adv).route.cpu()
        tell(min(done + BATCH, len(mine_N)), len(mine_N))
    for tensor in (*correct.values(), *routes):
        total(tensor)
    return Verdicts({name: hits.bool() for name, hits in correct.items()}, routes[0], routes[1])


def summarize(verdicts: Verdicts, num_experts: int, split: str) -> dict[str, float]:
    """Turn verdicts into metrics: shares with 95% Wilson intervals, load and route changes.

    ``ra_worst`` counts the images that stand against every attack.
    """
    correct = dict(verdicts.correct)
    attacked = [hits for name, hits in correct.items() if name != "sa"]
    if attacked:
        correct["ra_worst"] = torch.stack(attacked).all(0)
    metrics: dict[str, float] = {}
    for name, hits_N in correct.items():
        hits, n = int(hits_N.sum()), len(hits_N)
        low, high = wilson(hits, n)
        metrics |= {f"{split}/{name}": hits / n}
        metrics |= {f"{split}/{name}_low": low, f"{split}/{name}_high": high}
    if num_experts > 1:
        load_E = load(verdicts.route, num_experts)
        metrics["route/entropy"] = float(entropy(load_E))
        if attacked:
            metrics["route/flip_rate"] = float(flip_rate(verdicts.route, verdicts.route_attacked))
        for expert, share in enumerate(load_E.tolist()):
            metrics[f"route/load_{expert}"] = share
    return metrics


def over_eps(
    model: Network,
    images: Images,
    evaluation: Evaluation,
    *,
    seed: int,
    device: torch.device,
    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0),
) -> list[tuple[float, int, int]]:
    """Count the images that stand against the validation attack at several radii.

    Steps scale with the radius. Returns (eps, images that stand, images).
    """
    points = []
    for factor in factors:
        threat = replace(
            evaluation,
            eps=factor * evaluation.eps,
            step_size=factor * evaluation.step_size,
        )
        attack = threat.attack(evaluation.validation_steps)
        measure = MEASURES["ra_pgd" if factor else "sa"](attack=attack)
        verdicts = judge(model, images, {"ra": measure}, seed=seed, device=device)
        points.append((threat.eps, int(verdicts.correct["ra"].sum()), len(images)))
    return points
