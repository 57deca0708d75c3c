"""Certificates of one model on the images of a split: radii, what they are worth, and pictures.

Shapes: N images, CHW channels and sides.
"""

from __future__ import annotations

import copy
import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.certification.difference_constants import sampled_constant
from moe.certification.margin_floor import floor_radius
from moe.certification.radii import (
    Constants,
    MixtureOutputs,
    Status,
    constants,
    look,
    need_of_dual,
    statuses,
    theorem_radius,
    theorem_radius_per_class,
)
from moe.certification.route_radius import route_radius
from moe.certification.smoothing import ABSTAIN, Smoothing
from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.evaluation.plots import new_axes
from pipeline.measures.confidence import wilson
from pipeline.seeding import generator_at

BATCH = 64
ROUTE_HOLDS = "route holds"
KINDS = ("theorem", "per_class", "floor", "route", "smoothing")
DETERMINISTIC = ("theorem", "per_class", "floor", "route")
EPS = {  # radii of the table, in pixel units
    "linf": tuple(n / 255 for n in (0, 0.5, 1, 2, 4, 8, 16, 25.5)),
    "l2": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5),
}


@dataclass(frozen=True)
class CertificateResult:
    """One kind of certificate on N images.

    Attributes:
        norm: Of the radii, ``linf`` or ``l2``.
        radius_N: 0 where nothing is certified.
        status_N: What each is worth.
    """

    norm: str
    radius_N: Tensor
    status_N: Sequence[str]

    def stands(self, eps: float) -> int:
        """Count the images that are certified, and right, at this radius."""
        right_N = torch.tensor([mark != Status.WRONG for mark in self.status_N])
        reached_N = self.radius_N > eps if eps else torch.ones_like(right_N)
        return int((right_N & reached_N).sum())

    @property
    def curve(self) -> list[tuple[float, int, int]]:
        """(eps, images that stand, images); at 0 those that are right."""
        return [(eps, self.stands(eps), len(self.radius_N)) for eps in EPS[self.norm]]


def prove(
    model: Network, images: Images, kinds: Sequence[str]
) -> tuple[Constants, dict[str, CertificateResult]]:
    """Certify by constants that hold for all images, in float64.

    Of a dual model the robust half is certified, with the margin that it needs.

    Raises:
        NoBoundError: The network does what has no bound.
        ValueError: A dual model mixes logits, or gives the robust half too little weight.
    """
    model = copy.deepcopy(model).double().eval()
    part, need = (model.robust, dual_need(model)) if hasattr(model, "robust") else (model, 0.0)
    assert isinstance(part, Network)
    x_1CHW = to_float(images.pixels_NCHW[:1]).double()
    proven = constants(part, x_1CHW)
    rows: dict[str, list[Tensor]] = {kind: [] for kind in (*kinds, "route", "right")}
    for start in range(0, len(images), BATCH):
        x_BCHW = to_float(images.pixels_NCHW[start : start + BATCH]).double()
        y_B = images.labels_N[start : start + BATCH]
        seen = look(part, x_BCHW, proven.top_k)
        rows["route"].append(route_radius(seen, proven, x_BCHW))
        with torch.no_grad():
            rows["right"].append(model(x_BCHW).logits.argmax(1) == y_B)
        for kind in kinds:
            if kind != "route":
                rows[kind].append(radius_of(kind, seen, proven, y_B, need))
    route_N, right_N = torch.cat(rows["route"]), torch.cat(rows["right"])
    found = {}
    for kind in kinds:
        radius_N = route_N if kind == "route" else torch.cat(rows[kind]).minimum(route_N)
        radius_N = torch.where(right_N, radius_N, 0.0)
        marks: list[str] = [str(mark) for mark in statuses(radius_N, route_N, right_N)]
        if kind == "route":  # of the experts that take part, not of the answer
            marks = [ROUTE_HOLDS if mark == Status.CERTIFIED else mark for mark in marks]
        found[kind] = CertificateResult("linf", radius_N, marks)
    return proven, found


def radius_of(
    kind: str, seen: MixtureOutputs, proven: Constants, y_B: Tensor, need: float
) -> Tensor:
    """Compute one kind of radius, route aside."""
    if kind == "floor":
        return floor_radius(seen, proven, y_B, need=need)
    if proven.mix == "logits" and proven.top_k > 1:
        raise ValueError(f"kind={kind} is of mixed probabilities; this mixture takes kind=floor")
    if kind == "theorem":
        return theorem_radius(seen, proven, y_B, need=need)
    if need:
        raise ValueError("kind=per_class is of a single model; a dual one takes kind=theorem")
    return theorem_radius_per_class(seen, proven, y_B)


def dual_need(model: Network) -> float:
    """Read the margin that the robust half of a dual model needs.

    Raises:
        ValueError: It mixes logits, or alpha leaves no margin that would do.
    """
    alpha, mix = float(getattr(model, "alpha")), getattr(model, "mix")  # noqa: B009
    if mix != "probabilities":
        raise ValueError(f"a dual model is certified with mix=probabilities, got {mix}")
    if not 0.5 < alpha <= 1:
        raise ValueError(f"alpha must be above 0.5 for a certificate of a dual model, got {alpha}")
    return need_of_dual(alpha)


