"""One AdvMoE update: ours, and written plainly over masked layers; dense TRADES for context."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import SGD

from moe.network import Network
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.trades import Trades
from pipeline.attacks.pgd import PGD
from pipeline.bench.inference import channels_last, relaid, shares
from pipeline.bench.masked import masked
from pipeline.bench.plain import plain_adv_moe, plain_trades
from pipeline.bench.race import Benchmark, Variant
from pipeline.bench.settings import Settings, settle
from pipeline.optimization.state import GROUPS, TrainState
from pipeline.seeding import Noise

OURS, PLAIN = "AdvMoE, ours", "AdvMoE, plain, masked"
DENSE, DENSE_OURS = "dense TRADES, plain", "dense TRADES, our step"
CHECKED = 8  # images on which the two updates are compared in float64


def step(settings: Settings) -> Benchmark:
    """Update once: attack, experts, attack, router; a dense net: attack, update.

    Every call starts from the same weights, images and noise.
    """
    x_BCHW, y_B = settings.images()
    nhwc_BCHW = channels_last(x_BCHW)
    mixture, dense = settle(settings.mixture(), x_BCHW), settle(settings.dense(), x_BCHW)
    fast, slow = training_state(relaid(copy.deepcopy(mixture))), training_state(masked(mixture))
    fast_dense, slow_dense = training_state(relaid(copy.deepcopy(dense))), training_state(dense)
    attack = PGD(step_size=5 / 255, steps=settings.attack_steps, start="gaussian")
    adv_moe = AdvMoE(attack=attack, router_loss=settings.router_loss)
    trades = Trades(attack=attack)

    def plain() -> None:
        plain_adv_moe(adv_moe, slow.model, slow.optimizers, x_BCHW, y_B, slow.noise)

    def plain_dense() -> None:
        (optimizer,) = slow_dense.optimizers.values()
        plain_trades(trades, slow_dense.model, optimizer, x_BCHW, y_B, slow_dense.noise)

    def notes() -> list[str]:
        with torch.no_grad():
            route = mixture(x_BCHW).route
        gap = disagreement(adv_moe, mixture, x_BCHW[:CHECKED], y_B[:CHECKED])
        return [
            f"in float64, on {CHECKED} images: our update differs from the plain one by {gap:.0e} "
            "of its length",
            f"load of the experts: {shares(route, settings.num_experts)}",
        ]

    return Benchmark(
        title=f"one update on {settings.batch} images: router_loss={settings.router_loss}, "
        f"{settings.attack_steps} attack steps in each phase",
        variants={
            OURS: Variant(lambda: adv_moe.step(fast, nhwc_BCHW, y_B), restart(fast)),
            PLAIN: Variant(plain, restart(slow)),
            DENSE: Variant(plain_dense, restart(slow_dense)),
            DENSE_OURS: Variant(
                lambda: trades.step(fast_dense, nhwc_BCHW, y_B), restart(fast_dense)
            ),
        },
        notes=notes,
    )


def training_state(model: Network) -> TrainState:
    """Set a network to training, with the optimizers of AdvMoE's defaults."""
    model.train()
    state = TrainState(model, {})
    state.optimizers = {
        group: SGD(members, lr=0.1, momentum=0.9, weight_decay=5e-4)
        for group in GROUPS
        if (members := state.parameters(group))
    }
    return state


def restart(state: TrainState) -> Callable[[], None]:
    """Make a call that takes a state back to where it is now, with fresh noise."""
    weights = copy.deepcopy(state.model.state_dict())
    device = next(state.model.parameters()).device

    def back() -> None:
        state.model.load_state_dict(weights)
        state.noise = Noise(torch.Generator(device).manual_seed(0))
        for optimizer in state.optimizers.values():
            optimizer.state.clear()

    return back


def disagreement(algorithm: AdvMoE, model: Network, x_BCHW: Tensor, y_B: Tensor) -> float:
    """Update two copies in float64, ours and plainly: ``|ours - plain| / |plain - start|``."""
    start, x_BCHW = copy.deepcopy(model).double(), x_BCHW.double()
    fast, slow = training_state(copy.deepcopy(start)), training_state(masked(start))
    for state in (fast, slow):
        restart(state)()
    algorithm.step(fast, x_BCHW, y_B)
    plain_adv_moe(algorithm, slow.model, slow.optimizers, x_BCHW, y_B, slow.noise)
    nets = (fast.model, slow.model, start)
    ours, plain, before = (torch.cat([p.detach().flatten() for p in n.parameters()]) for n in nets)
    return float((ours - plain).norm() / (plain - before).norm())
