"""What the sanity checks look at beside the measures themselves, on a part of the images.

Shapes: B images, K classes, P inner points, CHW channels and sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe.network import Network
from moe.routing import Routed
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, Measure, slope_of
from pipeline.measures.gradient_attack import Clean, WhiteBox
from pipeline.measures.random_queries import Queries
from pipeline.measures.sanity.continuous import Continuous
from pipeline.measures.sanity.faithful import (
    FaithfulLogits,
    FaithfulRouter,
    RouterGradient,
)
from pipeline.measures.threat import Evaluation
from pipeline.optimization.losses import cross_entropy_per_image, margin_per_image

FACTORS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # at 8/255: 0, 1, 2, 4, 6, 8, 12, 16
CURVE_STEPS = 20
UNBOUNDED = 0.5  # in L-inf: every image can become grey
ALONE = 16  # images that are classified one by one
ASCENT = 10  # steps to the attacked images that are looked at twice
CANDIDATES = 8  # corners tried for a planted point
SUCCESS = 2.0  # logit of a planted point

Plain = Callable[..., Measure]
"""Makes the attack under suspicion of its settings, ``attack=``: ``WhiteBox``, but for tests."""


def over_eps(threat: Evaluation, steps: int, make: Plain = WhiteBox) -> dict[str, Measure]:
    """Make the plain attack at several radii, and none; its step scales with the radius."""
    attack = threat.attack(steps)
    made: dict[str, Measure] = {"sa": Clean()}
    for factor in FACTORS:
        own = replace(attack, eps=factor * attack.eps, step_size=factor * attack.step_size)
        made[at_eps(threat, factor)] = make(attack=own)
    return made


def router_probes(attack: PGD) -> dict[str, Measure]:
    """Make the looks at a router's gradients."""
    return {
        "router gradient": RouterGradient(attack=attack),
        "router faithful": FaithfulRouter(attack=attack),
    }


def at_eps(threat: Evaluation, factor: float) -> str:
    """Name a radius, as a part of the threat's."""
    return f"eps {factor * threat.eps:.6g}"


