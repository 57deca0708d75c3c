"""The adapter against the package itself.

Shapes: B images, K classes, CHW channels and sides.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.attacks.pgd import PGD
from pipeline.data.augmentation import to_float
from pipeline.measures import MEASURES, PACKAGED
from pipeline.measures import auto_attack as adapter
from pipeline.measures.auto_attack import STANDARD, AutoAttack, AutoAttackSurrogate, Square
from pipeline.measures.base import is_correct, untouched
from pipeline.seeding import ImageNoise
from tests.helpers.analytic import EPS as FLIP
from tests.helpers.analytic import route_flip, route_flip_images

Build = Callable[..., Network]
EPS = {"linf": 0.007, "l2": 0.12}


@pytest.fixture
def package() -> Any:
    return pytest.importorskip("pyautoattack", reason="needs the extra eval")


def examples(model: Network, count: int) -> tuple[Tensor, Tensor]:
    """Images that the model gets right, but for every fifth."""
    draws = torch.Generator().manual_seed(0)
    x_BCHW = torch.rand(count, 3, 8, 8, generator=draws)
    y_B = model(x_BCHW).logits.argmax(1)
    y_B[::5] = (y_B[::5] + 1) % model(x_BCHW).logits.shape[1]
    return x_BCHW.contiguous(memory_format=torch.channels_last), y_B


def noise(count: int) -> ImageNoise:
    return ImageNoise(0, torch.arange(count))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adapter_breaks_what_the_package_breaks(
    build: Build, package: Any, norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The four attacks of the standard version, called by the package's own evaluation."""
    monkeypatch.setattr(adapter, "QUERIES", 30)
    model = fold(build(ratio=0.125))
    x_BCHW, y_B = examples(model, 10)
    found = AutoAttack(attack=PGD(eps=EPS[norm], norm=norm))(model, x_BCHW, y_B, noise(10))
    suite = package.AutoAttack(
        lambda x: model(x).logits,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=EPS[norm],
        seed=0,
        version="standard",
    )
    suite.square.n_queries = 30
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = 3
    tracing = sys.gettrace()
    with torch.random.fork_rng():
        theirs, _ = suite.run_standard_evaluation(x_BCHW.contiguous(), y_B)
    sys.settrace(tracing)  # the package's checks take it away
    assert torch.equal(found.correct_B, is_correct(model, theirs, y_B))
    assert 0 < found.correct_B.sum() < 8


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_outcome_is_that_of_the_deployed_model_on_images_in_the_ball(
    build: Build, package: Any, name: str, norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "QUERIES", 20)
    if name == "ra_aa_surrogate":  # FAB over all experts takes long, and has a test below
        monkeypatch.setattr(adapter, "STANDARD", ("apgd-ce", "apgd-t", "square"))
    model = fold(build(ratio=0.125, router_scope="per_layer"))
    x_BCHW, y_B = examples(model, 10)
    state = torch.get_rng_state()
    measure = MEASURES[name](attack=PGD(eps=EPS[norm], norm=norm))
    if isinstance(measure, Square):
        measure = Square(attack=measure.attack, queries=20)
    correct_B, x_adv = measure(model, x_BCHW, y_B, noise(10))
    assert not correct_B[::5].any(), "a misclassified clean image is broken"
    assert torch.equal(correct_B, is_correct(model, x_adv, y_B))
    step = (x_adv - x_BCHW).flatten(1)
    assert (step.abs().amax(1) if norm == "linf" else step.norm(dim=1)).max() <= EPS[norm] + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(torch.get_rng_state(), state), "the package seeds torch; we do not"
    assert torch.equal(measure(model, x_BCHW, y_B, noise(10)).x_adv, x_adv), "the same again"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_any_number_of_classes_is_attacked(
    build: Build, package: Any, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "QUERIES", 10)
    model = fold(build(ratio=0.125, classes=classes))
    x_BCHW, y_B = examples(model, 6)
    found = AutoAttack(attack=PGD(eps=0.1))(model, x_BCHW, y_B, noise(6))
    assert not found.correct_B.any()


