"""APGD against closed forms, its algorithm written out for one image, and what it must never do.

Shapes: B images, CHW channels and sides.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.attacks import ATTACKS
from pipeline.attacks.apgd import APGD, like
from pipeline.attacks.pgd import PGD
from pipeline.seeding import Noise, generator_at

EPS = 0.1


def images(count: int, seed: int = 0, *, inner: bool = False) -> Tensor:
    """Random images; with ``inner`` so far from 0 and 1 that clipping does nothing."""
    x_BCHW = torch.rand(count, 3, 5, 5, generator=generator_at("cpu", seed, "images")).double()
    return 0.3 + 0.4 * x_BCHW if inner else x_BCHW


def weights(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, 5, generator=generator_at("cpu", seed, "weights")).double()


def linear(w_CHW: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x_BCHW: (x_BCHW * w_CHW).flatten(1).sum(1)


def bumpy(x_BCHW: Tensor) -> Tensor:
    """Many hills, on which a step that is too long goes up and down."""
    return ((40 * x_BCHW).sin() + 3 * x_BCHW).flatten(1).sum(1)


def noise(seed: int = 0) -> Noise:
    return Noise(generator_at("cpu", seed, "noise"))


def radius(moved: Tensor, x_BCHW: Tensor, norm: str) -> Tensor:
    step = (moved - x_BCHW).flatten(1)
    return step.abs().amax(1) if norm == "linf" else step.norm(dim=1)


def test_linear_objective_is_raised_to_its_optimum_in_linf() -> None:
    x_BCHW, w_CHW = images(8), weights()
    found = APGD(eps=EPS, steps=20)(linear(w_CHW), x_BCHW, noise())
    wanted = (x_BCHW + EPS * w_CHW.sign()).clamp(0, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


def test_linear_objective_is_raised_to_its_optimum_in_l2() -> None:
    x_BCHW, w_CHW = images(8, inner=True), weights()
    found = APGD(eps=EPS, steps=60, norm="l2")(linear(w_CHW), x_BCHW, noise())
    wanted = x_BCHW + EPS * w_CHW / w_CHW.norm()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_checkpoints_of_a_hundred_steps_are_those_of_the_paper() -> None:
    assert sorted(APGD().checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(APGD().checkpoints(50)) == [11, 21, 29, 35, 40, 44, 47, 50]


@pytest.mark.parametrize("steps", [1, 2, 7, 33])
def test_checkpoints_of_a_short_attack_lie_on_its_way(steps: int) -> None:
    due = APGD().checkpoints(steps)
    assert due
    assert min(due) >= 1
    assert max(due) <= steps


def written_out(attack: APGD, f: Callable[[Tensor], Tensor], x: Tensor, start: Tensor) -> Tensor:
    """Algorithm 1 for one image in L-inf, with its whole history kept."""
    due = sorted(attack.checkpoints(attack.steps))

    def project(z: Tensor) -> Tensor:
        return z.clamp(x - attack.eps, x + attack.eps).clamp(0, 1)

    def slope(z: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        return torch.autograd.grad(f(z).sum(), z)[0]

    now, old, step = start, start, 2 * attack.eps
    best, height = start, float(f(start))
    rises, best_then, halved, last = [], height, True, 0
    for k in range(attack.steps):
        ahead = project(now + step * slope(now).sign())
        if k > 0:
            ahead = project(now + 0.75 * (ahead - now) + 0.25 * (now - old))
        rises.append(float(f(ahead)) > float(f(now)))
        old, now = now, ahead
        if float(f(now)) > height:
            best, height = now, float(f(now))
        if k + 1 in due:
            few = sum(rises[last:]) < attack.rho * (k + 1 - last)
            still = not halved and height <= best_then
            halved, best_then, last = few or still, height, k + 1
            if halved:
                step, now, old = step / 2, best, best
    return best


@pytest.mark.parametrize("steps", [1, 9, 40])
def test_equals_its_algorithm_written_out_image_by_image(steps: int) -> None:
    x_BCHW, attack = images(6), APGD(eps=EPS, steps=steps)
    start = attack.begin(x_BCHW, noise())
    found = attack.ascend(bumpy, x_BCHW, start, steps)
    each = [
        written_out(attack, bumpy, x_BCHW[row : row + 1], start[row : row + 1]) for row in range(6)
    ]
    torch.testing.assert_close(found, torch.cat(each), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_walk_in_pieces_and_with_fewer_images_is_the_walk(norm: Any) -> None:
    x_BCHW, attack = images(7), APGD(eps=EPS, steps=23, norm=norm)
    whole = attack(bumpy, x_BCHW, noise())
    walk = attack.walk(x_BCHW, noise())
    walk.advance(bumpy, 10)
    walk.keep(torch.tensor([1, 3, 6]))
    walk.advance(bumpy, 8)
    walk.keep(torch.tensor([False, True, True]))
    walk.advance(bumpy, 5)
    torch.testing.assert_close(walk.points()[-1], whole[[3, 6]], rtol=0, atol=1e-12)


def test_best_of_all_points_on_the_way_is_kept() -> None:
    x_BCHW, seen = images(5), []

    def watched(x: Tensor) -> Tensor:
        seen.append(bumpy(x).detach())
        return bumpy(x)

    found = APGD(eps=EPS, steps=30)(watched, x_BCHW, noise())
    assert len(seen) == 31, "one look a step, and one at the start"
    assert torch.equal(bumpy(found), torch.stack(seen).amax(0))
    assert (torch.stack(seen).argmax(0) < 30).any(), "the last is not the best for each image"


def test_halves_its_way_out_of_a_step_that_is_too_long() -> None:
    x_BCHW = images(64)
    rigid = PGD(eps=EPS, step_size=2 * EPS, steps=40)  # the step that APGD begins with
    found = like(rigid)(bumpy, x_BCHW, noise())
    assert (bumpy(found) > bumpy(rigid(bumpy, x_BCHW, noise()))).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_stay_in_the_ball_and_in_the_range(norm: Any) -> None:
    for seed in range(10):
        x_BCHW = images(4, seed).round(decimals=1).float()  # 0 and 1 among them
        moved = APGD(eps=EPS, steps=6, norm=norm)(bumpy, x_BCHW, noise(seed))
        assert radius(moved, x_BCHW, norm).max() <= EPS + 1e-6
        assert moved.min() >= 0
        assert moved.max() <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_steps_return_the_start_and_no_radius_changes_nothing(norm: Any) -> None:
    x_BCHW = images(3)
    attack = APGD(eps=EPS, steps=0, norm=norm)
    assert torch.equal(attack(bumpy, x_BCHW, noise()), attack.begin(x_BCHW, noise()))
    assert torch.equal(APGD(eps=0.0, steps=5, norm=norm)(bumpy, x_BCHW, noise()), x_BCHW)


def test_each_image_keeps_its_best_restart() -> None:
    x_BCHW, source = images(32), noise()
    single = APGD(eps=EPS, steps=3)
    tries = torch.stack([bumpy(single(bumpy, x_BCHW, source)) for _ in range(3)])
    best = APGD(eps=EPS, steps=3, restarts=3)(bumpy, x_BCHW, noise())
    assert torch.equal(bumpy(best), tries.amax(0))
    assert tries.argmax(0).unique().numel() == 3, "the images differ in which restart is best"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_shows_in_the_images(norm: Any, bad: float) -> None:
    factor_B = torch.tensor([1.0, bad, 1.0], dtype=torch.float64)
    walk = APGD(steps=4, norm=norm).walk(images(3), noise())
    walk.advance(lambda x: factor_B[: len(x)] * linear(weights())(x), 4)
    assert all(point[[0, 2]].isfinite().all() for point in walk.points())
    assert not walk.points()[0][1].isfinite().all()


def test_neither_the_clean_images_nor_gradients_are_touched() -> None:
    x_BCHW, w_CHW = images(4), weights().requires_grad_()
    before = x_BCHW.clone()
    with torch.no_grad():  # as in an evaluation: the attack turns gradients on for itself
        found = APGD(steps=3, start="clean")(linear(w_CHW), x_BCHW)
    found.add_(1.0)
    assert torch.equal(x_BCHW, before)
    assert not found.requires_grad
    assert w_CHW.grad is None


def test_takes_the_threat_of_a_pgd_and_not_its_step() -> None:
    attack = like(PGD(eps=0.3, step_size=9.0, steps=7, norm="l2", start="clean", restarts=2))
    assert attack == APGD(eps=0.3, steps=7, norm="l2", start="clean", restarts=2)


def test_objective_without_one_value_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one value per image, got shape \(\) for 3 images"):
        APGD(steps=1)(lambda x: x.sum(), images(3), noise())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, r"eps must be at least 0, got -0\.1"),
        ({"steps": -1}, "steps must be from 0 to 10000, got -1"),
        ({"restarts": 0}, "restarts must be from 1 to 1000, got 0"),
        ({"norm": "l1"}, "norm must be linf or l2, got 'l1'"),
        ({"start": "far"}, "start must be uniform, gaussian or clean, got 'far'"),
        ({"rho": 1.5}, r"rho must be from 0 to 1, got 1\.5"),
        ({"rho": math.nan}, r"rho must be from 0 to 1, got nan"),
    ],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS["apgd"](**settings)
