"""AdvMoE: robust training that alternates between experts and router.

Shapes: B images, E experts, CHW channels and sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pipeline.algorithms.attack_objectives import check_aim, joint, router_divergence
from pipeline.algorithms.trades import trades_terms
from pipeline.attacks import Attack
from pipeline.attacks.pgd import PGD
from pipeline.optimization.losses import cross_entropy_per_image, dominant, kl
from pipeline.optimization.state import Terms, TrainState


@dataclass(frozen=True, kw_only=True)
class AdvMoE:
    """One TRADES update of the experts, then one of the router (arXiv:2308.10110, eq. 3).

    ``min_psi l(psi, phi*(psi))``, ``phi*(psi) = argmin_phi l(psi, phi)``, with router psi, experts
    phi and ``l = CE(f(x), y) + beta KL(f(x) || f(x'))``, by one SGD step on each in turn. Before
    each step x' is found again, raising ``KL(f) + KL(r)``; for pseudo labels, a loss of the router
    alone, ``KL(r)`` (the released code: both, always). The half that rests does not change by one
    bit, its BatchNorm statistics included (the released code moves them).

    Attributes:
        beta: Weight of stability against accuracy; 6 in the paper.
        alpha: Weight of the pseudo labels, for that router loss only; 6 in the released code.
        router_loss: ``trades``: l itself through the straight-through gate (the paper).
            ``pseudo_label``: ``alpha CE(r(x), y mod E) + beta KL(r(x) || r(x'))`` (released code).
        minibatches: ``one``: both steps on the same images (released code). ``two``: the first
            half of each worker's part for the experts, the second for the router (the paper's B_l,
            B_u).
        aim: What x' raises beside ``KL(r)``: ``kl``: ``KL(f(x) || f(x'))`` (the released code);
            ``ce``: ``CE(f(x'), y)``. Two steps of the first hardly break an image while the net is
            unsure of its classes, so short runs learn more from the second.
        attack: How x' is found; 2 steps of 5/255 in the released code.

    Raises:
        ValueError: A setting is out of its range.
    """

    beta: float = 6.0
    alpha: float = 6.0
    router_loss: Literal["trades", "pseudo_label"] = "trades"
    minibatches: Literal["one", "two"] = "one"
    aim: Literal["kl", "ce"] = "kl"
    attack: Attack = PGD(step_size=5 / 255, steps=2, start="gaussian")

    def __post_init__(self) -> None:
        for name in ("beta", "alpha"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.router_loss not in ("trades", "pseudo_label"):
            raise ValueError(
                f"router_loss must be trades or pseudo_label, got {self.router_loss!r}"
            )
        check_aim(self.aim)
        if self.minibatches not in ("one", "two"):
            raise ValueError(f"minibatches must be one or two, got {self.minibatches!r}")

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update both groups from pixels in [0, 1]; return detached losses in nats per image."""
        if "router" not in state.optimizers:
            raise ValueError("adv_moe needs a router: num_experts must be at least 2, got 1")
        images, labels = (x_BCHW, x_BCHW), (y_B, y_B)
        if self.minibatches == "two":
            cut = (len(x_BCHW) + 1) // 2
            images, labels = (x_BCHW[:cut], x_BCHW[cut:]), (y_B[:cut], y_B[cut:])
        experts = self._step_experts(state, images[0], labels[0])
        return experts | self._step_router(state, images[1], labels[1])

    def _step_experts(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        x_adv = state.perturb(self.attack, joint(self.aim, y_B), x_BCHW)
        terms = trades_terms(state, x_BCHW, x_adv, y_B)
        with state.only("experts"):
            return state.minimize(terms, {"natural": 1.0, "robust": self.beta}, "experts")

    def _step_router(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        through = self.router_loss == "trades"  # the loss reaches through the experts
        aim = joint(self.aim, y_B) if through else router_divergence
        x_adv = state.perturb(self.attack, aim, x_BCHW)
        if through:
            terms = trades_terms(state, x_BCHW, x_adv, y_B)
            weights = {"natural": 1.0, "robust": self.beta}
        else:
            terms = pseudo_label_terms(state, x_BCHW, x_adv, y_B)
            weights = {"pseudo_label": self.alpha, "consistency": self.beta}
        with state.only("router"):
            losses = state.minimize(terms, weights, "router")
        return {f"router_{name}": loss for name, loss in losses.items()}


def pseudo_label_terms(state: TrainState, x_BCHW: Tensor, x_adv: Tensor, y_B: Tensor) -> Terms:
    """``CE(r(x), y mod E)`` and ``KL(r(x) || r(x'))``, as in AdvMoE's released code.

    A mixed image goes to the expert of the class that shows most. Labels of experts are not
    smoothed: ``label_smoothing`` is about what an image shows.
    """

    def terms() -> dict[str, Tensor]:
        clean, moved = state.model.router_scores(x_BCHW), state.model.router_scores(x_adv)
        state.watch("router scores", moved.abs().amax())
        home_B = dominant(y_B) % state.model.num_experts  # the expert that each class is sent to
        return {
            "pseudo_label": cross_entropy_per_image(clean, home_B).mean(),
            "consistency": kl(clean, moved),
        }

    return terms