def smooth(
    model: Network,
    images: Images,
    smoothing: Smoothing,
    *,
    seed: int,
    device: torch.device,
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> CertificateResult:
    """Certify the smoothed classifier; each image's noise follows from the seed and its place."""
    frozen = fold(model.to(device))
    radii, marks = [], []
    for place, (pixels_CHW, label) in enumerate(
        zip(images.pixels_NCHW, images.labels_N.tolist(), strict=True)
    ):
        x_CHW = to_float(pixels_CHW).to(device)
        noise = generator_at("cpu", seed, "smoothing", place)
        answer, radius = smoothing.certify(lambda x: frozen(x).logits.argmax(1), x_CHW, noise)
        right = answer == label
        radii.append(radius if right else 0.0)
        kept = Status.CERTIFIED if right else Status.WRONG
        marks.append("abstains" if answer == ABSTAIN else kept)
        tell(place + 1, len(images))
    return CertificateResult("l2", torch.tensor(radii, dtype=torch.float64), marks)


def sampled(model: Network, images: Images, proven: Constants) -> float:
    """Search for the largest slope of a logit difference nearby: what a constant cannot be below.

    Of the first expert, the first eight images and the pair of classes with the largest constant.
    """
    part = copy.deepcopy(getattr(model, "robust", model)).double().eval()
    x_BCHW = to_float(images.pixels_NCHW[:8]).double()
    classes = proven.logits_EKK.shape[1]
    one, other = divmod(int(proven.logits_EKK[0].argmax()), classes)

    def difference(x: Tensor) -> Tensor:
        z_BK = part.along(x, torch.zeros(len(x), dtype=torch.int64))
        return z_BK[:, one] - z_BK[:, other]

    slopes_B = sampled_constant(difference, x_BCHW, eps=4 / 255, generator=generator_at("cpu", 0))
    return float(slopes_B.amax())


def summary(found: Mapping[str, CertificateResult], eps: float) -> dict[str, float]:
    """Name the metrics: certified accuracy at the threat's eps, mean radius, share of statuses."""
    metrics: dict[str, float] = {}
    for kind, one in found.items():
        n = len(one.radius_N)
        hits = one.stands(eps)
        low, high = wilson(hits, n)
        name = f"certified/{kind}"
        metrics |= {name: hits / n, f"{name}_low": low, f"{name}_high": high}
        metrics[f"{name}_radius"] = float(one.radius_N.clamp(max=1).mean())
        for mark, count in Counter(map(str, one.status_N)).items():
            metrics[f"{name}_{mark.replace(' ', '_')}"] = count / n
    return metrics


def table(found: Mapping[str, CertificateResult]) -> list[tuple[str, ...]]:
    """Lay out certified accuracy over eps, with 95% intervals, one row a kind."""
    rows: list[tuple[str, ...]] = []
    for norm, unit, scale in (("linf", "L-inf, 1/255", 255), ("l2", "L2", 1)):
        own = {kind: one for kind, one in found.items() if one.norm == norm}
        if own:
            rows.append((f"eps ({unit})", *(f"{scale * eps:g}" for eps in EPS[norm])))
        for kind, one in own.items():
            cells = []
            for _, hits, n in one.curve:
                low, high = wilson(hits, n)
                cells.append(f"{100 * hits / n:.1f} ({100 * low:.1f}-{100 * high:.1f})")
            rows.append((ROUTE_HOLDS if kind == "route" else kind, *cells))
    width = max(map(len, rows))
    return [(*row, *[""] * (width - len(row))) for row in rows]


def write(found: Mapping[str, CertificateResult], images: Images, folder: Path) -> None:
    """Write ``certificates.csv``, a row per image and kind, and ``plots/certified_<norm>.png``."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    with (folder / "certificates.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "kind", "norm", "radius", "status"))
        for kind, one in found.items():
            columns = zip(
                images.labels_N.tolist(), one.radius_N.tolist(), one.status_N, strict=True
            )
            for place, (label, radius, mark) in enumerate(columns):
                writer.writerow((place, label, kind, one.norm, f"{radius:.6g}", str(mark)))
    for norm in EPS:
        own = {kind: one for kind, one in found.items() if one.norm == norm}
        if own:
            draw(own, norm, folder / "plots" / f"certified_{norm}.png")


def draw(found: Mapping[str, CertificateResult], norm: str, path: Path) -> None:
    """Draw certified accuracy over eps, every image a step, with 95% intervals."""
    n = len(next(iter(found.values())).radius_N)
    unit, scale = ("1/255", 255) if norm == "linf" else ("L2", 1)
    figure, axes = new_axes(f"Certified accuracy ({n} images)", f"eps ({unit})", "share of images")
    top = max(EPS[norm])
    for kind, one in found.items():
        steps = sorted({0.0, top, *one.radius_N.clamp(max=top).tolist()})
        hits = [one.stands(eps) for eps in steps]
        bands = [wilson(count, n) for count in hits]
        x = [scale * eps for eps in steps]
        if kind == "route":
            label = f"{ROUTE_HOLDS} (not certified)"
            axes.step(
                x, [count / n for count in hits], "--", where="post", color="grey", label=label
            )
            continue
        axes.step(x, [count / n for count in hits], where="post", label=kind)
        low, high = zip(*bands, strict=True)
        axes.fill_between(x, low, high, step="post", alpha=0.15)
    axes.set(ylim=(0, 1), xlim=(0, scale * top))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
