"""PGD against closed forms, and what it must never do.

Shapes: B images, CHW channels and sides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.attacks import ATTACKS
from pipeline.attacks.pgd import PGD
from pipeline.optimization.losses import cross_entropy_per_image
from pipeline.seeding import ImageNoise, Noise, generator_at

EPS = 0.1


def images(count: int, seed: int = 0, *, inner: bool = False) -> Tensor:
    """Random images; with ``inner`` so far from 0 and 1 that clipping does nothing."""
    x_BCHW = torch.rand(count, 3, 6, 6, generator=generator_at("cpu", seed, "images")).double()
    return 0.3 + 0.4 * x_BCHW if inner else x_BCHW


def weights(seed: int = 0) -> Tensor:
    return torch.randn(3, 6, 6, generator=generator_at("cpu", seed, "weights")).double()


def linear(w_CHW: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x_BCHW: (x_BCHW * w_CHW).flatten(1).sum(1)


def noise(seed: int = 0) -> Noise:
    return Noise(generator_at("cpu", seed, "noise"))


def radius(moved: Tensor, x_BCHW: Tensor, norm: str) -> Tensor:
    step = (moved - x_BCHW).flatten(1)
    return step.abs().amax(1) if norm == "linf" else step.norm(dim=1)


def test_linear_objective_is_raised_to_its_optimum_in_linf() -> None:
    x_BCHW, w_CHW = images(8), weights()
    found = PGD(eps=EPS, step_size=0.03, steps=12)(linear(w_CHW), x_BCHW, noise())
    wanted = (x_BCHW + EPS * w_CHW.sign()).clamp(0, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("start", ["uniform", "gaussian", "clean"])
def test_linear_objective_is_raised_to_its_optimum_in_l2(start: Any) -> None:
    x_BCHW, w_CHW = images(8, inner=True), weights()
    attack = PGD(eps=EPS, step_size=0.05, steps=150, norm="l2", start=start)
    found = attack(linear(w_CHW), x_BCHW, noise())
    wanted = x_BCHW + EPS * w_CHW / w_CHW.norm()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_step_of_one_image_does_not_depend_on_the_others(norm: Any) -> None:
    x_BCHW, w_CHW = images(5), weights()
    attack = PGD(eps=EPS, step_size=0.02, steps=3, norm=norm, start="clean")
    together = attack(linear(w_CHW), x_BCHW)
    alone = torch.cat([attack(linear(w_CHW), x_BCHW[row : row + 1]) for row in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "clean"])
def test_images_stay_in_the_ball_and_in_the_range(norm: Any, start: Any) -> None:
    attack = PGD(eps=EPS, step_size=0.07, steps=4, norm=norm, start=start)
    for seed in range(25):
        x_BCHW = images(4, seed).round(decimals=1).float()  # 0 and 1 among them
        for objective in (linear(weights(seed).float()), lambda x: (x**2).sum((1, 2, 3))):
            moved = attack(objective, x_BCHW, noise(seed))
            assert radius(moved, x_BCHW, norm).max() <= EPS + 1e-6
            assert moved.min() >= 0
            assert moved.max() <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_unbounded_attack_is_bounded_by_the_range_alone(norm: Any) -> None:
    far = {"linf": 1.0, "l2": 1e6}[norm]
    attack = PGD(eps=far, step_size=far / 10, steps=20, norm=norm)
    found = attack(linear(weights()), images(3), noise())
    assert found.min() >= 0
    assert found.max() <= 1


def test_uniform_start_fills_the_linf_ball() -> None:
    x_BCHW = images(400, inner=True)
    step = PGD(eps=EPS).begin(x_BCHW, noise()) - x_BCHW
    assert step.abs().max() <= EPS + 1e-7
    assert step.mean().abs() < 1e-3, "centred on the image"
    assert step.var().item() == pytest.approx(EPS**2 / 3, rel=0.02)


def test_uniform_start_fills_the_l2_ball() -> None:
    """The share of a d-ball's volume within radius r is (r / eps)^d."""
    x_BCHW = images(600, inner=True)[:, :1, :2, :2]
    step = PGD(eps=EPS, norm="l2").begin(x_BCHW, noise()) - x_BCHW
    share_B = (step.flatten(1).norm(dim=1) / EPS) ** 4
    assert share_B.max() <= 1 + 1e-6
    assert share_B.mean().item() == pytest.approx(0.5, abs=0.04)
    assert share_B.var().item() == pytest.approx(1 / 12, abs=0.015)
    assert step.mean(0).abs().max() < 0.01


