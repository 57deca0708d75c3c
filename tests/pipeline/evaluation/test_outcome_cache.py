"""Outcomes on disk: found again, by whoever asks for the same attack on the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.evaluation.evaluator import Job, cascaded, waterfall
from pipeline.evaluation.outcome_cache import OutcomeCache, digest_of_images, identity
from pipeline.measures import MEASURES, Evaluation, Transfer
from pipeline.measures.base import Attacked
from pipeline.measures.gradient_attack import WhiteBox
from pipeline.measures.runner import Verdicts, join, judge, summarize
from pipeline.measures.sanity.probe_attacks import Planted, contrasts, over_eps
from pipeline.measures.tiers import TIERS, measures_of

CPU = torch.device("cpu")
ATTACK = PGD(eps=0.01, step_size=0.0025, steps=4)


@pytest.fixture
def cache(tmp_path: Path) -> OutcomeCache:
    return OutcomeCache(tmp_path, "w" * 64, "context")


@pytest.fixture(scope="module")
def mixture(build: Callable[..., Network]) -> Network:
    return build(ratio=0.125)


def split(model: Network, count: int = 12) -> Images:
    """Images that the model classifies right, but for every fourth."""
    generator = torch.Generator().manual_seed(0)
    pixels_NCHW = (torch.rand(count, 3, 8, 8, generator=generator) * 255).round().to(torch.uint8)
    with torch.no_grad():
        labels_N = model(to_float(pixels_NCHW)).logits.argmax(1)
    labels_N[::4] = (labels_N[::4] + 1) % 4
    return Images(pixels_NCHW, labels_N)


@dataclass(frozen=True)
class Counted:
    """PGD that counts its batches, and breaks down at one of them."""

    attack: PGD
    calls: list[int] = field(default_factory=list, compare=False, repr=False)
    fails_at: int = field(default=0, compare=False, repr=False)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        self.calls.append(len(y_B))
        if len(self.calls) == self.fails_at:
            raise InterruptedError
        return WhiteBox(attack=self.attack)(model, x_BCHW, y_B, noise)


def judged(model: Network, images: Images, measures: Any, **how: Any) -> Verdicts:
    return judge(model, images, measures, seed=0, device=CPU, batch=4, **how)


def assert_same(one: Verdicts, other: Verdicts) -> None:
    assert one.correct.keys() == other.correct.keys()
    for name, outcome in one.outcomes.items():
        for key, column in outcome.columns.items():
            torch.testing.assert_close(other.outcomes[name].columns[key], column)
    assert torch.equal(one.route, other.route)
    assert torch.equal(one.route_attacked, other.route_attacked)


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_what_was_attacked_is_not_attacked_again(
    build: Callable[..., Network], cache: OutcomeCache, scope: str
) -> None:
    model = build(ratio=0.125, router_scope=scope)
    images, measure = split(model), Counted(ATTACK)
    first = judged(model, images, {"ra": measure}, store=cache)
    again = judged(model, images, {"ra": measure}, store=cache)
    assert measure.calls == [4, 4, 4]
    assert (first.efforts["ra"].attacked, first.efforts["ra"].reused) == (12, 0)
    assert (again.efforts["ra"].attacked, again.efforts["ra"].reused) == (0, 12)
    assert_same(first, again)
    assert_same(first, judged(model, images, {"ra": Counted(ATTACK)}))


def test_attack_that_broke_down_goes_on_where_it_was(mixture: Network, cache: OutcomeCache) -> None:
    images = split(mixture)
    with pytest.raises(InterruptedError):
        judged(mixture, images, {"ra": Counted(ATTACK, fails_at=3)}, store=cache)
    rest = Counted(ATTACK)
    found = judged(mixture, images, {"ra": rest}, store=cache)
    assert rest.calls == [4]
    assert found.efforts["ra"].reused == 8
    assert_same(found, judged(mixture, images, {"ra": Counted(ATTACK)}))


def test_images_of_a_smaller_set_are_not_attacked_again(
    mixture: Network, cache: OutcomeCache
) -> None:
    images, rows = split(mixture), torch.tensor([1, 5, 6, 10])
    few = judged(mixture, images.pick(rows), {"ra": Counted(ATTACK)}, ids_N=rows, store=cache)
    rest = Counted(ATTACK)
    every = judged(mixture, images, {"ra": rest}, store=cache)
    assert sum(rest.calls) == 8
    assert torch.equal(every.correct["ra"][rows], few.correct["ra"]), "numbers keep their starts"
    assert_same(every, judged(mixture, images, {"ra": Counted(ATTACK)}))


def test_half_written_part_is_as_if_it_were_not_there(
    mixture: Network, cache: OutcomeCache
) -> None:
    images, measure = split(mixture), Counted(ATTACK)
    judged(mixture, images, {"ra": measure}, store=cache)
    home = cache.home(measure)
    part = next(home.glob("*.parquet"))
    part.rename(home / f".{part.stem}")
    assert judged(mixture, images, {"ra": measure}, store=cache).efforts["ra"].reused == 8


def test_whatever_decides_an_outcome_parts_the_folders(tmp_path: Path) -> None:
    measure = WhiteBox(attack=ATTACK)
    homes = {
        OutcomeCache(tmp_path, weights, context).home(made)
        for weights in ("1" * 64, "2" * 64)
        for context in ("seed 0", "seed 1")
        for made in (
            measure,
            WhiteBox(attack=replace(ATTACK, steps=5)),
            MEASURES["ra_pgd_margin"](attack=ATTACK),
        )
    }
    assert len(homes) == 12


def test_attacks_are_known_again_by_another_process() -> None:
    """No address of an object is part of what names them."""
    threat = Evaluation()
    made = [*measures_of(MEASURES, threat, num_experts=2).values()]
    made += [*contrasts(threat, 192, deep=True).values(), *over_eps(threat, 5).values()]
    for measure in [*made, Planted(attack=ATTACK)]:
        assert " at 0x" not in "".join(identity(measure))


def test_source_of_a_transferred_attack_is_part_of_its_name(build: Callable[..., Network]) -> None:
    one, other = (fold(build(ratio=0.125)) for _ in range(2))
    name = identity(Transfer(source=one, attack=ATTACK))
    assert name == identity(Transfer(source=other, attack=ATTACK))
    with torch.no_grad():
        next(other.body.parameters()).add_(1e-3)
    assert name != identity(Transfer(source=other, attack=ATTACK))


def test_same_attack_under_another_name_is_known(mixture: Network, cache: OutcomeCache) -> None:
    images = split(mixture)
    judged(mixture, images, {"ra_pgd4": Counted(ATTACK)}, store=cache)
    again = judged(mixture, images, {"steps 4": Counted(ATTACK)}, store=cache)
    assert again.efforts["steps 4"].reused == 12


def test_images_are_told_apart_by_pixels_labels_and_order(mixture: Network) -> None:
    images = split(mixture)
    other_pixel = Images(images.pixels_NCHW.clone(), images.labels_N)
    other_pixel.pixels_NCHW[0, 0, 0, 0] ^= 1
    variants = [images, other_pixel, Images(images.pixels_NCHW, images.labels_N.roll(1))]
    variants.append(images.pick(torch.arange(12).flip(0)))
    assert len({digest_of_images(variant) for variant in variants}) == 4
    assert digest_of_images(images.pick(torch.arange(12))) == digest_of_images(images)


# Shards and cascades


def test_shares_of_two_workers_join_to_the_whole(mixture: Network) -> None:
    images = split(mixture)
    measures = measures_of(("sa", "ra_pgd", "ra_forced"), Evaluation(eps=0.01), num_experts=2)
    parts = [judged(mixture, images, measures, rank=rank, world=2) for rank in range(2)]
    whole = judged(mixture, images, measures)
    joined = join(parts)
    assert_same(joined, whole)
    assert summarize(joined, 2, "test") == summarize(whole, 2, "test")
    assert joined.efforts["ra_forced"].attacked == 12


def test_cascade_attacks_the_standing_alone_and_finds_the_same_worst_case(
    mixture: Network,
) -> None:
    images, threat = split(mixture, 20), Evaluation(eps=0.02, step_size=0.005, steps=4)
    measures = measures_of(
        ("sa", "ra_pgd", "ra_pgd_margin", "ra_forced", "ra_noise", "ra_floor"),
        threat,
        num_experts=2,
    )
    each = judged(mixture, images, measures)
    job = cascaded(Job(images, torch.arange(20), measures))
    assert not {"ra_noise", "ra_floor"} & job.measures.keys()
    found = judged(mixture, images, job.measures, cascade=True)
    assert each.worst is not None
    assert found.worst is not None
    assert torch.equal(found.worst, each.worst)
    assert found.efforts["ra_pgd4"].attacked == 15, "every fourth image is wrong as it is"
    standing = int((each.correct["sa"] & each.correct["ra_pgd4"]).sum())
    assert found.efforts["ra_pgd4_margin"].attacked == standing
    assert waterfall(found) == waterfall(each)
    metrics = summarize(found, 2, "test")
    assert metrics["test/ra_pgd4"] == summarize(each, 2, "test")["test/ra_pgd4"]
    assert "test/ra_worst" in metrics
    assert "test/ra_forced" not in metrics, "it saw only what the others left"


def test_waterfall_adds_up(mixture: Network) -> None:
    images, threat = split(mixture, 20), Evaluation(eps=0.02, step_size=0.005, steps=4)
    measures = measures_of(("sa", "ra_pgd", "ra_forced", "ra_noise"), threat, num_experts=2)
    found = judged(mixture, images, measures)
    rows = waterfall(found)
    assert [name for name, *_ in rows] == ["sa", "ra_pgd4", "ra_forced"], "noise is a check"
    assert rows[0][1:] == (5, 15)
    assert sum(broken for _, broken, _ in rows) + rows[-1][2] == 20
    assert found.worst is not None
    assert rows[-1][2] == int(found.worst.sum())


# Tiers


@pytest.mark.parametrize("tier", TIERS)
def test_tier_names_measures_that_are_there(tier: str) -> None:
    assert set(TIERS[tier].measures) <= set(MEASURES)
    assert TIERS[tier].measures[:2] == ("sa", "ra_pgd"), "the plain number comes first"
    dense = measures_of(TIERS[tier].measures, Evaluation(), num_experts=1)
    assert not {name for name in dense if "forced" in name or "floor" in name}
    mixture = measures_of(TIERS[tier].measures, Evaluation(), num_experts=3)
    assert "ra_forced" in mixture
    assert "ra_pgd50" in mixture
    assert ("ra_each_2" in mixture) == (tier == "full")


def test_apgd_takes_twice_the_steps() -> None:
    made: Any = measures_of(("ra_pgd", "ra_apgd_t"), Evaluation(steps=50), num_experts=2)
    assert made["ra_pgd50"].attack.steps == 50
    assert made["ra_apgd_t"].attack.steps == 100
