"""TRADES: accuracy and stability as two terms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe.valid_fields import CheckedFields, NonNegative
from pipeline.algorithms.attack_objectives import (
    AimKind,
    divergence,
    error,
    with_auxiliary_loss,
)
from pipeline.attacks import Attack
from pipeline.attacks.pgd import PGD
from pipeline.optimization.losses import kl
from pipeline.optimization.state import GROUPS, Terms, TrainState


def trades_terms(state: TrainState, x_BCHW: Tensor, x_adv: Tensor, y_B: Tensor) -> Terms:
    """``CE(f(x), y)`` and ``KL(f(x) || f(x'))`` (Zhang et al., ICML 2019, arXiv:1901.08573)."""

    def terms() -> dict[str, Tensor]:
        clean, moved = state.forward(x_BCHW), state.forward(x_adv)
        state.watch("router scores", moved.router.abs().amax())
        natural = state.cross_entropy(clean.logits, y_B)
        return {"natural": natural, "robust": kl(clean.logits, moved.logits)}

    return terms


@dataclass(frozen=True, kw_only=True)
class Trades(CheckedFields):
    """``min CE(f(x), y) + beta KL(f(x) || f(x'))``, x' raising the second term, over all groups.

    Attributes:
        beta: Weight of stability against accuracy, 1/lambda in the paper; 6 on CIFAR.
        aim: What x' raises: ``kl``, the second term (the paper), or ``ce``, ``CE(f(x'), y)``.
        attack: How x' is found.
        attack_auxiliary_loss: Whether x' raises the auxiliary losses of token routers too.

    Raises:
        ValueError: A setting is out of its range.
    """

    beta: NonNegative = 6.0
    aim: AimKind = "kl"
    attack: Attack = PGD(start="gaussian")
    attack_auxiliary_loss: bool = False

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update all groups from pixels in [0, 1]; return detached losses in nats per image."""
        aim = divergence if self.aim == "kl" else error(y_B)
        if self.attack_auxiliary_loss:
            aim = with_auxiliary_loss(aim)
        x_adv = state.perturb(self.attack, aim, x_BCHW)
        terms = trades_terms(state, x_BCHW, x_adv, y_B)
        return state.minimize(terms, {"natural": 1.0, "robust": self.beta}, *GROUPS)
