"""AdvMoE: robust training that alternates between experts and router.

Shapes: B images, E experts, CHW channels and sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe.valid_fields import CheckedFields, NonNegative, UpToOne
from pipeline.algorithms.attack_objectives import AimKind, joint, router_divergence
from pipeline.algorithms.forced_routes import draw_routes
from pipeline.algorithms.homes import Homes, home_of
from pipeline.algorithms.trades import trades_terms
from pipeline.attacks import Attack
from pipeline.attacks.pgd import PGD
from pipeline.optimization.losses import cross_entropy_per_image, dominant, kl
from pipeline.optimization.state import Terms, TrainState


@dataclass(frozen=True, kw_only=True)
class AdvMoE(CheckedFields):
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
        homes: Which expert is the pseudo label of a class. ``mod``: ``y mod E`` (released code).
            ``superclass``: fixed groups of classes that look alike, see
            ``pipeline.algorithms.homes``; a router learns them more robustly (router of ``small``
            alone on the CIFAR-10 subset, 4 epochs, PGD-20, two seeds: robust accuracy 0.71 and
            0.70 for animals against vehicles, 0.54 and 0.52 for ``y mod 2``).
        forced_routes: Share of attacked images, drawn again in each update, that take an expert
            drawn at random in place of the router's choice, in the attack and in the experts'
            loss: training against an attacker who may set the route, at no further cost. Each
            expert also learns from images that are not its own.
        attack: How x' is found; 2 steps of 5/255 in the released code.

    Raises:
        ValueError: A setting is out of its range.
    """

    beta: NonNegative = 6.0
    alpha: NonNegative = 6.0
    router_loss: Literal["trades", "pseudo_label"] = "trades"
    minibatches: Literal["one", "two"] = "one"
    aim: AimKind = "kl"
    homes: Homes = "mod"
    forced_routes: UpToOne = 0.0
    attack: Attack = PGD(step_size=5 / 255, steps=2, start="gaussian")

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
        aim, terms_of = joint(self.aim, y_B), trades_terms
        if self.forced_routes:
            forced = draw_routes(state, x_BCHW, self.forced_routes)
            aim, terms_of = forced.aim(self.aim, y_B), forced.terms
        x_adv = state.perturb(self.attack, aim, x_BCHW)
        terms = terms_of(state, x_BCHW, x_adv, y_B)
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
            terms = pseudo_label_terms(state, x_BCHW, x_adv, self._homes(state, y_B))
            weights = {"pseudo_label": self.alpha, "consistency": self.beta}
        with state.only("router"):
            losses = state.minimize(terms, weights, "router")
        return {f"router_{name}": loss for name, loss in losses.items()}

    def _homes(self, state: TrainState, y_B: Tensor) -> Tensor:
        """Experts (B,) that the classes are sent to; a mixed image counts for its largest class."""
        return home_of(self.homes, dominant(y_B), state.class_groups, state.model.num_experts)


def pseudo_label_terms(state: TrainState, x_BCHW: Tensor, x_adv: Tensor, home_B: Tensor) -> Terms:
    """``CE(r(x), home)`` and ``KL(r(x) || r(x'))``, as in AdvMoE's released code.

    Labels of experts are not smoothed: ``label_smoothing`` is about what an image shows.
    """

    def terms() -> dict[str, Tensor]:
        clean, moved = state.model.router_scores(x_BCHW), state.model.router_scores(x_adv)
        state.watch("router scores", moved.abs().amax())
        return {
            "pseudo_label": cross_entropy_per_image(clean, home_B).mean(),
            "consistency": kl(clean, moved),
        }

    return terms
