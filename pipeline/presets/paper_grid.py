"""Cells of the paper's comparison: a backbone, a dataset and a row of its tables make a run.

The grid is {ResNet-18, WRN-28-10, VGG-16, DenseNet} x {CIFAR-10, CIFAR-100, Tiny-ImageNet,
ImageNet}, AdvMoE and four baselines (Zhang et al., ICCV 2023, arXiv:2308.10110), and RT-ER on
the same mixtures. A name that no registry holds is not offered.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from moe.backbones import BACKBONES, Backbone, dense_twin
from moe.cost import Cost, cost
from pipeline.algorithms import ALGORITHMS
from pipeline.config import Config
from pipeline.config.overrides import flatten, override
from pipeline.data import DATASETS
from pipeline.nearest_names import unknown


@dataclass(frozen=True)
class Row:
    """A row of the tables: an algorithm and the form of the net that it trains.

    Attributes:
        title: What the paper calls it.
        algorithm: Its name in ``ALGORITHMS``.
        narrow: Whether widths are scaled by ``ratio``; else the net has its full width.
        mixture: Whether there are experts and a router.
        words: What it is.
        paper: Where it is from.
        color, marker: Of its points in plots, as matplotlib writes them; an empty color is the
            next one of a cycle.
        passes: Forward passes F of an update, per attack step and besides, with F for a gradient
            of the image and 2 F for one of the weights: an attack step costs 2 F, the clean output
            F, and the loss on two images 6 F.
        same_cost: Whether a narrow net's ratio is the one that costs as much as the mixture.
    """

    title: str
    algorithm: str
    narrow: bool
    mixture: bool
    words: str
    paper: str = "arXiv:2308.10110"
    color: str = ""
    marker: str = "P"
    passes: tuple[int, int] = (2, 7)
    same_cost: bool = False


ROWS: dict[str, Row] = {
    "dense": Row(
        *("AT (Dense)", "trades", False, False, "the net at its full width"),
        color="C7",
        marker="s",
    ),
    "s_dense": Row(
        *("AT (S-Dense)", "trades", True, False, "every width scaled by the ratio"),
        color="C0",
        marker="v",
    ),
    "iso_dense": Row(
        *("AT (Iso-Dense)", "trades", True, False, "a width that costs what the mixture costs"),
        color="C9",
        marker="<",
        same_cost=True,
    ),
    "sparse": Row(
        *("AT (Sparse)", "sparse", True, False, "channels pruned under the robust loss"),
        color="C2",
        marker="^",
    ),
    "moe_at": Row(
        *("AT (MoE)", "moe_at", True, True, "router and experts stepped together"),
        color="C1",
        marker="D",
    ),
    "adv_moe": Row(
        *("AdvMoE", "adv_moe", True, True, "router and experts stepped in turn"),
        color="C3",
        marker="o",
        passes=(4, 14),  # both phases
    ),
    "upcycled_adv_moe": Row(
        *("AdvMoE, upcycled", "upcycled_adv_moe", True, True, "experts start as one dense pathway"),
        color="C6",
        marker="*",
        passes=(4, 14),  # of the mixture's stage; the pathway's has those of a dense net
    ),
    "rt_er_layers": Row(
        *("RT-ER", "rt_er", True, True, "the second-ranked pathway made robust too"),
        paper="arXiv:2502.06832",
        color="C4",
        marker="X",
        passes=(4, 9),  # two attacks, and the loss on three images
    ),
}
"""Rows of the tables by name. A new one is a line here: report, grid, sweep and tune follow."""
CLAIMS = {
    "arXiv:2308.10110": "The paper claims 1 to 4 points more robust accuracy than the dense net at "
    "less than half its cost over this grid; its tables could not be had.",
    "arXiv:2502.06832": "The paper has whole networks as experts, longer attacks and other data, "
    "so none of its numbers belongs here.",
}
PAPER: dict[str, dict[str, str]] = {
    "backbone": {
        "resnet18": "ResNet-18",
        "wrn28_10": "WRN-28-10",
        "vgg16": "VGG-16",
        "densenet": "DenseNet",
    },
    "dataset": {
        "cifar10": "CIFAR-10",
        "cifar100": "CIFAR-100",
        "tiny_imagenet": "Tiny-ImageNet",
        "imagenet": "ImageNet",
    },
}
RADII = {"tiny_imagenet": 4.0, "imagenet": 4.0, "digits": 25.5}
"""L-infinity radius in 255ths; 8 elsewhere. Larger images get the 4 of public ImageNet boards."""
RECIPES: dict[str, dict[str, Any]] = {
    "imagenet": {"epochs": 90, "batch_size": 256},  # ours: the usual length of a run there
    "digits": {"epochs": 12, "batch_size": 64, "lr": 0.05},  # ours
}
"""What differs from ``Config``'s defaults, which are the released code's settings for CIFAR."""
SHORT: dict[str, Any] = {  # ours: what serves the small net in the time of a laptop
    "dataset.validation": 0.05,
    "dataset.pad": 2,
    "algorithm.aim": "ce",
    "algorithm.beta": 9.0,
    "algorithm.router_loss": "pseudo_label",
    "epochs": 14,
    "precision": "bf16",
    "lr": 0.15,
    "router_lr": 0.02,
    "schedule": "cyclic",
    "router_schedule": "cyclic",
}


OF_BACKBONE: dict[str, dict[str, Any]] = {
    "small": SHORT,
    "vit": {  # ours: what trains a transformer from nothing
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "warmup_epochs": 1.0,
        "clip_norm": 1.0,
    },
}


def cell(
    backbone: str,
    dataset: str,
    algorithm: str,
    *,
    ratio: float = 0.5,
    num_experts: int = 2,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Make the run of a cell; every row of it faces the same attack, in training and after.

    Training: two steps of 5/8 of the radius from a gaussian start (the released code: 5/255 at
    8/255). Evaluation: 50 steps of a quarter of the radius.

    Args:
        algorithm: A key of ``ROWS``; ``backbone`` and ``dataset`` are keys of their registries.
        ratio: Width of an expert, or of a narrow net, over the full width; ``dense`` ignores it.
        num_experts: Experts of the mixtures; the other rows ignore it.
        changes: Further settings by key; those that the run does not have are left out.

    Raises:
        ValueError: There is no such backbone, dataset or algorithm, the backbone has no such form,
            or a number is out of range.
    """
    for key, name, known in (
        ("backbone", backbone, BACKBONES),
        ("dataset", dataset, DATASETS),
        ("algorithm", algorithm, offered_rows()),
    ):
        if name not in known:
            raise unknown(key, name, known)
    row, radius = ROWS[algorithm], RADII.get(dataset, 8.0)
    net = form_of(backbone, num_experts if row.mixture else 1, ratio if row.narrow else 1.0)
    config = Config(
        name=f"{algorithm}_{dataset}_{backbone}",
        dataset=DATASETS[dataset](),
        backbone=net,
        algorithm=ALGORITHMS[row.algorithm](),
    )
    settings: dict[str, Any] = {
        "algorithm.attack.eps": radius / 255,
        "algorithm.attack.step_size": 5 * radius / 8 / 255,
        "algorithm.attack.steps": 2,
        "algorithm.attack.start": "gaussian",
        "evaluation.eps": radius / 255,
        "evaluation.step_size": radius / 4 / 255,
    }
    settings |= RECIPES.get(dataset, {}) | OF_BACKBONE.get(backbone, {})
    config = override(config, held(config, settings | dict(changes)))
    return at_same_cost(config, ratio, num_experts) if row.same_cost else config


