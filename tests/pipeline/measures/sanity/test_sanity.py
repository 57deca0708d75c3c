"""Each sanity check against a defence, or an attack, that is broken in just its way.

Every broken thing has a healthy twin, which passes all checks. Networks are linear, so that what
the attacks should find is known.

Shapes: N images, B images of a batch, K classes (4), E experts, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from moe.fold_batchnorm import fold
from moe.network import Network
from moe.routing import Routing
from pipeline.attacks.pgd import PGD, Draw
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.measures import MEASURES, PACKAGED, Evaluation, Measure
from pipeline.measures.base import Attacked, Role, break_images, is_correct, role_of
from pipeline.measures.forced_route import ForcedRoute
from pipeline.measures.gradient_attack import Clean, WhiteBox
from pipeline.measures.noise_and_transfer import Transfer
from pipeline.measures.runner import judge
from pipeline.measures.sanity import checks
from pipeline.measures.sanity.checks import Evidence, exceeds
from pipeline.measures.sanity.leaderboard import REFERENCES, reference
from pipeline.measures.sanity.probe_attacks import (
    Facts,
    Plain,
    Planted,
    contrasts,
    facts,
    over_eps,
    separate,
)
from pipeline.measures.sanity.verdict import CHECKS, Verdict, decide
from pipeline.measures.tiers import TIERS, measures_of
from pipeline.optimization.losses import cross_entropy_per_image, margin_per_image
from pipeline.seeding import ImageNoise
from tests.helpers import analytic

CPU, SIZE, CLASSES, COUNT = torch.device("cpu"), 4, 4, 128
PIXELS = 3 * SIZE * SIZE
EPS = 0.03
THREAT = Evaluation(eps=EPS, step_size=EPS / 5, steps=20)

# Defences


class Linear(nn.Module):
    """Logits ``scale * W x``; the subclasses break something."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w_KD = nn.Parameter(torch.randn(CLASSES, PIXELS, generator=generator))
        self.scale = scale

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        return self.scale * (x_BCHW.flatten(1) - 0.5) @ self.w_KD.T


class Probabilities(Linear):
    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        return super().forward(x_BCHW, routing).softmax(1)


class BatchCoupled(Linear):
    """Centres its logits over the batch, as a BatchNorm in training mode does."""

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        logits_BK = super().forward(x_BCHW, routing)
        return logits_BK - logits_BK.mean(0)


class NotANumber(Linear):
    """Adds a root at zero: nothing forward, NaN backward."""

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        zero_B1 = (x_BCHW - x_BCHW.detach()).flatten(1).sum(1, keepdim=True)
        return super().forward(x_BCHW, routing) + zero_B1.square().sqrt()


class Shattered(Linear):
    """Hides three quarters of the pixels from the gradient, and from nothing else."""

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        seen_D = torch.arange(PIXELS) % 4 == 0
        x_BD = x_BCHW.flatten(1)
        x_BD = torch.where(seen_D, x_BD, x_BD.detach())
        return super().forward(x_BD.view_as(x_BCHW), routing)


class TwoExperts(Linear):
    """Expert 1 says what expert 0 says, a little louder."""

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        assert routing.shared is not None
        counts = torch.tensor(routing.shared.counts)
        expert_B1 = torch.repeat_interleave(torch.arange(2), counts)[:, None]
        return super().forward(x_BCHW, routing) * (1 + 0.1 * expert_B1)


class Dice(nn.Module):
    """A router by brightness, with noise on its scores."""

    def __init__(self, noise: float):
        super().__init__()
        self.noise = noise

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height_B = (x_BCHW - 0.5).mean((1, 2, 3))
        height_B = height_B + self.noise * torch.randn(len(x_BCHW))
        return torch.stack([-height_B, height_B], 1)


def network(body: nn.Module, router: nn.Module | None = None) -> Network:
    experts = 1 if router is None else 2
    return Network(body, router, normalize=nn.Identity(), num_experts=experts).eval()  # type: ignore[arg-type]


def images() -> Images:
    """Images that the linear network classifies right, but for every sixteenth."""
    generator = torch.Generator().manual_seed(1)
    x_NCHW = 0.2 + 0.6 * torch.rand(COUNT, 3, SIZE, SIZE, generator=generator)
    pixels_NCHW = (255 * x_NCHW).round().to(torch.uint8)
    with torch.no_grad():
        labels_N = network(Linear())(to_float(pixels_NCHW)).logits.argmax(1)
    labels_N[::16] = (labels_N[::16] + 1) % CLASSES
    return Images(pixels_NCHW, labels_N)


