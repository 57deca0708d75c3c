"""AdvMoE's and TRADES' updates written plainly: the same numbers, and nothing saved.

Every backward pass computes the gradients of all parameters, those of the attack too, and an
optimizer takes its own half of them; each attack step evaluates the router once in the model and
once apart from it, as AdvMoE's released code does. Networks are not folded.

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.network import Network
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.trades import Trades
from pipeline.attacks.pgd import PGD, Draw
from pipeline.optimization.losses import cross_entropy_per_image, kl, kl_per_image


def plain_adv_moe(
    algorithm: AdvMoE,
    model: Network,
    optimizers: Mapping[str, Optimizer],
    x_BCHW: Tensor,
    y_B: Tensor,
    noise: Draw,
) -> None:
    """Update the experts, then the router, as ``AdvMoE.step`` does on one minibatch."""
    assert algorithm.minibatches == "one"
    assert algorithm.aim == "kl"
    assert isinstance(algorithm.attack, PGD)
    for phase in ("experts", "router"):
        router_only = phase == "router" and algorithm.router_loss == "pseudo_label"
        x_adv = plain_attack(algorithm.attack, model, x_BCHW, noise, router_only=router_only)
        _rest(model, phase)
        if router_only:
            clean, moved = model.router_scores(x_BCHW), model.router_scores(x_adv)
            home_B = y_B % model.num_experts
            natural = algorithm.alpha * cross_entropy_per_image(clean, home_B).mean()
            loss = natural + algorithm.beta * kl(clean, moved)
        else:
            loss = _trades_loss(model, x_BCHW, x_adv, y_B, algorithm.beta)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[phase].step()
    _rest(model, "nothing")


def plain_trades(
    algorithm: Trades,
    model: Network,
    optimizer: Optimizer,
    x_BCHW: Tensor,
    y_B: Tensor,
    noise: Draw,
) -> None:
    """Update all parameters of a dense net, as ``Trades.step`` does."""
    assert algorithm.aim == "kl"
    assert isinstance(algorithm.attack, PGD)
    x_adv = plain_attack(algorithm.attack, model, x_BCHW, noise)
    model.train()
    loss = _trades_loss(model, x_BCHW, x_adv, y_B, algorithm.beta)
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def plain_attack(
    attack: PGD, model: Network, x_BCHW: Tensor, noise: Draw, *, router_only: bool = False
) -> Tensor:
    """Raise ``KL(f) + KL(r)``, or ``KL(r)`` alone; leaves gradients on the parameters."""
    assert attack.norm == "linf"
    model.eval()
    model.gate_gradient = False
    with torch.no_grad():
        clean = model(x_BCHW)
    x_adv = attack.begin(x_BCHW, noise)
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        if router_only:
            height_B = kl_per_image(clean.router, model.router_scores(x_adv))
        else:
            moved = model(x_adv)
            scores = moved.router if model.router is None else model.router_scores(x_adv)
            height_B = kl_per_image(clean.logits, moved.logits) + kl_per_image(clean.router, scores)
        height_B.sum().backward()  # type: ignore[no-untyped-call]
        assert x_adv.grad is not None
        x_adv = attack.project(x_adv.detach() + attack.step_size * x_adv.grad.sign(), x_BCHW)
    model.gate_gradient = True
    return x_adv.detach()


def _trades_loss(model: Network, x_BCHW: Tensor, x_adv: Tensor, y_B: Tensor, beta: float) -> Tensor:
    clean, moved = model(x_BCHW).logits, model(x_adv).logits
    return cross_entropy_per_image(clean, y_B).mean() + beta * kl(clean, moved)


def _rest(model: Network, phase: str) -> None:
    """Let one half rest, with the statistics and gates that ``TrainState.only`` gives it."""
    model.train()
    model.gate_gradient = phase != "experts"
    for name, module in model.named_modules():
        if name == "router" or name.endswith(".gate"):
            module.train(phase != "experts")
    for module in model.body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = phase != "router"