def test_radius_and_direction_of_an_l2_start_are_independent_in_an_evaluation() -> None:
    x_BCHW = images(500, inner=True)
    step = PGD(eps=EPS, norm="l2").begin(x_BCHW, ImageNoise(0, torch.arange(500))) - x_BCHW
    radius_B, first_B = step.flatten(1).norm(dim=1), step[:, 0, 0, 0] / step.flatten(1).norm(dim=1)
    correlation = torch.corrcoef(torch.stack([radius_B, first_B]))[0, 1]
    assert correlation.abs() < 0.15


def test_gaussian_start_has_deviation_of_a_thousandth() -> None:
    x_BCHW = images(200, inner=True)
    step = PGD(start="gaussian").begin(x_BCHW, noise()) - x_BCHW
    assert step.std().item() == pytest.approx(0.001, rel=0.02)
    assert step.mean().abs() < 1e-4


def test_no_steps_return_the_start() -> None:
    x_BCHW = images(3)
    attack = PGD(eps=EPS, steps=0)
    found = attack(linear(weights()), x_BCHW, noise(4))
    assert torch.equal(found, attack.begin(x_BCHW, noise(4)))
    assert torch.equal(PGD(start="clean", steps=0)(linear(weights()), x_BCHW), x_BCHW)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "clean"])
def test_radius_of_zero_changes_nothing(norm: Any, start: Any) -> None:
    x_BCHW = images(4)
    attack = PGD(eps=0.0, step_size=0.1, steps=3, norm=norm, start=start)
    assert torch.equal(attack(linear(weights()), x_BCHW, noise()), x_BCHW)


def test_attack_neither_changes_nor_returns_the_clean_images() -> None:
    x_BCHW = images(4)
    before = x_BCHW.clone()
    for attack in (PGD(), PGD(start="clean", steps=1), PGD(eps=0.0), PGD(start="clean", steps=0)):
        found = attack(linear(weights()), x_BCHW, noise())
        found.add_(1.0)
        assert torch.equal(x_BCHW, before)
        assert not found.requires_grad
        assert not x_BCHW.requires_grad


def test_each_image_keeps_its_best_restart() -> None:
    x_BCHW = images(64)
    attack = PGD(eps=EPS, step_size=0.02, steps=2)
    several = PGD(eps=EPS, step_size=0.02, steps=2, restarts=4)

    def bumpy(x: Tensor) -> Tensor:
        return (50 * x).sin().flatten(1).sum(1)

    source = noise()
    tries = torch.stack([attack(bumpy, x_BCHW, source) for _ in range(4)])
    heights = torch.stack([bumpy(found) for found in tries])
    best = several(bumpy, x_BCHW, noise())
    assert torch.equal(bumpy(best), heights.amax(0))
    assert torch.equal(best, tries[heights.argmax(0), torch.arange(64)])
    assert heights.argmax(0).unique().numel() == 4, "the images differ in which restart is best"


def test_restarts_refuse_an_objective_without_one_value_an_image() -> None:
    with pytest.raises(ValueError, match=r"restarts=2 needs .*one value per image, got shape \(\)"):
        PGD(restarts=2)(lambda x: x.sum(), images(3), noise())


