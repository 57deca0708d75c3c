"""AutoAttack and its Square attack, by the package ``pyautoattack``.

The only file that knows the package. It is an optional dependency, the extra ``eval``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, Role, is_correct, untouched
from pipeline.measures.gradient_attack import AutoPGDTargeted
from pipeline.measures.soft_gates import relaxed, soft_backward

Logits = Callable[[Tensor], Tensor]

STANDARD: tuple[str, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")
FEW_CLASSES: tuple[str, ...] = (
    "apgd-ce",
    "fab-t",
    "square",
)  # the targeted ratio needs 4 logits
STEPS, QUERIES = 100, 5000  # of the gradient attacks and of Square, in the standard version


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """RA-AA: the standard version of AutoAttack (Croce and Hein, ICML 2020, arXiv:2003.01690).

    APGD-CE, targeted APGD and targeted FAB towards nine classes, Square with 5,000 queries, one
    start each, 100 steps: of ``attack`` only norm and eps count. With fewer than ten classes all
    others are targets; with fewer than four, where the targeted ratio is not defined, ``ra_apgd_t``
    takes the place of targeted APGD. Images are attacked as a batch, from ``seed``: what becomes of
    one can depend on its companions where a start decides.

    Attributes:
        steps, queries: Of the gradient attacks and of Square. With fewer it is no longer the
            standard version, but takes the same turns: for timing.
        seed: Of the package's random numbers; torch's global generator is left as it was.

    Raises:
        ValueError: ``pyautoattack`` is not installed, or there is no step or query.
    """

    title: ClassVar[str] = "RA, AutoAttack standard"
    cost: ClassVar[float] = 40.0
    package: ClassVar[str] = "pyautoattack"
    role: ClassVar[Role] = "mixed"
    attack: PGD = PGD(steps=100)
    steps: int = STEPS
    queries: int = field(default_factory=lambda: QUERIES)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "queries"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            classes = model(x_BCHW[:1]).logits.shape[1]
        if classes >= 4:
            names, before = STANDARD, untouched(model, x_BCHW, y_B)
        else:
            attack = PGD(eps=self.attack.eps, norm=self.attack.norm, steps=self.steps)
            names, before = FEW_CLASSES, AutoPGDTargeted(attack=attack)(model, x_BCHW, y_B, noise)
        attack, logits = replace(self.attack, steps=self.steps), hard(model)
        return run(attack, self.seed, self.queries, names, logits, model, before, x_BCHW, y_B)


@dataclass(frozen=True, kw_only=True)
class AutoAttackSurrogate:
    """RA under AutoAttack's gradient attacks, with the gradient of a softmax over all experts.

    The gates are hard forward, so that what the package sees broken is broken; backward every
    expert has its say (``pipeline.measures.soft_gates.soft_backward``). Square takes no gradients,
    and is left to ``ra_aa``.

    Attributes:
        seed: As in ``AutoAttack``.

    Raises:
        ValueError: ``pyautoattack`` is not installed.
    """

    title: ClassVar[str] = "RA, AutoAttack by soft gates' gradient"
    cost: ClassVar[float] = 80.0
    package: ClassVar[str] = "pyautoattack"
    routed: ClassVar[bool] = True
    role: ClassVar[Role] = "mixed"
    attack: PGD = PGD(steps=100)
    seed: int = 0

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            classes = model(x_BCHW[:1]).logits.shape[1]
        names = [n for n in (STANDARD if classes >= 4 else FEW_CLASSES) if n != "square"]
        logits, before = relaxed(model, soft_backward), untouched(model, x_BCHW, y_B)
        attack = replace(self.attack, steps=STEPS)
        return run(attack, self.seed, QUERIES, names, logits, model, before, x_BCHW, y_B)


@dataclass(frozen=True, kw_only=True)
class Square:
    """RA under Square, which sees scores and no gradients (arXiv:1912.00049).

    A model on which it beats the white-box attacks hides its gradients from them.

    Attributes:
        queries: Evaluations of the model for each image.
        seed: Of the package's random numbers; torch's global generator is left as it was.

    Raises:
        ValueError: ``pyautoattack`` is not installed, or there is no query.
    """

    title: ClassVar[str] = "RA, Square (black box)"
    cost: ClassVar[float] = 10.0
    package: ClassVar[str] = "pyautoattack"
    role: ClassVar[Role] = "black_box"
    attack: PGD = PGD(steps=50)
    queries: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        before, names = untouched(model, x_BCHW, y_B), ("square",)
        logits = hard(model)
        return run(self.attack, self.seed, self.queries, names, logits, model, before, x_BCHW, y_B)


def run(
    attack: PGD,
    seed: int,
    queries: int,
    names: Sequence[str],
    logits: Logits,
    model: Network,
    before: Attacked,
    x_BCHW: Tensor,
    y_B: Tensor,
) -> Attacked:
    """Run the package's attacks one after the other, each on the images that still stand.

    Args:
        attack: Whose norm, eps and steps are taken.
        names: Of ``STANDARD``.
        logits: What the package attacks; ``model`` is what judges.
        before: Outcome so far; its broken images are left alone.
    """
    correct_B, x_adv = before.correct_B.clone(), before.x_adv.clone()
    for name in names:
        alive_A = correct_B.nonzero().squeeze(1)
        if not len(alive_A):
            break
        x_ACHW, y_A = x_BCHW[alive_A].contiguous(), y_B[alive_A]
        with torch.random.fork_rng():
            found = _perturb(attack, seed, queries, name, logits, x_ACHW, y_A)
        found = attack.project(found.to(x_ACHW), x_ACHW)
        x_adv[alive_A], correct_B[alive_A] = found, is_correct(model, found, y_A)
    return Attacked(correct_B, x_adv)


def _perturb(
    attack: PGD,
    seed: int,
    queries: int,
    name: str,
    logits: Logits,
    x_ACHW: Tensor,
    y_A: Tensor,
) -> Tensor:
    """Run one attack of the package's standard version, with its number of targets put right."""
    with torch.no_grad():
        others = logits(x_ACHW[:1]).shape[1] - 1
    suite = _package().AutoAttack(
        lambda x_BCHW: logits(_Relayout.apply(x_BCHW)),  # type: ignore[no-untyped-call]
        norm={"linf": "Linf", "l2": "L2"}[attack.norm],
        eps=attack.eps,
        seed=seed,
        version="standard",
        device=x_ACHW.device,
    )
    kinds: dict[str, Any] = {
        "apgd-ce": suite.apgd,
        "apgd-t": suite.apgd_targeted,
        "fab-t": suite.fab,
        "square": suite.square,
    }
    suite.fab.targeted = True
    suite.square.n_queries = queries
    for kind in (suite.apgd_targeted, suite.fab):
        kind.n_target_classes = min(kind.n_target_classes, others)
    for stepper in (suite.apgd, suite.apgd_targeted, suite.fab):
        stepper.n_iter = attack.steps
    suite.apgd.logger = suite.apgd_targeted.logger = _quiet()
    found: Tensor = kinds[name].perturb(x_ACHW, y_A)
    return found.detach()


def _package() -> Any:
    try:
        import pyautoattack
    except ImportError as error:
        raise ValueError(
            "ra_aa and ra_square need the package pyautoattack: pip install 'robust-moe[eval]', "
            "or leave them out of measure="
        ) from error
    return pyautoattack


def _quiet() -> logging.Logger:
    """Make a logger that says nothing: zero gradients are a check of ours, on every attack."""
    logger = logging.Logger("auto-attack")
    logger.addHandler(logging.NullHandler())
    return logger


class _Relayout(torch.autograd.Function):
    """The identity, to the network's layout forward and back to the package's, which views it."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def hard(model: Network) -> Logits:
    """The logits of the deployed network, with its true gradient."""
    return lambda x_BCHW: model(x_BCHW).logits
