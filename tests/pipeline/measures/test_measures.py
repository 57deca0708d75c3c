"""Measures on networks whose answer is known in advance.

Shapes: B images, K classes, E experts, CHW channels and sides.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.fold_batchnorm import fold
from moe.network import Network
from moe.routing import Routing
from pipeline.attacks.pgd import PGD
from pipeline.cli.console import describe
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.measures import FLOORS, MEASURES, PACKAGED, Evaluation, runner
from pipeline.measures.base import is_correct
from pipeline.measures.confidence import wilson
from pipeline.measures.forced_route import ForcedRoute
from pipeline.measures.gate_queries import GateQueries
from pipeline.measures.gradient_attack import WhiteBox, WhiteBoxMargin
from pipeline.measures.random_queries import Queries
from pipeline.measures.router_and_experts import ExpertAttack, RouterAttack
from pipeline.measures.runner import Verdicts, judge, suite, summarize
from pipeline.measures.sanity.probe_attacks import FACTORS, over_eps
from pipeline.measures.small_steps import SmallSteps
from pipeline.measures.tiers import measures_of
from pipeline.seeding import ImageNoise

CPU = torch.device("cpu")
EPS = 0.1
STRONG = PGD(eps=EPS, step_size=EPS / 4, steps=25)
# Attacks on the deployed model by our own code; the package's have tests of their own.
OWN = {name: kind for name, kind in MEASURES.items() if name not in ("sa", *FLOORS, *PACKAGED)}


def noise(count: int, seed: int = 0) -> ImageNoise:
    return ImageNoise(seed, torch.arange(count))


def pictures(count: int, seed: int = 0, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def split(model: Network, count: int = 40) -> Images:
    """Images that the model classifies right, but for every fifth."""
    pixels_NCHW = (pictures(count) * 255).round().to(torch.uint8)
    with torch.no_grad():
        labels_N = model(to_float(pixels_NCHW)).logits.argmax(1)
    labels_N[::5] = (labels_N[::5] + 1) % 4
    return Images(pixels_NCHW, labels_N)


# Networks with a known answer


class Threshold(nn.Module):
    """Router scores ``(0, w x - t)``: expert 1 beyond a plane."""

    def __init__(self, w_CHW: Tensor, threshold: float):
        super().__init__()
        self.w_CHW, self.threshold = nn.Parameter(w_CHW), threshold

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height_B = (x_BCHW * self.w_CHW).flatten(1).sum(1) - self.threshold
        return torch.stack([torch.zeros_like(height_B), height_B], 1)


class Constant(nn.Module):
    """Experts that look at nothing: expert e always says class e, of three."""

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        assert routing.shared is not None
        own_BK = nn.functional.one_hot(routing.shared.chosen_B, 3).to(x_BCHW)
        return 5 * own_BK + 0 * x_BCHW.flatten(1).sum(1, keepdim=True)


class Opposite(nn.Module):
    """Two linear experts with logits ``(0, w x - t)`` and ``(0, t - w x)``."""

    def __init__(self, w_CHW: Tensor, threshold: float):
        super().__init__()
        self.head = Threshold(w_CHW, threshold)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        assert routing.shared is not None
        logits_BK: Tensor = self.head(x_BCHW) * (1 - 2 * routing.shared.chosen_B)[:, None]
        return logits_BK


class Plane(nn.Module):
    """A dense body with logits ``(0, w x - t)``."""

    def __init__(self, w_CHW: Tensor, threshold: float):
        super().__init__()
        self.head = Threshold(w_CHW, threshold)

    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        logits_BK: Tensor = self.head(x_BCHW)
        return logits_BK


def gated_constants(w_CHW: Tensor, threshold: float) -> Network:
    router = Threshold(w_CHW, threshold)
    return Network(Constant(), router, normalize=nn.Identity(), num_experts=2).eval()  # type: ignore[arg-type]


def plane(w_CHW: Tensor, threshold: float) -> Network:
    body = Plane(w_CHW, threshold)
    return Network(body, None, normalize=nn.Identity(), num_experts=1).eval()  # type: ignore[arg-type]


def around_plane(gaps: Tensor, w_CHW: Tensor) -> Tensor:
    """Images at L-inf distance ``gaps`` below the plane ``w x = w (0.5, ..., 0.5)``."""
    return 0.5 - gaps[:, None, None, None] * w_CHW.sign()


def direction(size: int = 8) -> Tensor:
    return pictures(1, seed=3, size=size)[0] - 0.5


def test_forced_route_breaks_what_plain_pgd_cannot_see() -> None:
    """Expert 1 is always wrong, the router reaches it within eps, and no logit has a gradient."""
    w_CHW = direction()
    model = gated_constants(w_CHW, float(0.5 * w_CHW.sum()))
    x_BCHW = around_plane(torch.full((16,), 0.6 * EPS), w_CHW)
    y_B = torch.zeros(16, dtype=torch.int64)
    frozen = fold(model)
    for blind in (WhiteBox, WhiteBoxMargin, ExpertAttack):
        assert blind(attack=STRONG)(frozen, x_BCHW, y_B, noise(16)).correct_B.all()
    assert not ForcedRoute(attack=STRONG)(frozen, x_BCHW, y_B, noise(16)).correct_B.any()
    assert not RouterAttack(attack=STRONG)(frozen, x_BCHW, y_B, noise(16)).correct_B.any()


def test_forced_route_needs_the_wrong_expert_within_reach() -> None:
    w_CHW = direction()
    model = gated_constants(w_CHW, float(0.5 * w_CHW.sum()))
    gaps = torch.tensor([0.5, 0.9, 0.99, 1.01, 1.1, 2.0]) * EPS
    x_BCHW, y_B = around_plane(gaps, w_CHW), torch.zeros(6, dtype=torch.int64)
    found = ForcedRoute(attack=STRONG)(fold(model), x_BCHW, y_B, noise(6))
    assert found.correct_B.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_router_attack_flips_a_linear_router_at_its_closed_form_radius(norm: Any) -> None:
    """The gap of ``w x - t`` closes at ``gap / |w|_1`` in L-inf and at ``gap / |w|_2`` in L2."""
    w_CHW = direction()
    threshold = float(0.5 * w_CHW.sum())
    model, x_BCHW = gated_constants(w_CHW, threshold), around_plane(torch.full((4,), 0.05), w_CHW)
    dual = w_CHW.abs().sum() if norm == "linf" else w_CHW.norm()
    radius = float((threshold - (x_BCHW[0] * w_CHW).sum()) / dual)
    for factor, flipped in ((0.97, False), (1.03, True)):
        eps = factor * radius
        attack = PGD(eps=eps, step_size=eps / 8, steps=60, norm=norm)
        y_B = torch.zeros(4, dtype=torch.int64)
        found = RouterAttack(attack=attack)(fold(model), x_BCHW, y_B, noise(4))
        assert bool((model(found.x_adv).route == 1).all()) == flipped
        assert bool((model(found.x_adv).route == 0).any()) != flipped
        assert found.correct_B.tolist() == [not flipped] * 4


def test_expert_attack_goes_on_along_the_clean_route_beyond_the_boundary() -> None:
    """Expert 1 is expert 0 upside down: whoever follows the route turns back at the boundary."""
    w_CHW = direction()
    middle = float(0.5 * w_CHW.sum())
    body = Opposite(w_CHW, middle + float(2 * EPS * w_CHW.abs().sum()))
    model = Network(body, Threshold(w_CHW, middle), normalize=nn.Identity(), num_experts=2).eval()  # type: ignore[arg-type]
    x_BCHW, y_B = around_plane(torch.full((3,), EPS / 2), w_CHW), torch.zeros(3, dtype=torch.int64)
    assert is_correct(model, x_BCHW, y_B).all()
    attack = PGD(eps=EPS, step_size=EPS / 4, steps=9)  # too few to be judged on the way
    found = ExpertAttack(attack=attack)(fold(model), x_BCHW, y_B, noise(3))
    torch.testing.assert_close(found.x_adv, x_BCHW + EPS * w_CHW.sign(), rtol=0, atol=1e-6)
    assert (model(found.x_adv).route == 1).all()


@pytest.mark.parametrize(
    "kind", [kind for name, kind in MEASURES.items() if name not in ("sa", *FLOORS)]
)
def test_misclassified_image_stays_broken_though_its_start_is_classified_right(kind: Any) -> None:
    w_CHW = direction()
    model = plane(w_CHW, float(0.5 * w_CHW.sum()))
    x_BCHW, y_B = around_plane(torch.full((64,), 1e-4), w_CHW), torch.ones(64, dtype=torch.int64)
    assert not is_correct(model, x_BCHW, y_B).any()
    blind = PGD(eps=EPS, step_size=0.0, steps=1)
    assert is_correct(model, blind.begin(x_BCHW, noise(64)), y_B).any()
    assert not kind(attack=blind)(fold(model), x_BCHW, y_B, noise(64)).correct_B.any()


def test_accuracy_over_eps_is_the_share_beyond_each_radius() -> None:
    w_CHW = direction()
    model = plane(w_CHW, float(0.5 * w_CHW.sum()))
    distance_B = (torch.arange(3, 64, 4) + 0.5) / 255  # pixels are whole 255ths then
    x_BCHW = around_plane(distance_B, w_CHW)
    images = Images((x_BCHW * 255).round().to(torch.uint8), torch.zeros(16, dtype=torch.int64))
    threat = Evaluation(eps=EPS, step_size=EPS / 4)
    found = judge(model, images, over_eps(threat, 20), seed=0, device=CPU).correct
    assert found.pop("sa").all()
    radii = [float(name.split()[1]) for name in found]
    assert radii == pytest.approx([factor * EPS for factor in FACTORS], rel=1e-5)
    hits = [int(standing.sum()) for standing in found.values()]
    assert hits == [int((distance_B > eps).sum()) for eps in radii]
    assert hits == sorted(hits, reverse=True)
    assert hits[0] == 16
    assert hits[-1] == 4


# What every measure must hold to


@pytest.fixture(scope="module")
def mixture(build: Callable[..., Network]) -> Network:
    return build(ratio=0.125)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_verdict_of_every_measure_is_that_of_the_model_on_images_in_the_ball(
    build: Callable[..., Network], scope: str, norm: Any
) -> None:
    model = build(ratio=0.125, router_scope=scope)
    images = split(model, 10)
    x_BCHW, y_B = to_float(images.pixels_NCHW), images.labels_N
    eps = 0.01 if norm == "linf" else 0.1
    attack = PGD(eps=eps, step_size=eps / 4, steps=11, norm=norm, restarts=2)
    for name, kind in OWN.items():
        correct_B, x_adv = kind(attack=attack)(fold(model), x_BCHW, y_B, noise(10))
        assert not correct_B[::5].any(), "a misclassified clean image is broken"
        assert torch.equal(correct_B, is_correct(model, x_adv, y_B)), name
        step = (x_adv - x_BCHW).flatten(1)
        radius_B = step.abs().amax(1) if norm == "linf" else step.norm(dim=1)
        assert radius_B.max() <= eps + 1e-6
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert correct_B.sum() <= 8
        assert not torch.equal(x_adv, x_BCHW)


def test_forced_route_on_a_dense_net_is_pgd_on_the_margin(build: Callable[..., Network]) -> None:
    model = build(ratio=0.125, num_experts=1)
    images = split(model)
    x_BCHW, y_B = to_float(images.pixels_NCHW), images.labels_N
    attack, frozen = PGD(eps=0.02, step_size=0.005, steps=12), fold(model)
    forced = ForcedRoute(attack=attack)(frozen, x_BCHW, y_B, noise(40))
    margin = WhiteBoxMargin(attack=attack)(frozen, x_BCHW, y_B, noise(40))
    assert 0 < margin.correct_B.sum() < 32
    assert torch.equal(forced.correct_B, margin.correct_B)


@pytest.mark.parametrize(
    "kind", [kind for kind in OWN.values() if kind not in (SmallSteps, Queries, GateQueries)]
)
def test_restarts_begin_at_different_places(
    mixture: Network, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []
    begin = PGD.begin

    def spy(attack: PGD, x_BCHW: Tensor, source: Any) -> Tensor:
        starts.append(begin(attack, x_BCHW, source))
        return starts[-1].clone()

    monkeypatch.setattr(PGD, "begin", spy)
    images = split(mixture, 10)
    attack = PGD(eps=1e-4, step_size=1e-5, steps=1, restarts=3)
    kind(attack=attack)(fold(mixture), to_float(images.pixels_NCHW), images.labels_N, noise(10))
    assert len(starts) % 3 == 0
    assert len({start.sum(dtype=torch.float64).item() for start in starts[:3]}) == 3


def test_more_restarts_never_help_the_model(mixture: Network) -> None:
    images = split(mixture, 20)
    x_BCHW, y_B = to_float(images.pixels_NCHW), images.labels_N
    for kind in OWN.values():
        verdicts = [
            kind(attack=PGD(eps=0.01, step_size=0.01, steps=1, restarts=restarts))(
                fold(mixture), x_BCHW, y_B, noise(20)
            ).correct_B
            for restarts in (1, 3)
        ]
        assert not (verdicts[1] & ~verdicts[0]).any()


def test_expert_attack_follows_the_clean_route(mixture: Network) -> None:
    """Along the clean route the attacked images do raise the loss, whatever the router does."""
    images = split(mixture)
    x_BCHW, y_B = to_float(images.pixels_NCHW), images.labels_N
    found = ExpertAttack(attack=STRONG)(fold(mixture), x_BCHW, y_B, noise(40))
    alive = is_correct(mixture, x_BCHW, y_B)
    route_B = mixture(x_BCHW).route
    with torch.no_grad():
        logits_BK = mixture.along(found.x_adv, route_B)
    assert not (logits_BK.argmax(1) == y_B)[alive].any()


# Judging


def verdicts_of(model: Network, images: Images, **how: Any) -> Verdicts:
    evaluation = Evaluation(eps=0.01, step_size=0.0025, steps=11)
    measures = suite(evaluation, dense=model.num_experts == 1)
    return judge(model, images, measures, seed=7, device=CPU, **how)


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_judgement_does_not_depend_on_shards(build: Callable[..., Network], scope: str) -> None:
    model = build(ratio=0.125, router_scope=scope)
    images = split(model, 15)
    whole = verdicts_of(model, images)
    parts = [verdicts_of(model, images, rank=rank, world=2) for rank in range(2)]
    for name, hits in whole.correct.items():
        assert torch.equal(sum(part.correct[name].long() for part in parts), hits.long()), name
    for route in ("route", "route_attacked"):
        assert torch.equal(sum(getattr(p, route) for p in parts), getattr(whole, route))
    broken = {name: int((~hits).sum()) for name, hits in whole.correct.items()}
    assert broken["sa"] == 3
    assert 3 < broken["ra_pgd11"] < 15


def test_judgement_does_not_depend_on_the_batch_size(
    mixture: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = split(mixture, 15)
    whole = verdicts_of(mixture, images)
    monkeypatch.setattr(runner, "BATCH", 4)
    pieces = verdicts_of(mixture, images)
    for name, hits in whole.correct.items():
        assert torch.equal(pieces.correct[name], hits), name
    assert torch.equal(pieces.route_attacked, whole.route_attacked)


def test_judgement_of_a_measure_does_not_depend_on_the_others(mixture: Network) -> None:
    images = split(mixture, 15)
    measures = suite(Evaluation(eps=0.01, step_size=0.0025, steps=3), dense=False)
    together = judge(mixture, images, measures, seed=7, device=CPU)
    for name, measure in measures.items():
        alone = judge(mixture, images, {name: measure}, seed=7, device=CPU)
        assert torch.equal(alone.correct[name], together.correct[name]), name


def test_judging_leaves_the_model_as_it_was(mixture: Network) -> None:
    images = split(mixture, 8)
    mixture.train()
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    verdicts_of(mixture, images)
    assert all(module.training for module in mixture.modules())
    assert mixture.gate_gradient
    assert all(torch.equal(before[n], t) for n, t in mixture.state_dict().items())
    mixture.eval()


def test_worst_case_is_the_minimum_over_the_attacks_image_by_image() -> None:
    correct = {
        "sa": torch.tensor([1, 1, 1, 0]).bool(),
        "ra_pgd50": torch.tensor([1, 0, 1, 0]).bool(),
        "ra_forced": torch.tensor([1, 1, 0, 0]).bool(),
    }
    route = torch.tensor([0, 0, 1, 1])
    metrics = summarize(Verdicts(correct, route, torch.tensor([0, 1, 1, 1])), 2, "test")
    assert metrics["test/sa"] == 0.75
    assert metrics["test/ra_pgd50"] == metrics["test/ra_forced"] == 0.5
    assert metrics["test/ra_worst"] == 0.25
    assert (metrics["test/ra_worst_low"], metrics["test/ra_worst_high"]) == wilson(1, 4)
    assert metrics["route/flip_rate"] == 0.25
    assert metrics["route/load_0"] == metrics["route/load_1"] == 0.5
    assert metrics["route/entropy"] == pytest.approx(0.6931, abs=1e-4)


def test_routes_are_not_said_to_change_where_nothing_attacked() -> None:
    correct, route = {"sa": torch.tensor([True, False])}, torch.tensor([1, 1])
    metrics = summarize(Verdicts(correct, route, torch.zeros_like(route)), 2, "test")
    assert "route/flip_rate" not in metrics
    assert "test/ra_worst" not in metrics
    assert metrics["route/load_1"] == 1.0


def test_dense_net_is_told_nothing_about_routes(build: Callable[..., Network]) -> None:
    model = build(ratio=0.125, num_experts=1)
    metrics = summarize(verdicts_of(model, split(model, 8)), 1, "test")
    names = {"sa", "ra_pgd11", "ra_pgd11_margin", "ra_worst"}
    assert metrics.keys() == {f"test/{n}{end}" for n in names for end in ("", "_low", "_high")}


def test_suite_names_its_metrics_by_the_number_of_steps() -> None:
    names = set(suite(Evaluation(steps=20), dense=False))
    assert names == {"sa", "ra_pgd20", "ra_pgd20_margin", "ra_forced", "ra_router", "ra_expert"}


def test_attacked_images_of_a_router_that_sees_nothing_are_not_rerouted(mixture: Network) -> None:
    images = split(mixture, 12)
    still = verdicts_of(mixture, images)
    calm = replace(still, route_attacked=still.route)
    assert summarize(calm, 2, "test")["route/flip_rate"] == 0.0


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_has_its_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_interval_mirrors_and_stays_within_0_and_1() -> None:
    for n in (1, 7, 10_000):
        for successes in {0, 1, n // 2, n}:
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n + 1e-12
            assert successes / n - 1e-12 <= high <= 1
            assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_interval_of_impossible_counts_is_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        wilson(successes, n)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"validation_steps": 0}, "validation_steps must be at least 1, got 0"),
        ({"eps": -1.0}, r"eps must be at least 0, got -1\.0"),
        ({"norm": "l1"}, "norm must be linf or l2, got 'l1'"),
    ],
)
def test_threat_out_of_range_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**settings)


def test_progress_is_told_from_inside_an_attack(
    mixture: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PULSE", -1.0)
    told: list[tuple[int, int, str]] = []
    attack = PGD(eps=1e-4, step_size=1e-5, steps=40)
    runner.judge(
        mixture,
        split(mixture, 8),
        {"ra_pgd": WhiteBox(attack=attack)},
        seed=0,
        device=torch.device("cpu"),
        tell=lambda done, of, name: told.append((done, of, name)),
    )
    assert told == [(0, 8, "ra_pgd")] * 5 + [(8, 8, "ra_pgd")], "once before, four times within"


def test_every_measure_is_described_in_words() -> None:
    made = measures_of(MEASURES, Evaluation(), num_experts=2)
    assert [name for name in made if describe(f"test/{name}") == f"test/{name}"] == []
