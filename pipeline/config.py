"""A run as data: everything that decides its numbers, and the one way to change it."""

from __future__ import annotations

import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from moe.backbones import BACKBONES, Backbone
from moe.backbones.dual import DualNetworks
from moe.backbones.small import Small
from pipeline.algorithms import ALGORITHMS, Algorithm
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.jtdmoe import JTDMoE
from pipeline.algorithms.rt_er import RTER
from pipeline.algorithms.sparse import Sparse
from pipeline.attacks import ATTACKS
from pipeline.data import DATASETS, Dataset
from pipeline.data.digits import Digits
from pipeline.elastic import Elastic, counts, ends, read_workers
from pipeline.measures import Evaluation

C = TypeVar("C")

REGISTRIES: dict[str, Mapping[str, type[Any]]] = {
    "dataset": DATASETS,
    "backbone": BACKBONES,
    "expert": BACKBONES,
    "standard": BACKBONES,
    "robust": BACKBONES,
    "algorithm": ALGORITHMS,
    "attack": ATTACKS,
}
ELSEWHERE = (
    "dataset.path",
    "dataset.reader",
    *(
        f"backbone.{half}{net}weights"
        for half in ("", "standard.", "robust.")
        for net in ("", "expert.")
    ),
    "storage",
    "tracking_uri",
    "experiment",
    "name",
    "checkpoint_steps",
)
"""Keys that say where a run lives, not what its numbers are: left out of the fingerprint."""

