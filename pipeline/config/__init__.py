"""A run as data: everything that decides its numbers, and the one way to change it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe.backbones import Backbone
from moe.backbones.dual import DualNetworks
from moe.backbones.small import Small
from moe.backbones.vit import ViT
from moe.valid_fields import BelowOne, Count, NonNegative, Positive, UpToOne, Whole, check_fields
from pipeline.algorithms import Algorithm
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.jtdmoe import JTDMoE
from pipeline.algorithms.rt_er import RTER
from pipeline.algorithms.sparse import Sparse
from pipeline.config.overrides import flatten, name_of, override
from pipeline.config.worker_range import Elastic, counts, ends
from pipeline.data import Dataset
from pipeline.data.digits import Digits
from pipeline.measures import Evaluation

__all__ = ["Config", "flatten", "name_of", "override", "read"]

ELSEWHERE = (
    "dataset.path",
    "dataset.reader",
    *(
        f"backbone.{half}{net}weights"
        for half in ("", "standard.", "robust.")
        for net in ("", "expert.")
    ),
    "upcycle",
    "storage",
    "tracking_uri",
    "experiment",
    "name",
    "checkpoint_steps",
)
"""Keys that say where a run lives, not what its numbers are: left out of the fingerprint."""

LATER = {
    "norm_bound": 0.0,
    "upcycle_sha256": "",
    "algorithm.attack_auxiliary_loss": False,
    "algorithm.homes": "mod",
    "algorithm.forced_routes": 0.0,
}
"""Keys that came later, with the value that leaves the fingerprint of older runs as it was."""
LATER_OF_VIT = {
    field.name: field.default
    for field in dataclasses.fields(ViT)
    if field.name not in (*"num_experts ratio router_scope size patch pixels".split(),)
    and not field.name.startswith("weights")
}
"""The same of the fields of a vision transformer, wherever it is in a backbone."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides the numbers of a run, and where it is kept.

    Attributes:
        dataset, backbone, algorithm: One component each, from the registry of that name.
        evaluation: The threat that the model is judged under, whatever it was trained with.
        epochs: Passes over the training images.
        batch_size: Images per update over all workers.
        workers: Data-parallel replicas; ``1..4``: as many as there is room for, more or fewer as
            nodes join and leave, with the same images in every update.
        precision: ``fp32`` or ``bf16`` (autocast; evaluation is always fp32).
        optimizer, momentum, weight_decay: Of both parameter groups.
        lr, router_lr: Peak rates; a ``router_lr`` of none is ``lr``.
        schedule, router_schedule: ``cosine`` to zero, ``cyclic`` (up for two fifths, then down,
            linear), ``triangular`` (between half the peak and the peak, ten epochs up and down), or
            ``constant``.
        warmup_epochs: Linear rise from zero before the schedule, in epochs (may be a fraction); of
            ``cyclic``, its rise.
        ema_decay: Decay of the average of the weights over the updates, which is what is validated,
            kept as the model and tested; 0: no average. See ``pipeline.optimization.ema``.
        awp_gamma: Adversarial weight perturbation: its size over that of each layer's weights; 0:
            none. See ``pipeline.optimization.awp``.
        awp_warmup: Epochs before it begins.
        label_smoothing: Part of a label that is spread over all classes in the loss.
        clip_norm: Largest norm of each group's gradient over all workers; 0: any.
        norm_bound: Largest L-inf operator norm of every linear map and convolution, kept after
            each update; 0: any. See ``pipeline.optimization.norm_bound``.
        augmentation: Of raw images, before crop and mirror: ``none`` or ``randaugment``.
        cutmix: Share of the images that get a box of another, with its share of the label.
        upcycle: Checkpoint folder of a dense run whose layers the experts start as copies of;
            ``pipeline.train`` takes a run's id too. Only the start of a run reads it, on every
            worker. See ``moe.upcycling``.
        upcycle_sha256: Of its weights, found when ``upcycle`` is a folder and this is not set.
        seed: Fixes initial weights, order of data, augmentation and starts of attacks.
        checkpoint_steps: Save every so many updates too, not only after each epoch; 0: epochs only.
        storage: Folder of the run folders, or a URI that pyarrow reaches (``s3://bucket/prefix``).
        tracking_uri: MLflow; empty: ``MLFLOW_TRACKING_URI``, else a sqlite file in the working
            directory.
        experiment, name: Where MLflow lists the run.

    Raises:
        ValueError: A setting is out of its range; the message names it, its value and the range.
    """

    dataset: Dataset = Digits()
    backbone: Backbone = Small()
    algorithm: Algorithm = AdvMoE()
    evaluation: Evaluation = Evaluation()
    epochs: Count = 100
    batch_size: Count = 128
    workers: int | Elastic = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: BelowOne = 0.9
    weight_decay: NonNegative = 5e-4
    lr: Positive = 0.1
    router_lr: Positive | None = None
    schedule: Literal["cosine", "cyclic", "triangular", "constant"] = "cosine"
    router_schedule: Literal["cosine", "cyclic", "triangular", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    ema_decay: BelowOne = 0.0
    awp_gamma: NonNegative = 0.0
    awp_warmup: NonNegative = 0.0
    label_smoothing: BelowOne = 0.0
    clip_norm: NonNegative = 0.0
    norm_bound: NonNegative = 0.0
    augmentation: Literal["none", "randaugment"] = "none"
    cutmix: UpToOne = 0.0
    upcycle: str = ""
    upcycle_sha256: str = ""
    seed: Whole = 0
    checkpoint_steps: Whole = 0
    storage: str = "runs"
    tracking_uri: str = ""
    experiment: str = "robust-moe"
    name: str = "run"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if any(self.batch_size % count for count in ends(self.workers)):
            raise ValueError(
                f"batch_size must be a multiple of workers ({self.workers}), got {self.batch_size}"
            )
        halves = 2 if getattr(self.algorithm, "minibatches", "one") == "two" else 1
        if self.batch_size < (least := 2 * halves * self.workers):  # BatchNorm needs two images
            raise ValueError(
                f"batch_size must be at least {least} for {self.workers} worker(s), "
                f"got {self.batch_size}"
            )
        if self.upcycle and not self.upcycle_sha256:
            weights = Path(self.upcycle) / "model.safetensors"
            if weights.is_file():
                with weights.open("rb") as opened:
                    found = hashlib.file_digest(opened, "sha256").hexdigest()
                object.__setattr__(self, "upcycle_sha256", found)
        self._check_attacks()
        self._check_recipe()
        self._check_words()

    def _check_attacks(self) -> None:
        grey = math.sqrt(3) * self.dataset.image_size / 2  # turns every image into mid-grey
        attack = getattr(self.algorithm, "attack", None)
        for key, ball in (("evaluation", self.evaluation), ("algorithm.attack", attack)):
            if ball is None:
                continue
            if getattr(ball, "step_size", 1.0) == 0 < min(ball.eps, ball.steps):
                raise ValueError(
                    f"{key}.step_size must be above 0 with eps above 0 and steps={ball.steps}, "
                    "got 0: no image would move from its start"
                )
            if ball.norm == "l2" and ball.eps > grey:
                raise ValueError(
                    f"{key}.eps must be at most {grey:.4g} in L2, which turns every image of "
                    f"{self.dataset.image_size} px into mid-grey, got {ball.eps:g}; "
                    f"{ball.eps:g}/255 was probably meant"
                )

    def _check_recipe(self) -> None:
        if self.cutmix and any(self.batch_size % (2 * n) for n in ends(self.workers)):  # pairs
            raise ValueError(
                f"batch_size must be a multiple of {2 * int(self.workers)} for cutmix on "
                f"{self.workers} worker(s), got {self.batch_size}"
            )

    def _check_words(self) -> None:
        for key in ("name", "experiment"):
            value = getattr(self, key)
            if not value or value.startswith(".") or set(value) & set("/\\\0"):
                raise ValueError(f"{key} must be a plain name without / and \\, got {value!r}")
        if re.search(r"://[^/@]*:[^/@]*@", self.tracking_uri):
            raise ValueError(
                "tracking_uri must hold no password: it is kept with every checkpoint and shown in "
                "MLflow; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or put the "
                "whole URI into MLFLOW_TRACKING_URI"
            )
        if isinstance(self.algorithm, AdvMoE) and self.backbone.num_experts < 2:
            raise ValueError(
                "backbone.num_experts must be at least 2 for algorithm=adv_moe, got "
                f"{self.backbone.num_experts}; a dense net trains with algorithm=trades"
            )
        self._check_dual()
        if isinstance(self.algorithm, Sparse):  # the backbone is what shall remain
            if (experts := self.backbone.num_experts) != 1:
                raise ValueError(
                    f"backbone.num_experts must be 1 for algorithm=sparse, got {experts}"
                )
            if not (ratio := self.backbone.ratio) < 1:
                raise ValueError(
                    f"backbone.ratio must be below 1 for algorithm=sparse, got {ratio}"
                )

    def _check_dual(self) -> None:
        algorithm, experts = self.algorithm, self.backbone.num_experts
        if isinstance(algorithm, RTER) and algorithm.robustify != "none" and experts < 2:
            raise ValueError(
                "backbone.num_experts must be at least 2 for algorithm=rt_er with robustify="
                f"{algorithm.robustify}, got {experts}"
            )
        if not isinstance(algorithm, JTDMoE):
            return
        dual = self.backbone
        if not isinstance(dual, DualNetworks):
            name = name_of("backbone", dual)
            raise ValueError(f"backbone must be dual for algorithm=jtdmoe, got {name!r}")
        if not dual.alpha < 1:
            raise ValueError(
                "backbone.alpha must be below 1 for algorithm=jtdmoe, or the standard half never "
                f"trains, got {dual.alpha}"
            )
        if algorithm.robustify != "none" and dual.robust.num_experts < 2:
            raise ValueError(
                "backbone.robust.num_experts must be at least 2 for algorithm=jtdmoe with "
                f"robustify={algorithm.robustify}, got {dual.robust.num_experts}"
            )

    @property
    def worker_counts(self) -> list[int]:
        """List the numbers of workers that the run may have at a time."""
        return counts(self.workers, self.batch_size // 2 if self.cutmix else self.batch_size)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the numbers, 64 hexadecimal digits."""
        whole = flatten(self)
        flat = {k: v for k, v in whole.items() if not _came_later(k, v, whole)}
        deciding = {k: v for k, v in flat.items() if k not in ELSEWHERE}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _came_later(key: str, value: Any, flat: Mapping[str, Any]) -> bool:
    owner, _, name = key.rpartition(".")
    known = LATER_OF_VIT if flat.get(owner) == "vit" else {}
    return (key in LATER and LATER[key] == value) or (name in known and known[name] == value)


def read(flat: Mapping[str, Any]) -> Config:
    """Rebuild a config from what ``flatten`` wrote."""
    return override(Config(), flat)
