"""What the training attacks raise: makers of objectives of the images.

Shapes: B images, K classes, E experts, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from moe.network import Network
from moe.token_network import TokenNetwork
from pipeline.attacks import Objective
from pipeline.optimization.losses import cross_entropy_per_image, kl_per_image

Aim = Callable[[Network, Tensor], Objective]
"""From a frozen model and clean images to what the attack raises, one value per image."""
AimKind = Literal["kl", "ce"]
"""Which of the two an attack raises: the divergence from the clean answer, or the error."""


def divergence(model: Network, x_BCHW: Tensor) -> Objective:
    """``KL(f(x) || f(x'))``, (B,): the attack of TRADES (arXiv:1901.08573, eq. 3)."""
    with torch.no_grad():
        clean_BK = model(x_BCHW).logits
    return lambda x_adv: kl_per_image(clean_BK, model(x_adv).logits)


def error(y_B: Tensor) -> Aim:
    """Make the aim ``CE(f(x'), y)``, (B,) (Madry et al., arXiv:1706.06083, eq. 2.1).

    Labels are not smoothed here: with smoothed ones an attack on a net that has learned them
    succeeds by making it surer of the right class. The shares of a mixed image (B, K) are kept:
    against its larger class alone, the smaller one would be a success.
    """

    def aim(model: Network, x_BCHW: Tensor) -> Objective:
        return lambda x_adv: cross_entropy_per_image(model(x_adv).logits, y_B)

    return aim


def joint(kind: str, y_B: Tensor) -> Aim:
    """Make AdvMoE's aim, classifier and router together: ``d(x') + KL(r(x) || r(x'))``, (B,).

    ``d`` is ``KL(f(x) || f(x'))`` for ``kl`` and ``CE(f(x'), y)`` for ``ce``. For a dense net the
    router's term is zero, so dense and mixture models face the same attack.
    """

    def aim(model: Network, x_BCHW: Tensor) -> Objective:
        with torch.no_grad():
            clean = model(x_BCHW)

        def objective(x_adv: Tensor) -> Tensor:
            moved = model(x_adv)
            unsteady_B = kl_per_image(clean.router, moved.router)
            if kind == "ce":
                return cross_entropy_per_image(moved.logits, y_B) + unsteady_B
            return kl_per_image(clean.logits, moved.logits) + unsteady_B

        return objective

    return aim


def with_auxiliary_loss(aim: Aim) -> Aim:
    """Add the auxiliary losses of token routers to what an attack raises; else the aim as it is.

    Of each image's own tokens, so that images are attacked one by one; the released V-MoE trainer
    has the same setting over a whole batch. Costs a second pass per step.
    """

    def both(model: Network, x_BCHW: Tensor) -> Objective:
        own = aim(model, x_BCHW)
        if not isinstance(model, TokenNetwork):
            return own
        return lambda x: own(x) + model.auxiliary_per_image(model.router_scores(x))

    return both


def router_divergence(model: Network, x_BCHW: Tensor) -> Objective:
    """``KL(r(x) || r(x'))``, (B,): the router alone; the body is not run where it need not be."""
    with torch.no_grad():
        clean_BE = model.router_scores(x_BCHW)
    return lambda x_adv: kl_per_image(clean_BE, model.router_scores(x_adv))