def contrasts(
    threat: Evaluation,
    num_pixels: int,
    *,
    deep: bool,
    make: Plain = WhiteBox,
    routed: bool = False,
) -> dict[str, Measure]:
    """Make the attacks that the checks compare with each other, by name.

    Args:
        num_pixels: Values of one image, for the L2 radius that reaches as far as L-inf 0.5.
        deep: Whether to try four times the steps too, the dearest of them.
        make: Turns settings into the attack under suspicion.
        routed: Whether the model has a router to look at.
    """
    attack, steps = threat.attack(threat.steps), threat.steps
    far = UNBOUNDED * (1.0 if threat.norm == "linf" else math.sqrt(num_pixels))
    still = replace(attack, step_size=0.0, steps=1, restarts=10, start="uniform")
    single = replace(attack, step_size=attack.eps, steps=1, start="clean")
    counts = sorted({max(1, steps // 5), steps, *([4 * steps] if deep else [])})
    return {
        **{f"steps {count}": make(attack=replace(attack, steps=count)) for count in counts},
        "single": make(attack=single),
        "noise": WhiteBox(attack=still),  # a step of zero: ten starts, each judged
        "unbounded": make(attack=replace(attack, eps=far, step_size=far / 10)),
        "gradients": Gradient(),
        "faithful": FaithfulLogits(attack=attack),
        "continuous": Continuous(attack=attack),
        "queries": Queries(attack=attack),
        **(router_probes(attack) if routed else {}),
    }


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Whether the input gradient of the cross-entropy is finite, and not zero everywhere."""

    attack: PGD = PGD()

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        def loss(x: Tensor) -> Tensor:
            return cross_entropy_per_image(model(x).logits, y_B)

        rows_BD = slope_of(loss, x_BCHW).flatten(1)
        return Attacked(rows_BD.isfinite().all(1) & rows_BD.ne(0).any(1), x_BCHW)


class _Readout(nn.Module):
    """A model of two classes, ``(0, w z + b)`` on the logits z of another."""

    def __init__(self, model: Network, w_K: Tensor, bias: Tensor):
        super().__init__()
        self.model, self.w_K, self.bias = model, w_K, bias

    def forward(self, x_BCHW: Tensor) -> Routed:
        logits_BK, router, route, _ = self.model(x_BCHW)
        height_B = logits_BK.to(self.w_K) @ self.w_K + self.bias
        return Routed(torch.stack([torch.zeros_like(height_B), height_B], 1), router, route)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Whether the attack finds a point that is known to be there: stands where it does not.

    The binarization test (Zimmermann et al., NeurIPS 2022, arXiv:2206.13991), made light: for each
    image a readout of two classes has one corner of the ball on the far side, the image and random
    points of the ball on this side, so an attack that searches the ball has to cross. Simplified:
    the readout sits on the logits and not on the features below them, is a regularized Fisher
    discriminant and not a trained layer, has one planted point and as many inner points as there
    are classes (10 at most), and stands half way between the planted point and the highest inner
    one. An image without a corner that can be told apart in 8 tries counts as found.

    Attributes:
        attack: Its settings; the start is its own.
        make: Turns settings into the attack under suspicion.
    """

    attack: PGD = PGD(steps=50)
    make: Plain = WhiteBox

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        measure, zero_1 = self.make(attack=self.attack), y_B.new_zeros(1)
        missed_B, x_adv = torch.zeros_like(y_B, dtype=torch.bool), x_BCHW.clone()
        draws: list[Tensor] = []
        readouts = list(self._plant(model, x_BCHW, noise))
        for row, readout in enumerate(readouts):  # one by one: each has a model of its own
            if readout is not None:
                one, own = slice(row, row + 1), _Row(noise, x_BCHW, row, draws)
                outcome = measure(readout, x_BCHW[one], zero_1, own)  # type: ignore[arg-type]
                missed_B[one], x_adv[one] = outcome.correct_B, outcome.x_adv
        return Attacked(missed_B, x_adv)

    def _plant(self, model: Network, x_BCHW: Tensor, noise: Draw) -> Iterator[_Readout | None]:
        """Make each image's readout; None where no corner stands out."""
        inside = replace(self.attack, start="uniform", eps=0.9 * self.attack.eps)
        with torch.no_grad():
            clean_BK = model(x_BCHW).logits.double()
            inner = [clean_BK]
            for _ in range(min(clean_BK.shape[1], 10) - 1):
                inner.append(model(inside.begin(x_BCHW, noise)).logits.double())
            corners = [
                model(self._corner(x_BCHW, noise)).logits.double() for _ in range(CANDIDATES)
            ]
        inner_BPK, corner_BCK = torch.stack(inner, 1), torch.stack(corners, 1)
        for inner_PK, corner_CK in zip(inner_BPK, corner_BCK, strict=True):
            tried = (separate(inner_PK, z_K) for z_K in corner_CK)
            w_K, bias, margin = max(tried, key=lambda found: found[2])
            yield _Readout(model, w_K.float(), bias.float()) if margin > 0 else None

    def _corner(self, x_BCHW: Tensor, noise: Draw) -> Tensor:
        step = noise.normal(x_BCHW)
        if self.attack.norm == "linf":
            return self.attack.project(x_BCHW + self.attack.eps * step.sign(), x_BCHW)
        return self.attack.project(x_BCHW + 1e6 * step, x_BCHW)  # onto the sphere


@dataclass
class _Row:
    """The random numbers of one image of a batch: those it would get in any other batch.

    Rows share ``draws``, the batch's numbers so far; each counts for itself.
    """

    noise: Draw
    x_BCHW: Tensor
    row: int
    draws: list[Tensor]
    taken: int = 0

    def uniform(self, _: Tensor) -> Tensor:
        """Numbers in [-1, 1), for one image."""
        return self._take(self.noise.uniform)

    def normal(self, _: Tensor) -> Tensor:
        """Standard normal numbers, for one image."""
        return self._take(self.noise.normal)

    def _take(self, draw: Callable[[Tensor], Tensor]) -> Tensor:
        if self.taken == len(self.draws):
            self.draws.append(draw(self.x_BCHW))
        self.taken += 1
        return self.draws[self.taken - 1][self.row : self.row + 1]


def separate(inner_PK: Tensor, planted_K: Tensor) -> tuple[Tensor, Tensor, float]:
    """Find ``w z + b`` that is ``SUCCESS`` at a planted point and below 0 at all inner ones.

    ``w ~ (S + l I)^-1 (z - mean)``, S the scatter of the inner points.

    Returns:
        w, b, and the margin left before scaling, not positive where no plane was found.
    """
    mean_K = inner_PK.mean(0)
    deviation_PK = inner_PK - mean_K
    scatter_KK = deviation_PK.T @ deviation_PK
    away_K = planted_K - mean_K
    ridge = 1e-3 * scatter_KK.trace() / len(mean_K) + 1e-12 * away_K.square().sum() + 1e-30
    w_K = torch.linalg.solve(scatter_KK + ridge * torch.eye(len(mean_K)).to(scatter_KK), away_K)
    inner, planted = (inner_PK @ w_K).max(), planted_K @ w_K
    half = (planted - inner) / 2
    if not half > 0:
        return w_K, -planted, 0.0
    scale = SUCCESS / half
    return scale * w_K, -scale * (planted + inner) / 2, float(half / w_K.norm())


@dataclass(frozen=True)
class Facts:
    """What a model does with the same images twice.

    Attributes:
        repeat: Largest difference between the logits of four passes over the same batch, in
            standard deviations of the logits.
        batch: The same between the images in a batch, in another order, and alone.
        flipped: Images whose class is another one alone or in another order.
        probability: Largest distance of a row of outputs from a distribution: how far its sum is
            from 1, or a value outside [0, 1].
    """

    repeat: float
    batch: float
    flipped: int
    probability: float


def facts_around(model: Network, x_BCHW: Tensor, y_B: Tensor, attack: PGD) -> Facts:
    """Look at a frozen model's outputs on images and on the same images attacked.

    A defence that throws dice for attacked images alone passes on the clean ones. Of the two the
    larger difference counts; whether outputs are probabilities is told from the clean images.
    """

    def height(x: Tensor) -> Tensor:
        return margin_per_image(model(x).logits, y_B) + 0 * x.flatten(1).sum(1)

    moved = attack.ascend(height, x_BCHW, x_BCHW, steps=ASCENT)
    clean, attacked = facts(model, x_BCHW), facts(model, moved)
    return Facts(
        max(clean.repeat, attacked.repeat),
        max(clean.batch, attacked.batch),
        max(clean.flipped, attacked.flipped),
        clean.probability,
    )


def facts(model: Network, x_BCHW: Tensor) -> Facts:
    """Look at a frozen model's outputs on some images."""
    with torch.no_grad():
        first, *again = (model(x_BCHW) for _ in range(4))
        order_B = torch.arange(len(x_BCHW)).flip(0).roll(len(x_BCHW) // 3)
        back_B = order_B.argsort()
        moved_BK = model(x_BCHW[order_B]).logits[back_B]
        few = x_BCHW[:ALONE]
        alone_BK = torch.cat([model(few[row : row + 1]).logits for row in range(len(few))])
    z_BK = first.logits
    scale = z_BK.std().clamp(min=1e-12)
    repeat = max(float((z_BK - other.logits).abs().amax() / scale) for other in again)
    if any(not torch.equal(first.route, other.route) for other in again):
        repeat = max(repeat, 1.0)
    pairs = [(z_BK, moved_BK), (z_BK[:ALONE], alone_BK)]
    batch = max(float((a - b).abs().amax() / scale) for a, b in pairs)
    flipped = max(int((a.argmax(1) != b.argmax(1)).sum()) for a, b in pairs)
    outside = torch.maximum(-z_BK.amin(), z_BK.amax() - 1).clamp(min=0)
    off = (z_BK.sum(1) - 1).abs().amax()
    return Facts(repeat, batch, flipped, float(torch.maximum(outside, off)))