def form_of(name: str, num_experts: int, ratio: float) -> Backbone:
    """Make a backbone of a width and a number of experts.

    Raises:
        ValueError: It has no such form: a net without mixture layers, or one of several networks.
    """
    wanted = {"num_experts": num_experts, "ratio": ratio}
    kind: Any = BACKBONES[name]
    try:
        net: Backbone = kind(**{f.name: wanted[f.name] for f in fields(kind) if f.name in wanted})
    except ValueError as error:
        raise ValueError(f"backbone.{error}") from None
    for key, value in wanted.items():
        if (own := getattr(net, key)) != value:
            raise ValueError(f"backbone={name} has {key} {own}, and no form with {value}")
    return net


def at_same_cost(config: Config, ratio: float, num_experts: int) -> Config:
    """Give a dense net the ratio at which it costs most nearly what the mixture costs.

    S-Dense, a net of the mixture's ratio, is 12% (``small``) to 28% (ResNet-18) cheaper than the
    mixture, which has a router and a wider stem; this is the fair control. Widths are whole
    channels, so the cost moves in steps (of
    DenseNet's growth rate up to 15%). By bisection: it grows with the ratio.

    Args:
        config: A dense run; its backbone's other settings are the mixture's too.
        ratio: Of the mixture, ``num_experts`` its experts.
    """
    classes, size, net = config.dataset.num_classes, config.dataset.image_size, config.backbone
    mixture = replace(net, num_experts=num_experts, ratio=ratio)  # type: ignore[type-var]
    target = _gmac(mixture, classes, size)

    def distance(value: float) -> float:
        return _gmac(replace(net, ratio=value), classes, size) - target  # type: ignore[type-var]

    low, high = ratio / 2, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(middle) < 0 else (low, middle)
    best = min((low, high), key=lambda value: abs(distance(value)))
    return replace(config, backbone=replace(net, ratio=round(best, 6)))  # type: ignore[type-var]


