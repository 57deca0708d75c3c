"""AutoAttack on the mixture and on its masked twin: what sparse layers save an evaluator."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moe.fold_batchnorm import fold
from moe.network import Network
from moe.routing import Routed
from pipeline.attacks.pgd import PGD
from pipeline.bench.inference import MASKED as SLOW
from pipeline.bench.inference import OURS as FAST
from pipeline.bench.inference import channels_last, inference, relaid
from pipeline.bench.masked import masked
from pipeline.bench.race import Benchmark, RaceResult, Variant, race
from pipeline.bench.settings import Settings, settle
from pipeline.measures import AutoAttack
from pipeline.measures.auto_attack import QUERIES, STEPS
from pipeline.measures.base import Attacked, is_correct
from pipeline.measures.gradient_attack import AutoPGD
from pipeline.optimization.losses import margin_per_image
from pipeline.seeding import ImageNoise

OURS, MASKED = "AutoAttack, ours", "AutoAttack, masked"
COUNTED = 4  # steps of APGD that warm up and are counted in place of the whole attack


class Plain(nn.Module):
    """A network that gets its images in the plain layout, as the masked one does elsewhere.

    Frozen, and with the true gradient of its hard gates, as ``fold`` makes ours.
    """

    def __init__(self, model: Network):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.gate_gradient = False

    def forward(self, x_BCHW: Tensor) -> Routed:
        routed: Routed = self.model(x_BCHW.contiguous())
        return routed


def autoattack(settings: Settings) -> Benchmark:
    """Run AutoAttack's four attacks on the images ``attacked``; about half of them stay correct.

    The labels are the network's own answers, and the radius is the median, over the images, of
    ``margin / |gradient of the margin|_1``, at which a linear network would lose every second one:
    so all four attacks have images to work on, whatever the weights.
    """
    x_BCHW, _ = settings.images()
    mixture = settle(settings.mixture(), x_BCHW)
    slow, fast = Plain(masked(mixture)), fold(relaid(mixture))
    x_ACHW = channels_last(replace(settings, batch=settings.attacked).images()[0])
    with torch.no_grad():
        y_A = fast(x_ACHW).logits.argmax(1)
    threat = PGD(eps=median_radius(fast, x_ACHW, y_A))
    steps, queries = (max(1, round(n * settings.attack_share)) for n in (STEPS, QUERIES))
    whole, found = AutoAttack(attack=threat, steps=steps, queries=queries), dict[str, Attacked]()

    def attack(name: str, model: nn.Module) -> Variant:
        noise = ImageNoise(0, torch.arange(len(x_ACHW)))

        def work() -> None:
            found[name] = whole(model, x_ACHW, y_A, noise)  # type: ignore[arg-type]

        def trial() -> None:
            few = AutoPGD(attack=replace(threat, steps=COUNTED))
            few(model, x_ACHW, y_A, noise)  # type: ignore[arg-type]

        return Variant(work, trial=trial)

    def compare(outcome: RaceResult) -> list[str]:
        plain = inference(settings)
        pair = {name: plain.variants[name] for name in (FAST, SLOW)}
        calm = race(replace(plain, variants=pair), settings.rounds, lambda _: None)
        gmac = outcome.gmac[MASKED] / outcome.gmac[OURS]
        return [
            f"masked over ours: AutoAttack {outcome.speedup(OURS, MASKED):.2f}, inference on "
            f"{settings.batch} images {calm.speedup(FAST, SLOW):.2f}, "
            f"multiply-accumulates {gmac:.2f}"
        ]

    def notes() -> list[str]:
        (robust, x_ours), (other, x_twin) = found[OURS], found[MASKED]
        alike = [alike_on(slow, x_ours, y_A, robust), alike_on(fast, x_twin, y_A, other)]
        return [
            f"{int(robust.sum())} of {len(robust)} robust on ours, {int(other.sum())} on "
            f"the masked twin; the same outcome: {int((robust == other).sum())} of {len(robust)}",
            f"attacked images on the other network: {sum(alike)} of {2 * len(robust)} alike",
        ]

    return Benchmark(
        title=f"AutoAttack on {len(x_ACHW)} images, {settings.attack_share:.0%} of the standard "
        f"version's {STEPS} steps and {QUERIES:,} queries, L-inf, eps {255 * threat.eps:.3g}/255 "
        f"(GMAC: of {COUNTED} steps of APGD)",
        variants={OURS: attack(OURS, fast), MASKED: attack(MASKED, slow)},
        notes=notes,
        compare=compare,
    )


def alike_on(model: nn.Module, x_adv: Tensor, y_B: Tensor, correct_B: Tensor) -> int:
    """Count the attacked images that another network answers as the attacked one did."""
    return int((is_correct(model, x_adv, y_B) == correct_B).sum())  # type: ignore[arg-type]


def median_radius(model: Network, x_BCHW: Tensor, y_B: Tensor) -> float:
    """Estimate the L-inf radius at which every second image falls, to first order."""
    x = x_BCHW.detach().clone().requires_grad_()
    height_B = -margin_per_image(model(x).logits, y_B)
    (slope,) = torch.autograd.grad(height_B.sum(), x)
    return float((height_B.detach() / slope.flatten(1).abs().sum(1)).median())
