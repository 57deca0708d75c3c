"""Cells of the paper's comparison: a backbone, a dataset and a row of its tables make a run.

The grid is {ResNet-18, WRN-28-10, VGG-16, DenseNet} x {CIFAR-10, CIFAR-100, Tiny-ImageNet,
ImageNet}, AdvMoE beside four baselines (Zhang et al., ICCV 2023, arXiv:2308.10110), and RT-ER on
the same mixtures. A name that no registry holds is not offered.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from moe.backbones import BACKBONES, dense_twin
from moe.cost import Cost, cost
from pipeline.algorithms import ALGORITHMS
from pipeline.config import Config
from pipeline.config.overrides import flatten, override
from pipeline.data import DATASETS


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
    """

    title: str
    algorithm: str
    narrow: bool
    mixture: bool
    words: str
    paper: str = "arXiv:2308.10110"


ROWS: dict[str, Row] = {
    "dense": Row("AT (Dense)", "trades", False, False, "the net at its full width"),
    "s_dense": Row("AT (S-Dense)", "trades", True, False, "every width scaled by the ratio"),
    "sparse": Row("AT (Sparse)", "sparse", True, False, "channels pruned under the robust loss"),
    "moe_at": Row("AT (MoE)", "moe_at", True, True, "router and experts stepped together"),
    "adv_moe": Row("AdvMoE", "adv_moe", True, True, "router and experts stepped in turn"),
    "rt_er_layers": Row(
        "RT-ER",
        "rt_er",
        True,
        True,
        "the second-ranked pathway made robust too",
        "arXiv:2502.06832",
    ),
}
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
FORMED = tuple(name for name in BACKBONES if name not in ("vit", "dual"))
"""Backbones that every row has a form of: vit is dense alone, and dual is two networks."""
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


def cell(
    backbone: str, dataset: str, algorithm: str, *, ratio: float = 0.5, num_experts: int = 2
) -> Config:
    """Make the run of a cell; every row of it faces the same attack, in training and after.

    Training: two steps of 5/8 of the radius from a gaussian start (the released code: 5/255 at
    8/255). Evaluation: 50 steps of a quarter of the radius.

    Args:
        algorithm: A key of ``ROWS``; ``backbone`` and ``dataset`` are keys of their registries.
        ratio: Width of an expert, or of a narrow net, over the full width; ``dense`` ignores it.
        num_experts: Experts of the mixtures; the other rows ignore it.

    Raises:
        ValueError: There is no such backbone, dataset or algorithm, or a number is out of range.
    """
    for key, name, known in (
        ("backbone", backbone, FORMED),
        ("dataset", dataset, DATASETS),
        ("algorithm", algorithm, offered_rows()),
    ):
        if name not in known:
            raise ValueError(f"no {key} {name!r}, only {', '.join(known)}")
    row, radius = ROWS[algorithm], RADII.get(dataset, 8.0)
    form = {"num_experts": num_experts if row.mixture else 1, "ratio": ratio if row.narrow else 1.0}
    try:
        net = BACKBONES[backbone](**form)
    except ValueError as error:
        raise ValueError(f"backbone.{error}") from None
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
    settings |= RECIPES.get(dataset, {}) | (SHORT if backbone == "small" else {})
    return override(config, held(config, settings))


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
    """Count the net of a run, and its dense twin (one expert, ratio 1), on one image."""
    size, classes = config.dataset.image_size, config.dataset.num_classes
    backbone: Any = config.backbone
    return _count(backbone, classes, size), _count(dense_twin(backbone), classes, size)


@cache
def _count(backbone: Any, classes: int, size: int) -> Cost:
    return cost(backbone.build(classes, size), size)


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
        config = self()
        parts = (
            f"``python -m pipeline.train {self.name}``.",
            _settings(config),
            _expense(config, self.algorithm),
            f"{CLAIMS[ROWS[self.algorithm].paper]} Not run to the end by us.",
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


def _expense(config: Config, algorithm: str) -> str:
    """Say what one image costs, and what it costs to train on it once.

    An update reckoned in forward passes F, with F for a gradient of the image and 2 F for one of
    the weights: k attack steps 2 k F, the clean output F, the loss on both images 6 F. AdvMoE does
    all of it for each of its two phases; a pruned net trains at its full width first. RT-ER attacks
    twice, and has the loss on three images: 4 k F and 9 F.
    """
    own, dense = costs(config)
    router = f", {own.gmac_router:.3g} of them the router's" if own.gmac_router else ""
    text = (
        f"One image costs {own.gmac:.4g} GMAC{router}, {own.gmac / dense.gmac:.3f} of the dense "
        f"net's; {own.params / 1e6:.3g} M parameters."
    )
    passes = 2 * config.algorithm.attack.steps + 7  # type: ignore[attr-defined]
    if algorithm == "rt_er_layers":
        passes = 4 * config.algorithm.attack.steps + 9  # type: ignore[attr-defined]
    if algorithm == "sparse":
        top = f"{passes * dense.gmac:.3g} GMAC an image and epoch until the channels are cut"
        return f"{text} Training: {top}, {passes * own.gmac:.3g} after."
    phases = 2 if algorithm == "adv_moe" else 1
    return f"{text} Training: about {phases * passes * own.gmac:.3g} GMAC an image and epoch."