# Attacks


def plain(attack: PGD) -> Measure:
    return WhiteBox(attack=attack)


@dataclass(frozen=True)
class Turned:
    """PGD with its sign turned."""

    attack: PGD

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        def objective(x: Tensor, index: Tensor) -> Tensor:
            return -cross_entropy_per_image(model(x).logits, y_B[index])

        before = Clean()(model, x_BCHW, y_B, noise)
        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)


@dataclass(frozen=True)
class Cached:
    """PGD with the gradients of another network than the one under attack."""

    attack: PGD

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        other = network(Linear())
        with torch.no_grad():
            own_B = other(x_BCHW).logits.argmax(1)

        def objective(x: Tensor, index: Tensor) -> Tensor:
            return cross_entropy_per_image(other(x).logits, own_B[index])

        before = Clean()(model, x_BCHW, y_B, noise)
        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)


@dataclass(frozen=True)
class Search:
    """A black box: tries another corner pixel by pixel, and keeps what lowers the margin."""

    role: ClassVar[Role] = "black_box"
    attack: PGD

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        best, eps = x_BCHW.clone(), self.attack.eps
        with torch.no_grad():
            for pixel in range(PIXELS):
                for sign in (-1, 1):
                    tried = best.flatten(1).clone()
                    tried[:, pixel] = (x_BCHW.flatten(1)[:, pixel] + sign * eps).clamp(0, 1)
                    moved = tried.view_as(best)
                    up_B = margin_per_image(model(moved).logits, y_B) > margin_per_image(
                        model(best).logits, y_B
                    )
                    best = torch.where(up_B.view(-1, 1, 1, 1), moved, best)
        return Attacked(is_correct(model, best, y_B) & is_correct(model, x_BCHW, y_B), best)


def only_where(wrong: Callable[[PGD], bool], broken: Plain) -> Plain:
    """Break the attack under some settings only."""
    return lambda attack: broken(attack) if wrong(attack) else plain(attack)


def with_radius(change: Callable[[float], float]) -> Plain:
    """Read the radius in a wrong unit; the step goes with it."""

    def make(attack: PGD) -> Measure:
        factor = change(attack.eps) / attack.eps if attack.eps else 1.0
        eps = change(attack.eps)
        return plain(replace(attack, eps=eps, step_size=max(factor * attack.step_size, eps / 5)))

    return make


def without_start(attack: PGD) -> Measure:
    """Begin at the image: pixels without a gradient stay where they are."""
    return plain(replace(attack, start="clean"))


# Evidence


def evidence(
    model: Network,
    split: Images,
    make: Plain = plain,
    threat: Evaluation = THREAT,
    more: Mapping[str, Measure] | None = None,
    classes: int = CLASSES,
) -> Evidence:
    """Everything that the checks can look at, small."""

    def outcome(measures: Mapping[str, Measure], count: int = COUNT) -> Any:
        rows = torch.arange(min(count, len(split)))
        return judge(model, split.pick(rows), measures, seed=0, device=CPU)

    attack = threat.attack(threat.steps)
    main = outcome({"sa": Clean(), f"ra_pgd{threat.steps}": make(attack), **(more or {})})
    pixels = split.pixels_NCHW[0].numel()
    return Evidence(
        threat=threat,
        num_classes=classes,
        correct=main.whole,
        worst_N=main.worst,
        outcomes=main.outcomes,
        probes={
            **outcome(over_eps(threat, 20, make)).correct,
            **outcome(
                contrasts(threat, pixels, deep=True, make=make, routed=model.num_experts > 1)
            ).correct,
        },
        probed_M=torch.arange(len(split)),
        roles={name: role_of(measure) for name, measure in (more or {}).items()},
        planted=outcome({"planted": Planted(attack=attack, make=make)}, 16).correct["planted"],
        facts=facts(fold(model), to_float(split.pixels_NCHW[:32])),
    )


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if check.status == "fail"}