LATER = {"norm_bound": 0.0}
"""Keys that came later, with the value that leaves the fingerprint of older runs as it was."""


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
            kept as the model and tested; 0: no average. See ``pipeline.ema``.
        awp_gamma: Adversarial weight perturbation: its size over that of each layer's weights; 0:
            none. See ``pipeline.awp``.
        awp_warmup: Epochs before it begins.
        label_smoothing: Part of a label that is spread over all classes in the loss.
        clip_norm: Largest norm of each group's gradient over all workers; 0: any.
        norm_bound: Largest L-inf operator norm of every linear map and convolution, kept after
            each update; 0: any. See ``pipeline.norms``.
        augmentation: Of raw images, before crop and mirror: ``none`` or ``randaugment``.
        cutmix: Share of the images that get a box of another, with its share of the label.
        seed: Fixes initial weights, order of data, augmentation and starts of attacks.
        checkpoint_steps: Save every so many updates too, not only after each epoch; 0: epochs only.
        storage: Folder of the run folders.
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
    epochs: int = 100
    batch_size: int = 128
    workers: int | Elastic = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr: float = 0.1
    router_lr: float | None = None
    schedule: Literal["cosine", "cyclic", "triangular", "constant"] = "cosine"
    router_schedule: Literal["cosine", "cyclic", "triangular", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    ema_decay: float = 0.0
    awp_gamma: float = 0.0
    awp_warmup: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    norm_bound: float = 0.0
    augmentation: Literal["none", "randaugment"] = "none"
    cutmix: float = 0.0
    seed: int = 0
    checkpoint_steps: int = 0
    storage: str = "runs"
    tracking_uri: str = ""
    experiment: str = "robust-moe"
    name: str = "run"

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "workers"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
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
        self._check_rates()
        self._check_recipe()
        self._check_words()

    def _check_rates(self) -> None:
        for key in ("lr", "router_lr"):
            if (value := getattr(self, key)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{key} must be above 0, got {value}")
        for key in ("momentum", "weight_decay", "warmup_epochs", "checkpoint_steps", "seed"):
            if not (value := getattr(self, key)) >= 0:
                raise ValueError(f"{key} must be at least 0, got {value}")
        if self.momentum >= 1:
            raise ValueError(f"momentum must be below 1, got {self.momentum}")

    def _check_recipe(self) -> None:
        for key in ("ema_decay", "label_smoothing"):
            if not 0 <= (value := getattr(self, key)) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, got {value}")
        for key in ("awp_gamma", "awp_warmup", "clip_norm", "norm_bound"):
            if not 0 <= (value := getattr(self, key)) < float("inf"):
                raise ValueError(f"{key} must be at least 0 and finite, got {value}")
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix must be from 0 to 1, got {self.cutmix}")
        if self.cutmix and any(self.batch_size % (2 * n) for n in ends(self.workers)):  # pairs
            raise ValueError(
                f"batch_size must be a multiple of {2 * int(self.workers)} for cutmix on "
                f"{self.workers} worker(s), got {self.batch_size}"
            )

    def _check_words(self) -> None:
        for key in ("precision", "optimizer", "schedule", "router_schedule", "augmentation"):
            valid = typing.get_args(typing.get_type_hints(Config)[key])
            if (value := getattr(self, key)) not in valid:
                raise ValueError(f"{key} must be one of {', '.join(valid)}, got {value!r}")
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
        flat = {k: v for k, v in flatten(self).items() if k not in LATER or v != LATER[k]}
        deciding = {k: v for k, v in flat.items() if k not in ELSEWHERE}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Write a config as dotted keys and plain values; ``override(Config(), ...)`` reads it back."""
    flat: dict[str, Any] = {}
    for field in fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if not is_dataclass(value):
            flat[key] = str(value) if isinstance(value, Elastic) else value
            continue
        if field.name in REGISTRIES:
            flat[key] = name_of(field.name, value)
        flat |= flatten(value, f"{key}.")
    return flat


def name_of(registry: str, component: Any) -> str:
    """Name a component as its registry does."""
    return next(name for name, kind in REGISTRIES[registry].items() if type(component) is kind)


def override(node: C, changes: Mapping[str, Any], prefix: str = "") -> C:
    """Replace dotted fields: ``override(config, {"algorithm": "adv_moe", "algorithm.beta": 3.0})``.

    The one way in for the command line, Ray Tune and tests. Strings are parsed by the type of the
    field (``8/255`` is a float). The order of ``changes`` does not matter; every dataclass that
    changes is validated once, in its final state. Changing a component keeps the settings that the
    old and the new one share by name, so that ``algorithm=moe_at`` trains under the same attack.

    Raises:
        ValueError: No such field or component, or the result is not valid.
    """
    new: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    hints = typing.get_type_hints(type(node))
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if name not in (known := [field.name for field in fields(node)]):  # type: ignore[arg-type]
            raise ValueError(
                f"no key {prefix + name!r}, only {', '.join(prefix + k for k in known)}"
            )
        if rest:
            inner.setdefault(name, {})[rest] = value
        elif name in REGISTRIES:
            own = {key.split(".")[1] for key in changes if key.startswith(f"{name}.")}
            new[name] = _switch(prefix, name, value, getattr(node, name), own)
        elif is_dataclass(getattr(node, name)):
            raise ValueError(f"{prefix + name} has keys of its own, such as {prefix + name}.eps")
        else:
            new[name] = parse(prefix + name, value, hints[name])
    for name, nested in inner.items():
        target = new.get(name, getattr(node, name))
        if not is_dataclass(target):
            raise ValueError(f"no key {prefix + name + '.' + next(iter(nested))!r}")
        new[name] = override(target, nested, f"{prefix}{name}.")
    try:
        return replace(node, **new)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(prefix + str(error)) from None


def _switch(prefix: str, name: str, value: Any, old: Any, own: set[str]) -> Any:
    """Change a component; ``own`` are the keys that are set anyway, and so not kept."""
    if value not in (registry := REGISTRIES[name]):
        raise ValueError(f"no {prefix + name} {value!r}, only {', '.join(registry)}")
    kind = registry[value]
    if type(old) is kind:
        return old
    shared = {f.name for f in fields(old)} & {f.name for f in fields(kind)}
    if name == "dataset":  # crop and flip are the data set's own unless somebody set them
        shared = {key for key in shared if getattr(old, key) != getattr(type(old)(), key)}
    try:
        return kind(**{key: getattr(old, key) for key in shared - own})
    except ValueError as error:
        raise ValueError(f"{prefix + name}.{error}") from None


def parse(key: str, value: Any, hint: Any) -> Any:
    """Read a value as the type of its field.

    Raises:
        ValueError: It is not of that type; the message names the key, the value and what is valid.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        options = tuple(option for option in options if option is not types.NoneType)
    kind = Elastic if Elastic in options else options[0]
    if typing.get_origin(kind) is Literal:
        if value in (valid := typing.get_args(kind)):
            return value
        raise ValueError(f"{key} must be one of {', '.join(map(str, valid))}, got {value!r}")
    try:
        return _as(kind, value)
    except (ValueError, TypeError, ZeroDivisionError):
        wanted = {
            int: "a whole number",
            float: "a number such as 0.1 or 8/255",
            bool: "true or false",
            Elastic: "a whole number or a range such as 1..4",
        }
        raise ValueError(
            f"{key} must be {wanted.get(kind, kind.__name__)}, got {value!r}"
        ) from None


def _as(kind: Any, value: Any) -> Any:
    if kind is str and not isinstance(value, str):
        raise TypeError
    if kind is Elastic:
        return read_workers(value)
    if kind is bool:
        if (text := str(value).lower()) not in ("true", "false", "1", "0"):
            raise ValueError
        return text in ("true", "1")
    if isinstance(value, bool):
        raise TypeError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    if kind is float:
        top, slash, bottom = str(value).partition("/")
        return float(top) / float(bottom) if slash else float(value)
    return kind(value)


def read(flat: Mapping[str, Any]) -> Config:
    """Rebuild a config from what ``flatten`` wrote."""
    return override(Config(), flat)
