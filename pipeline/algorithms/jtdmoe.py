"""JTDMoE: the two halves of a dual model, trained in turn.

Shapes: B images, K classes, CHW channels and sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.dual_model import Dual
from moe.fold_batchnorm import fold
from moe.network import Network, is_router_parameter
from moe.valid_fields import CheckedFields, NonNegative
from pipeline.algorithms.rt_er import Robustify, rt_er_terms
from pipeline.attacks import Attack
from pipeline.attacks.pgd import PGD
from pipeline.optimization.state import HALVES, Partition, TrainState


@dataclass(frozen=True, kw_only=True)
class JTDMoE(CheckedFields):
    """One step of RT-ER on the robust half, then one of ``CE(F_D(x), y)`` on the standard half.

    ``F_D = (1 - alpha) F_S + alpha F_R`` on clean images, alpha that of the model; joint training
    of the dual model (arXiv:2502.06832, section 5). Each half has an optimizer of its own, and the
    one that rests does not change by one bit, its BatchNorm statistics included. The standard half
    learns beside the robust one as it is deployed, in eval mode.

    Attributes:
        beta: Weight of the experts' term of RT-ER's loss.
        robustify: Experts in that term: ``all`` (the released code), ``second`` or ``none``, see
            ``RTER``.
        attack: How the attacked images of the robust half are found.

    Raises:
        ValueError: A setting is out of its range.
    """

    beta: NonNegative = 6.0
    robustify: Robustify = "all"
    attack: Attack = PGD()
    partition: ClassVar[Partition] = HALVES

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update both halves from pixels in [0, 1]; return detached losses in nats per image."""
        robust = self._step_robust(state, x_BCHW, y_B)
        return robust | self._step_standard(state, x_BCHW, y_B)

    def _step_robust(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        terms = rt_er_terms(
            state, lambda m: halves(m).robust, x_BCHW, y_B, self.attack, self.robustify
        )
        with state.only("robust"):
            losses = state.minimize(terms, {"robust": 1.0, "consistency": self.beta}, "robust")
        watch_router(state, "robust")
        return losses

    def _step_standard(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        dual = halves(state.model)
        with torch.no_grad():
            robust_BK = fold(dual.robust)(x_BCHW).logits

        def terms() -> dict[str, Tensor]:
            logits_BK = dual.blend(dual.standard(x_BCHW).logits, robust_BK)
            return {"natural": state.cross_entropy(logits_BK, y_B)}

        with state.only("standard"):
            losses = state.minimize(terms, {"natural": 1.0}, "standard")
        watch_router(state, "standard")
        return losses


def halves(model: Network) -> Dual:
    """Return a model as the dual one that it must be."""
    if not isinstance(model, Dual):
        raise ValueError(f"jtdmoe needs backbone=dual, got a {type(model).__name__}")
    return model


def watch_router(state: TrainState, half: str) -> None:
    """Keep the gradient norm of a half's router to be checked: zero means that it cannot train."""
    named = state.model.named_parameters()
    grads = [
        p.grad
        for name, p in named
        if name.startswith(f"{half}.") and is_router_parameter(name) and p.grad is not None
    ]
    if grads:
        state.watch(f"gradient norm of {half}.router", torch.nn.utils.get_total_norm(grads))
