"""Judging a model on images: every measure, per image, then as shares with intervals.

Shapes: N images of a split, B of a batch, E experts, L self-routing layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from moe.routing_stats import entropy, flip_rate, load
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.measures import END_OF_RUN
from pipeline.measures.base import HEARTBEAT, Measure
from pipeline.measures.confidence import wilson
from pipeline.measures.outcomes import TYPES, Outcome, Store, counts, find, observe
from pipeline.measures.pixel_grid import judged_on_grid
from pipeline.measures.threat import Evaluation
from pipeline.measures.tiers import measures_of
from pipeline.seeding import ImageNoise

PULSE = 2.0  # seconds between two signs of progress from inside an attack
BATCH = 256  # images attacked at a time, and at most lost when an evaluation is killed


@dataclass(frozen=True)
class Effort:
    """What one attack cost: seconds, images attacked now, and outcomes that were known before."""

    seconds: float = 0.0
    attacked: int = 0
    reused: int = 0

    @property
    def pace(self) -> float:
        """Images attacked in a second."""
        return self.attacked / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Verdicts:
    """What became of each image.

    Attributes:
        correct: By measure, bool (N,).
        route, route_attacked: Experts chosen for the clean images, and for those of the white-box
            attack, int64 (N,) or (N, L).
        outcomes: By measure, all that is known of each image.
        efforts: By measure, of this worker.
    """

    correct: Mapping[str, Tensor]
    route: Tensor
    route_attacked: Tensor
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    efforts: Mapping[str, Effort] = field(default_factory=dict)

    @property
    def whole(self) -> dict[str, Tensor]:
        """The measures that are what their name says: all but those a cascade cut short."""
        clean_N = self.correct.get("sa")
        return {
            name: hits
            for name, hits in self.correct.items()
            if name not in self.outcomes
            or bool(self.outcomes[name].seen_N.all())
            or (clean_N is not None and bool((self.outcomes[name].seen_N | ~clean_N).all()))
        }

    @property
    def worst(self) -> Tensor | None:
        """The images that stand against every attack; None if there was none."""
        attacked = [hits for name, hits in self.correct.items() if counts(name)]
        if not attacked:
            return None
        clean = [self.correct["sa"]] if "sa" in self.correct else []
        return torch.stack([*clean, *attacked]).all(0)

    @property
    def pace(self) -> dict[str, float]:
        """Seconds and images/s of the attacks that were made now, as metrics."""
        made = {name: effort for name, effort in self.efforts.items() if effort.attacked}
        seconds = {f"time/{name}": effort.seconds for name, effort in made.items()}
        return seconds | {f"pace/{name}": effort.pace for name, effort in made.items()}


def suite(evaluation: Evaluation, *, dense: bool) -> dict[str, Measure]:
    """Make the measures of the end of a run, by the name of their metric."""
    return measures_of(END_OF_RUN, evaluation, num_experts=1 if dense else 2)


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
    tell: Callable[[int, int, str], None] = lambda _done, _all, _name: None,
    ended: Callable[[str, Effort], None] = lambda _name, _effort: None,
    ids_N: Tensor | None = None,
    store: Store | None = None,
    cascade: bool = False,
    batch: int | None = None,
) -> Verdicts:
    """Attack every image under every measure, this worker's share of them, and join the shares.

    The random starts follow from ``seed`` and the image's number: the outcome is the same for any
    batch size, number of workers, and whatever was attacked before.

    Args:
        measures: By name; the first that attacks tells how the routes change.
        total: Sums a tensor over the workers, in place.
        tell: Called with the attacks on an image done and to do, on this worker, and the name of
            the one that is on.
        ended: Called with each attack's name and cost, on this worker, when it is over.
        ids_N: Numbers of the images in the whole split; None: their positions.
        store: Where outcomes are looked up first, and kept batch by batch.
        cascade: Attack only images that stand against the measures before. The worst case comes
            out the same for less; the measures after the first attack then have no number of
            their own.
        batch: Images attacked at a time; None: ``BATCH``.
    """
    frozen, n = fold(model), len(images)
    numbers_N = torch.arange(n) if ids_N is None else ids_N
    task = _Task(frozen, images, numbers_N, seed, device, store, batch or BATCH)
    mine_M, layers = torch.arange(rank, n, world), max(1, frozen.num_layers)
    standing_N = torch.ones(n, dtype=torch.bool)
    outcomes, efforts = {}, {}
    for turn, (name, measure) in enumerate(measures.items()):
        rows = mine_M[standing_N[mine_M]] if cascade else mine_M
        outcomes[name] = Outcome.blank(n, layers)
        past = turn * len(mine_M) + len(mine_M) - len(rows)

        def advance(done: int, past: int = past, name: str = name) -> None:
            tell(past + done, len(measures) * len(mine_M), name)

        efforts[name] = task.attack(measure, rows, outcomes[name], advance, counts(name))
        ended(name, efforts[name])
        if counts(name) or name == "sa":
            standing_N[rows] &= outcomes[name].correct_N[rows]
    route = task.clean_route(mine_M, outcomes.get("sa"))
    for outcome in outcomes.values():
        outcome.add(total)
    total(route)
    attacked = torch.zeros_like(route)
    if aimed := next((outcomes[name] for name in measures if counts(name)), None):
        attacked = torch.where(aimed.seen_N[:, None], aimed.route_NL, route)
    if not frozen.num_layers:
        route, attacked = route.squeeze(1), attacked.squeeze(1)
    correct = {name: outcome.correct_N for name, outcome in outcomes.items()}
    return Verdicts(correct, route, attacked, outcomes, efforts)


def join(parts: Sequence[Verdicts]) -> Verdicts:
    """Put the shares of several workers together, as ``total`` does where they can talk."""
    first = parts[0]
    correct = {name: torch.stack([p.correct[name] for p in parts]).any(0) for name in first.correct}
    outcomes, efforts = {}, {}
    for name in first.outcomes:
        columns = [part.outcomes[name].columns for part in parts]
        whole = {k: sum((c[k].double() for c in columns), torch.tensor(0.0)) for k in columns[0]}
        outcomes[name] = Outcome(**{k: column.to(TYPES[k]) for k, column in whole.items()})
        own = [part.efforts[name] for part in parts]
        efforts[name] = Effort(
            max(effort.seconds for effort in own),
            sum(effort.attacked for effort in own),
            sum(effort.reused for effort in own),
        )
    routes = [torch.stack([p.route for p in parts]), torch.stack([p.route_attacked for p in parts])]
    return Verdicts(correct, routes[0].sum(0), routes[1].sum(0), outcomes, efforts)


@contextmanager
def beating(advance: Callable[[], None]) -> Iterator[None]:
    """Call this from inside an attack, every ``PULSE`` seconds at most."""
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > PULSE:
            last = time.monotonic()
            advance()

    token = HEARTBEAT.set(beat)
    try:
        yield
    finally:
        HEARTBEAT.reset(token)


@dataclass(frozen=True)
class _Task:
    """Images to attack, and how: what all measures of one judgement share."""

    model: Network
    images: Images
    ids_N: Tensor
    seed: int
    device: torch.device
    store: Store | None
    size: int

    def attack(
        self,
        measure: Measure,
        rows: Tensor,
        outcome: Outcome,
        advance: Callable[[int], None],
        counted: bool,
    ) -> Effort:
        """Fill in the outcome of some images: from the store where it is known, else by attack.

        Attacks that count into the worst case are judged on 8-bit pixels as well.
        """
        began, reused = time.monotonic(), 0
        if self.store is not None:
            known, columns = self.store.read(measure)
            at, kept = find(known, self.ids_N[rows])
            if len(at):
                outcome.put(rows[at], {key: column[kept] for key, column in columns.items()})
                reused = len(at)
        todo = rows[~outcome.seen_N[rows]]
        advance(reused)
        for low in range(0, len(todo), self.size):
            rows_B = todo[low : low + self.size]
            ids_B, (x_BCHW, y_B) = self.ids_N[rows_B], self.batch(rows_B)
            with beating(lambda done=reused + low: advance(done)):  # type: ignore[misc]
                found = measure(self.model, x_BCHW, y_B, ImageNoise(self.seed, ids_B))
            if counted:
                found = judged_on_grid(measure.attack, self.model, found, x_BCHW, y_B)
            columns = {k: v.cpu() for k, v in observe(self.model, x_BCHW, found).items()}
            outcome.put(rows_B, columns)
            if self.store is not None:
                self.store.write(measure, ids_B, columns)
            advance(reused + low + len(rows_B))
        return Effort(time.monotonic() - began, len(todo), reused)

    def batch(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels in [0, 1] and labels, where the model is."""
        x_BCHW = to_float(self.images.pixels_NCHW[rows_B].to(self.device))
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        return x_BCHW, self.images.labels_N[rows_B].to(self.device)

    def clean_route(self, rows: Tensor, clean: Outcome | None) -> Tensor:
        """Experts of the clean images (N, L), zero for those of other workers."""
        if clean is not None:
            return clean.route_NL.clone()
        route_NL = torch.zeros(len(self.images), max(1, self.model.num_layers), dtype=torch.int64)
        for low in range(0, len(rows), self.size):
            rows_B = rows[low : low + self.size]
            with torch.no_grad():
                route = self.model(self.batch(rows_B)[0]).route
            route_NL[rows_B] = route.reshape(len(rows_B), -1).cpu()
        return route_NL


def summarize(verdicts: Verdicts, num_experts: int, split: str) -> dict[str, float]:
    """Turn verdicts into metrics: shares with 95% Wilson intervals, load and route changes.

    ``ra_worst`` counts the images that stand against every attack that ``counts``.
    """
    correct, worst_N = verdicts.whole, verdicts.worst
    if worst_N is not None:
        correct["ra_worst"] = worst_N
    metrics: dict[str, float] = {}
    for name, hits_N in correct.items():
        hits, n = int(hits_N.sum()), len(hits_N)
        low, high = wilson(hits, n)
        metrics |= {f"{split}/{name}": hits / n}
        metrics |= {f"{split}/{name}_low": low, f"{split}/{name}_high": high}
    if num_experts > 1:
        load_E = load(verdicts.route, num_experts)
        metrics["route/entropy"] = float(entropy(load_E))
        if worst_N is not None:
            metrics["route/flip_rate"] = float(flip_rate(verdicts.route, verdicts.route_attacked))
        for expert, share in enumerate(load_E.tolist()):
            metrics[f"route/load_{expert}"] = share
    return metrics