BROKEN: dict[str, tuple[str, Network, Plain]] = {
    "probabilities as output": ("logits", network(Probabilities()), plain),
    "a stochastic gate": ("deterministic", network(TwoExperts(), Dice(0.3)), plain),
    "a network coupled over the batch": ("batch", network(BatchCoupled()), plain),
    "saturated logits": ("gradients", network(Linear(1e5)), plain),
    "gradients that are not finite": ("gradients", network(NotANumber()), plain),
    "eps in units of a deviation of 0.25": (
        "in_ball",
        network(Linear()),
        with_radius(lambda eps: min(4 * eps, 1.0)),
    ),
    "eps never below 2/255": (
        "eps_zero",
        network(Linear()),
        with_radius(lambda e: max(e, 2 / 255)),
    ),
    "iterations that undo the first step": (
        "single_step",
        network(Linear()),
        only_where(lambda attack: attack.steps > 1, Turned),
    ),
    "an attack with its sign turned": ("noise", network(Linear()), Turned),
    "eps divided by 255 twice": ("noise", network(Linear()), with_radius(lambda eps: eps / 255)),
    "sign turned at one radius": (
        "falls_with_eps",
        network(Linear()),
        only_where(lambda attack: abs(attack.eps - 0.75 * EPS) < 1e-9, Turned),
    ),
    "sign turned in the longest attack": (
        "falls_with_steps",
        network(Linear()),
        only_where(lambda attack: attack.steps == 80, Turned),
    ),
    "steps too short to cross the ball": (
        "converged",
        network(Linear()),
        lambda attack: plain(replace(attack, step_size=attack.eps / 40, start="clean")),
    ),
    "large eps taken for 255ths": (
        "unbounded",
        network(Linear()),
        with_radius(lambda eps: eps / 255 if eps > 0.2 else eps),
    ),
    "gradients of another network": ("planted", network(Linear()), Cached),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_fails_its_own_check_and_no_other(name: str) -> None:
    check, model, make = BROKEN[name]
    verdict = decide(evidence(model, images(), make))
    assert failed(verdict) == {check}, verdict.text
    assert verdict.status == verdict.worst == "unreliable"
    assert verdict.text.startswith(f"unreliable: {check}: ")


@pytest.mark.parametrize(
    "model", [network(Linear()), network(TwoExperts(), Dice(0.0))], ids=["dense", "two experts"]
)
def test_healthy_twin_passes_every_check(model: Network) -> None:
    more = {
        "ra_square": Search(THREAT.attack(1)),
        "ra_forced": ForcedRoute(attack=THREAT.attack(20)),
    }
    seen = evidence(model, images(), more=more)
    assert 0.1 < seen.correct["ra_pgd20"].float().mean() < 0.8, "some stand and some do not"
    verdict = decide(seen)
    assert verdict.text == "reliable"
    statuses = {check.name: check.status for check in verdict.checks}
    assert statuses.pop("plausible") == "none", "no public number for this"
    if model.num_experts == 1:
        assert statuses.pop("router_gradient") == statuses.pop("router_faithful") == "none"
    assert set(statuses.values()) == {"pass"}


def test_wins_of_a_black_box_are_told_by_its_role_and_not_its_name() -> None:
    """Images made on a half of a dual model are a transfer under any name, and hide no wins."""
    hidden = torch.arange(COUNT) < COUNT // 2
    correct = {"ra_pgd20": torch.ones(COUNT, dtype=torch.bool), "ra_made_up": hidden}
    correct["ra_square"] = hidden
    roles = {"ra_pgd20": "white_box", "ra_made_up": "transfer", "ra_square": "black_box"}
    seen = checks.black_box(Evidence(THREAT, CLASSES, correct, roles=roles))  # type: ignore[arg-type]
    assert seen is not None
    assert not seen.ok
    blind = dict(roles, ra_made_up="white_box")
    seen = checks.black_box(Evidence(THREAT, CLASSES, correct, roles=blind))  # type: ignore[arg-type]
    assert seen is not None
    assert seen.ok, "the twin: taken for a white box, it hides what Square wins"
    made = measures_of(MEASURES, THREAT, num_experts=2)
    told = {name: role_of(measure) for name, measure in made.items()}
    assert {n for n, role in told.items() if role == "black_box"} == {
        *("ra_square", "ra_queries", "ra_noise")
    }
    assert Transfer.role == "transfer"


def test_gradient_that_sees_a_quarter_of_the_pixels_does_not_say_what_happens() -> None:
    """A black box wins over it, and counts into the worst case: the gap is told as well."""
    more = {"ra_square": Search(THREAT.attack(1))}
    for body, wanted in ((Linear(), set()), (Shattered(), {"faithful", "gap"})):
        seen = evidence(network(body), images(), without_start, more=more)
        verdict = decide(seen)
        assert failed(verdict) == wanted
        assert verdict.worst == ("unreliable" if wanted else "reliable")
        assert failed(decide(replace(seen, worst_N=None))) == wanted - {"gap"}
        unseen = {name: hits for name, hits in seen.probes.items() if name != "faithful"}
        assert failed(decide(replace(seen, probes=unseen))) == (wanted and {"black_box", "gap"})


def test_route_that_hides_the_gradient_fails_the_gap_alone() -> None:
    model, split = analytic.route_flip(), analytic.route_flip_images(32)
    for eps, wanted in ((analytic.EPS["linf"], {"gap"}), (0.05, set())):
        threat = Evaluation(eps=eps, step_size=eps / 4, steps=20)
        more = {"ra_forced": ForcedRoute(attack=threat.attack(20))}
        seen = evidence(model, split, threat=threat, more=more)
        verdict = decide(seen)
        assert failed(verdict) == wanted, verdict.text
        assert verdict.worst == "reliable", "the number to quote is the worst case"
    assert seen.worst_N is not None
    assert seen.worst_N.all(), "within 0.05 the router cannot be reached"


def test_verdict_says_which_number_flatters_and_which_attack_shows_it() -> None:
    threat = Evaluation(eps=0.1, step_size=0.025, steps=20)
    more = {"ra_forced": ForcedRoute(attack=threat.attack(20))}
    split = analytic.route_flip_images(32)
    text = decide(evidence(analytic.route_flip(), split, threat=threat, more=more)).text
    assert text.startswith(
        "optimistic: 100.0 points; gap: ra_pgd20 100.0% is 100.0 points above the worst case"
    )
    assert "quote ra_worst; what ra_pgd20 leaves is broken by ra_forced (32 images)" in text


def test_standard_tier_finds_nothing_standing_where_plain_pgd_finds_all() -> None:
    """The mixture whose true robust accuracy is 0, under the attacks of the tier, small."""
    threat = Evaluation(eps=0.1, step_size=0.025, steps=20)
    names = [
        n for n in TIERS["standard"].measures if n not in PACKAGED or find_spec("pyautoattack")
    ]
    split, model = analytic.route_flip_images(8), analytic.route_flip()
    more = measures_of(names, threat, num_experts=2)
    seen = evidence(model, split, threat=threat, more=more)
    assert seen.correct["ra_pgd20"].all()
    assert seen.correct["ra_apgd"].all()
    assert seen.worst_N is not None
    assert not seen.worst_N.any()
    verdict = decide(seen)
    assert verdict.status == "optimistic"
    assert "quote ra_worst" in verdict.why


# The pieces


def stands(hits: int, n: int = 1000) -> Tensor:
    return torch.arange(n) < hits


def test_result_above_the_best_public_one_is_implausible_until_the_full_tier() -> None:
    row = reference("cifar10", "resnet18", norm="linf", eps=8 / 255)
    assert row is not None
    assert row.robust == 52.48
    probes = dict.fromkeys("gradients faithful noise single queries".split(), stands(500, 500))
    probes |= dict.fromkeys(("steps 50",), stands(0, 500))
    probes |= dict.fromkeys(("noise", "single", "queries"), stands(500, 500))
    sound = Facts(repeat=0.0, batch=0.0, flipped=0, probability=9.0)
    rows = torch.arange(500)
    whole = Evidence(Evaluation(), 10, {}, probes=probes, facts=sound, probed_M=rows)
    for hits, tier, status in (
        (540, "standard", "reliable"),  # within 2 points
        (570, "standard", "reliable"),  # above, and the interval of 1,000 images reaches down
        (600, "standard", "implausible"),
        (600, "full", "reliable"),
    ):
        correct = {"sa": stands(900), "ra_pgd50": stands(hits)}
        seen = replace(whole, correct=correct, worst_N=stands(hits), reference=row, tier=tier)
        assert decide(seen).status == status, (hits, tier)


def test_references_hold_for_their_threat_and_for_smaller_nets() -> None:
    found = reference("cifar10", "small", norm="linf", eps=8 / 255)
    assert found is not None
    assert found.robust == 55.85, "no net of its own size: the best without other data"
    with_data = reference("cifar10", "resnet18", norm="linf", eps=8 / 255, synthetic_data=True)
    assert with_data is not None
    assert with_data.robust == 58.50
    assert reference("cifar10", "resnet18", norm="linf", eps=4 / 255) is None
    assert reference("cifar10", "resnet18", norm="l2", eps=0.5) is None
    assert reference("digits", "small", norm="linf", eps=0.1) is None
    assert len({row[:3] for row in REFERENCES}) == len(REFERENCES)


def test_a_difference_counts_from_three_images_on_and_beyond_its_bound() -> None:
    assert not exceeds(2, 10, 0.1), "a fifth of ten images, and yet noise"
    assert exceeds(3, 10, 0.1)
    assert not exceeds(5, 1000, 0.5)
    assert exceeds(6, 1000, 0.5)


def test_check_is_skipped_where_one_it_presupposes_failed_and_says_what_it_saw() -> None:
    verdict = decide(evidence(network(Linear()), images(), Turned))
    skipped = {c.name: c.words for c in verdict.checks if c.status == "skip"}
    assert {"unbounded", "converged", "planted"} <= skipped.keys()
    assert skipped["unbounded"].startswith("presupposes noise, which failed; saw: RA at eps=0.5")


def test_presupposed_checks_stand_before_those_that_presuppose_them() -> None:
    names = list(CHECKS)
    for name, (_, needs) in CHECKS.items():
        assert all(names.index(need) < names.index(name) for need in needs)


def test_nothing_is_reliable_that_was_not_looked_at() -> None:
    for correct in ({"sa": stands(900)}, {"sa": stands(900), "ra_noise": stands(800)}):
        verdict = decide(Evidence(Evaluation(), 10, correct))
        assert verdict.status == verdict.worst == "unchecked"
        assert verdict.text.startswith("unchecked: not looked at: logits, deterministic, batch, ")
        assert {check.status for check in verdict.checks} == {"none"}


def test_worst_case_needs_a_black_box_and_the_plain_number_does_not() -> None:
    seen = evidence(network(Linear()), images())
    assert decide(seen).worst == decide(seen).status == "reliable"
    without = {name: hits for name, hits in seen.probes.items() if name != "queries"}
    verdict = decide(replace(seen, probes=without))
    assert (verdict.status, verdict.worst) == ("reliable", "unchecked")


def test_planted_point_is_alone_on_its_side_of_the_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        inner_PK = torch.randn(4, 4, generator=generator).double()
        planted_K = 3 * torch.randn(4, generator=generator).double()
        w_K, bias, margin = separate(inner_PK, planted_K)
        if margin > 0:
            assert float(planted_K @ w_K + bias) == pytest.approx(2.0)
            assert (inner_PK @ w_K + bias).max() < 0
    line_PK = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double()
    assert separate(line_PK, torch.tensor([0.0, 0.0]).double())[2] == 0.0, "between the others"


def test_planted_points_do_not_depend_on_the_rest_of_the_batch() -> None:
    split, model = images(), fold(network(Linear()))
    x_BCHW, y_B = to_float(split.pixels_NCHW[:6]), split.labels_N[:6]
    planted = Planted(attack=replace(THREAT.attack(3), step_size=EPS / 30), make=Cached)
    whole = planted(model, x_BCHW, y_B, ImageNoise(0, torch.arange(6)))
    parts = [
        planted(model, x_BCHW[rows], y_B[rows], ImageNoise(0, torch.arange(6)[rows]))
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(whole.correct_B, torch.cat([part.correct_B for part in parts]))
    torch.testing.assert_close(whole.x_adv, torch.cat([part.x_adv for part in parts]))


def test_planted_points_are_found_in_l2_too() -> None:
    split = images()
    attack = PGD(eps=0.3, step_size=0.05, steps=20, norm="l2")
    few = split.pick(torch.arange(16))
    found = judge(network(Linear()), few, {"p": Planted(attack=attack)}, seed=0, device=CPU)
    assert not found.correct["p"].any()
    assert WhiteBox(attack=attack).attack.norm == "l2"