def test_gradient_of_soft_gates_finds_the_route_that_the_true_gradient_hides(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Square, which needs no gradient: the mixture that a flip of the route breaks."""
    monkeypatch.setattr(adapter, "STANDARD", ("apgd-ce", "apgd-t", "fab-t"))
    model, images = fold(route_flip(1.0)), route_flip_images(8)
    x_BCHW, threat = to_float(images.pixels_NCHW), PGD(eps=FLIP["linf"])
    hard = AutoAttack(attack=threat)(model, x_BCHW, images.labels_N, noise(8))
    soft = AutoAttackSurrogate(attack=threat)(model, x_BCHW, images.labels_N, noise(8))
    assert hard.correct_B.all()
    assert not soft.correct_B.any()
    assert not is_correct(model, soft.x_adv, images.labels_N).any()


def test_steps_and_queries_are_those_that_were_asked_for(build: Build, package: Any) -> None:
    model = fold(build(ratio=0.125))
    x_BCHW, y_B = examples(model, 4)
    seen: list[bool] = []
    forward = model.forward

    def watched(x: Tensor) -> Any:
        seen.append(x.requires_grad)
        return forward(x)

    model.forward = watched  # type: ignore[method-assign]
    counts = []
    for steps, queries in ((2, 10), (4, 10), (2, 30)):
        seen.clear()
        AutoAttack(attack=PGD(eps=1e-5), steps=steps, queries=queries)(model, x_BCHW, y_B, noise(4))
        counts.append((sum(seen), len(seen) - sum(seen)))
    assert counts[1][0] > 1.5 * counts[0][0], "gradients go with the steps"
    assert counts[2] == (counts[0][0], counts[0][1] + 20), "the rest with the queries"


def test_square_gets_its_queries_and_no_gradient(build: Build, package: Any) -> None:
    model = fold(build(ratio=0.125))
    x_BCHW, y_B = examples(model, 4)
    seen, forward = [], model.forward

    def watched(x: Tensor) -> Any:
        seen.append((len(x), torch.is_grad_enabled() and x.requires_grad))
        return forward(x)

    model.forward = watched  # type: ignore[method-assign]
    Square(attack=PGD(eps=1e-5), queries=25)(model, x_BCHW, y_B, noise(4))
    assert sum(count == 3 for count, _ in seen) in range(25, 30), "the one broken image is left out"
    assert not any(grad for _, grad in seen)


def test_broken_images_cost_nothing_and_need_no_package(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model = fold(build(ratio=0.125))
    x_BCHW, _ = examples(model, 5)
    wrong_B = (model(x_BCHW).logits.argmax(1) + 1) % 4
    for name in PACKAGED:
        assert not MEASURES[name]()(model, x_BCHW, wrong_B, noise(5)).correct_B.any()


@pytest.mark.parametrize("name", PACKAGED)
def test_package_that_is_missing_is_named_with_its_extra(
    build: Build, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model = fold(build(ratio=0.125))
    x_BCHW, y_B = examples(model, 3)
    with pytest.raises(ValueError, match=r"pyautoattack: pip install 'robust-moe\[eval\]'"):
        MEASURES[name]()(model, x_BCHW, y_B, noise(3))


def test_version_is_the_one_that_the_extra_pins(package: Any) -> None:
    from importlib.metadata import version

    assert version("pyautoattack") == "0.2.0"


def test_names_are_those_of_the_standard_version(package: Any) -> None:
    suite = package.AutoAttack(lambda x: x, eps=0.1, seed=0, version="standard")
    assert tuple(suite.attacks_to_run) == STANDARD
    assert suite.square.n_queries == adapter.QUERIES


def test_attack_that_finds_nothing_returns_the_clean_images(build: Build, package: Any) -> None:
    model = fold(build(ratio=0.125))
    x_BCHW, y_B = examples(model, 4)
    found = Square(attack=PGD(eps=0.0), queries=2)(model, x_BCHW, y_B, noise(4))
    assert torch.equal(found.x_adv, x_BCHW)
    assert torch.equal(found.correct_B, untouched(model, x_BCHW, y_B).correct_B)


def test_no_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        Square(queries=0)