def test_single_start_takes_an_objective_with_one_value() -> None:
    x_BCHW, w_CHW = images(3), weights()
    each = PGD(start="clean")(linear(w_CHW), x_BCHW)
    assert torch.equal(PGD(start="clean")(lambda x: linear(w_CHW)(x).sum(), x_BCHW), each)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_shows_in_the_images(norm: Any, bad: float) -> None:
    """sign(NaN) of 0 once turned a published attack into a no-op: SA 93.8, RA 91.3."""
    factor_B = torch.tensor([1.0, bad, 1.0], dtype=torch.float64)
    attack = PGD(steps=2, norm=norm)
    found = attack(lambda x: factor_B * linear(weights())(x), images(3), noise())
    assert found[[0, 2]].isfinite().all()
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_gradient_leaves_the_images_at_their_start(norm: Any) -> None:
    x_BCHW, attack = images(3), PGD(eps=EPS, norm=norm)
    found = attack(lambda x: 0 * x.flatten(1).sum(1), x_BCHW, noise(2))
    torch.testing.assert_close(found, attack.begin(x_BCHW, noise(2)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_attack_leaves_the_model_exactly_as_it_was(small: Network, training: bool) -> None:
    small.train(training)
    frozen_head = next(small.parameters())
    frozen_head.requires_grad_(False)
    for row, parameter in enumerate(small.parameters()):
        parameter.grad = torch.full_like(parameter, row) if row % 2 else None
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in small.parameters()]
    wanted = [p.requires_grad for p in small.parameters()]
    modes = [module.training for module in small.modules()]

    x_BCHW, y_B = images(6).float(), torch.arange(6) % 4
    folded = fold(small)
    moved = PGD()(lambda x: cross_entropy_per_image(folded(x).logits, y_B), x_BCHW, noise())

    assert not torch.equal(moved, x_BCHW)
    assert all(torch.equal(state[name], tensor) for name, tensor in small.state_dict().items())
    for parameter, grad in zip(small.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert [p.requires_grad for p in small.parameters()] == wanted
    assert [module.training for module in small.modules()] == modes


def test_attack_on_the_model_itself_leaves_no_gradient_behind(small: Network) -> None:
    x_BCHW, y_B = images(4).float(), torch.arange(4)
    with torch.no_grad():  # as in an evaluation: the attack turns gradients on for itself
        moved = PGD()(lambda x: cross_entropy_per_image(small(x).logits, y_B), x_BCHW, noise())
    assert not torch.equal(moved, x_BCHW)
    assert all(parameter.grad is None for parameter in small.parameters())
    assert all(parameter.requires_grad for parameter in small.parameters())


def test_attack_raises_the_loss_of_a_network(small: Network) -> None:
    x_BCHW, y_B = images(16).float(), small(images(16).float()).logits.argmax(1)
    folded = fold(small)

    def loss(x: Tensor) -> Tensor:
        return cross_entropy_per_image(folded(x).logits, y_B)

    moved = PGD(eps=EPS, step_size=EPS / 4, steps=10)(loss, x_BCHW, noise())
    step = EPS * Noise(generator_at("cpu", 9)).uniform(x_BCHW).sign()
    assert (loss(moved) > loss(x_BCHW)).all()
    assert loss(moved).mean() > loss((x_BCHW + step).clamp(0, 1)).mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, r"eps must be at least 0, got -0\.1"),
        ({"eps": float("nan")}, "eps must be at least 0 and finite, got nan"),
        ({"step_size": -1.0}, r"step_size must be at least 0, got -1\.0"),
        ({"steps": -1}, "steps must be from 0 to 10000, got -1"),
        ({"eps": 8.0}, r"eps must be from 0 to 1, .*, got 8; 8/255 was probably meant"),
        ({"eps": float("inf"), "norm": "l2"}, "eps must be at least 0 and finite, got inf"),
        ({"step_size": 2.0}, r"step_size must be from 0 to 1, .*, got 2; 2/255 was probably meant"),
        ({"steps": 10**6}, r"steps must be from 0 to 10000, got 1000000; .* no further image"),
        ({"restarts": 0}, "restarts must be from 1 to 1000, got 0"),
        ({"norm": "l1"}, "norm must be linf or l2, got 'l1'"),
        ({"start": "far"}, "start must be uniform, gaussian or clean, got 'far'"),
    ],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS["pgd"](**settings)


@dataclass(frozen=True, kw_only=True)
class Momentum(PGD):
    """MI-FGSM (arXiv:1710.06081, algorithm 1) by the one method that is for it."""

    decay: float = 0.9
    start: Any = "clean"

    def direction(self, gradient: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.decay * memory + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        return memory.sign(), memory


def momentum_twin(objective: Any, x_BCHW: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """The algorithm as it is written."""
    x, g = x_BCHW.clone(), torch.zeros_like(x_BCHW)
    for _ in range(steps):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(objective(x).sum(), x)
        g = 0.9 * g + slope / slope.abs().sum((1, 2, 3), keepdim=True)
        x = (x + step * g.sign()).detach()
        x = torch.minimum(torch.maximum(x, x_BCHW - eps), x_BCHW + eps).clamp(0, 1)
    return x


def test_momentum_is_a_direction_whole_or_in_pieces_with_images_dropped() -> None:
    x_BCHW = images(6)
    target = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(5)).double()

    def bumpy(x: Tensor) -> Tensor:
        return torch.sin(9 * (x - target)).sum((1, 2, 3))

    attack = Momentum(eps=0.1, step_size=0.02, steps=9)
    want = momentum_twin(bumpy, x_BCHW, 0.1, 0.02, 9)
    assert torch.equal(attack(bumpy, x_BCHW), want)
    walk = attack.walk(x_BCHW, noise())
    walk.advance(bumpy, 4)
    walk.keep(torch.tensor([1, 3, 4]))
    walk.advance(bumpy, 5)
    assert torch.equal(walk.points()[0], want[[1, 3, 4]]), "the memory goes with its image"
    assert not torch.equal(
        want, PGD(eps=0.1, step_size=0.02, steps=9, start="clean")(bumpy, x_BCHW)
    )