def held(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the settings whose keys this config has: a dense net has no ``router_loss``."""
    known = flatten(config)
    return {key: value for key, value in settings.items() if key in known}


def offered_rows() -> tuple[str, ...]:
    """Name the rows whose algorithm is there."""
    return tuple(name for name, row in ROWS.items() if row.algorithm in ALGORITHMS)


def offered(axis: str) -> tuple[str, ...]:
    """Name the paper's backbones or datasets that are there."""
    known = list(BACKBONES) if axis == "backbone" else list(DATASETS)
    return tuple(name for name in PAPER[axis] if name in known)


def costs(config: Config) -> tuple[Cost, Cost]:
    """Count the multiply-accumulates of a run's net, and of its dense twin, on one image."""
    size, classes = config.dataset.image_size, config.dataset.num_classes
    backbone: Any = config.backbone
    return _count(backbone, classes, size), _count(dense_twin(backbone), classes, size)


@cache
def _count(backbone: Any, classes: int, size: int) -> Cost:
    return cost(backbone.build(classes, size), size)


@cache
def _gmac(backbone: Any, classes: int, size: int) -> float:
    with torch.device("meta"):  # counted without memory or arithmetic
        return cost(backbone.build(classes, size), size).gmac


@dataclass(frozen=True)
class Cell:
    """A preset of the grid: calling it makes the run, ``label`` says what it is."""

    backbone: str
    dataset: str
    algorithm: str

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return f"{self.algorithm}_{self.dataset}_{self.backbone}"

    def __call__(self) -> Config:
        return cell(self.backbone, self.dataset, self.algorithm)

    @property
    def headline(self) -> str:
        """Say in one line what it is."""
        row = ROWS[self.algorithm]
        net, images = PAPER["backbone"][self.backbone], PAPER["dataset"][self.dataset]
        return f"{row.title} on {images} with {net}: {row.words} ({row.paper})."

    def label(self) -> str:
        """Write the lab label: paper, command, settings, and the cost, which is counted now."""
        config, row = self(), ROWS[self.algorithm]
        parts = (
            f"``python -m pipeline.train {self.name}``.",
            _settings(config),
            _expense(config, row),
            f"{CLAIMS.get(row.paper, '')} Not run to the end by us.".strip(),
        )
        return f"{self.headline}\n\n" + textwrap.fill(" ".join(parts), 96)


def cells() -> tuple[Cell, ...]:
    """List the cells of the paper's grid that can be had."""
    return tuple(
        Cell(backbone, dataset, algorithm)
        for algorithm in offered_rows()
        for dataset in offered("dataset")
        for backbone in offered("backbone")
    )


def _settings(config: Config) -> str:
    attack, threat = config.algorithm.attack, config.evaluation  # type: ignore[attr-defined]
    return (
        f"Trains against {attack.steps} steps of {255 * attack.step_size:.3g}/255 within "
        f"{255 * attack.eps:.3g}/255 (L-inf); judged by PGD-{threat.steps} of "
        f"{255 * threat.step_size:.3g}/255 within {255 * threat.eps:.3g}/255. SGD {config.lr:g}, "
        f"{config.schedule}, {config.epochs} epochs, batch {config.batch_size}"
        f"{f', crops padded by {pad}' if (pad := config.dataset.pad) else ''}."
    )


def _expense(config: Config, row: Row) -> str:
    """Say what one image costs, and what it costs to train on it once.

    A pruned net trains at its full width first.
    """
    own, dense = costs(config)
    router = f", {own.gmac_router:.3g} of them the router's" if own.gmac_router else ""
    text = (
        f"One image costs {own.gmac:.4g} GMAC{router}, {own.gmac / dense.gmac:.3f} of the dense "
        f"net's; {own.params / 1e6:.3g} M parameters. Training:"
    )
    per_step, besides = row.passes
    passes = per_step * config.algorithm.attack.steps + besides  # type: ignore[attr-defined]
    if row.algorithm == "sparse":
        top = f"{passes * dense.gmac:.3g} GMAC per image and epoch until the channels are cut"
        return f"{text} {top}, {passes * own.gmac:.3g} after."
    return f"{text} about {passes * own.gmac:.3g} GMAC per image and epoch."
