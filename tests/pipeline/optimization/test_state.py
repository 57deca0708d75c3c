"""One update: what moves, what is reported, and how workers stay equal.

Shapes: B images, CHW channels and sides.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.network import Network
from pipeline.algorithms import ALGORITHMS
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.standard import Standard
from pipeline.algorithms.trades import Trades
from pipeline.attacks.pgd import PGD
from pipeline.context import Session
from pipeline.loop import GATE_STEPS, RouterError, check_gate
from pipeline.optimization.ema import WeightAverage
from pipeline.optimization.losses import cross_entropy_per_image
from pipeline.optimization.state import GROUPS, NonFiniteError, TrainState
from pipeline.seeding import Noise, generator_at
from tests.helpers.pair import run_pair


def state_of(model: Network, **settings: Any) -> TrainState:
    state = TrainState(model, {}, **settings)
    state.optimizers = {
        group: torch.optim.SGD(members, lr=0.1, momentum=0.9)
        for group in GROUPS
        if (members := state.parameters(group))
    }
    return state


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    x_BCHW = torch.rand(count, 3, 8, 8, generator=generator_at("cpu", "batch"))
    return x_BCHW, torch.arange(count) % 4


def loss_of(state: TrainState) -> Tensor:
    x_BCHW, y_B = batch()
    return cross_entropy_per_image(state.model(x_BCHW).logits, y_B).mean()


def moved(state: TrainState, before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in state.model.named_parameters() if not torch.equal(p, before[n])}


def weights(model: Network) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def names(state: TrainState, *groups: str) -> set[str]:
    wanted = {id(p) for group in groups for p in state.parameters(group)}
    return {name for name, p in state.model.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_groups_part_the_parameters(build: Callable[..., Network], scope: str) -> None:
    state = state_of(build(ratio=0.125, router_scope=scope))
    router, experts = names(state, "router"), names(state, "experts")
    assert router
    assert not router & experts
    assert router | experts == set(weights(state.model))
    assert all(name.startswith("router.") or ".gate." in name for name in router)


@pytest.mark.parametrize("groups", [("experts",), ("router",), GROUPS])
@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_descend_updates_the_named_groups_alone(
    build: Callable[..., Network], scope: str, groups: tuple[str, ...]
) -> None:
    state = state_of(build(ratio=0.125, router_scope=scope))
    before = weights(state.model)
    state.descend(loss_of(state), *groups)
    assert moved(state, before)
    assert moved(state, before) <= names(state, *groups)
    others = set(GROUPS) - set(groups)
    assert all(p.grad is None for other in others for p in state.parameters(other))


def test_descend_forgets_the_gradients_of_the_update_before(small: Network) -> None:
    state, fresh = state_of(small), state_of(copy.deepcopy(small))
    for parameter in state.parameters("experts"):
        parameter.grad = torch.full_like(parameter, 1e3)
    for each in (state, fresh):
        each.descend(loss_of(each), "experts")
    one, other = weights(state.model), weights(fresh.model)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_parameter_that_the_loss_does_not_reach_gets_a_zero_gradient(small: Network) -> None:
    state = state_of(small)
    state.descend(small.router_scores(batch()[0]).square().mean(), *GROUPS)
    grads = [p.grad for p in state.parameters("experts")]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_resting_groups_are_awake_again_after_an_error(small: Network) -> None:
    state = state_of(small.train())
    with pytest.raises(RuntimeError, match="on purpose"), state.only("router"):
        raise RuntimeError("on purpose")
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert all(module.training for module in small.modules())
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in norms)
    assert small.gate_gradient


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_is_reported_with_step_and_name(small: Network, bad: float) -> None:
    state = state_of(small)
    state.descend(loss_of(state) * bad, "experts")
    with pytest.raises(NonFiniteError, match=rf"^step 17: loss of experts is {bad}$"):
        state.check(17)


def test_gradient_that_is_not_finite_is_reported_though_the_loss_is(small: Network) -> None:
    state = state_of(small)
    state.descend(loss_of(state) + (0 * small.body.head.weight.sum()).sqrt(), "experts")
    with pytest.raises(NonFiniteError, match="step 3: gradient norm of experts is nan"):
        state.check(3)


def test_attack_that_is_not_finite_is_reported(small: Network) -> None:
    state, (x_BCHW, _) = state_of(small), batch()
    state.perturb(PGD(), lambda _model, _x: lambda x: float("nan") * x.sum((1, 2, 3)), x_BCHW)
    with pytest.raises(NonFiniteError, match="step 1: adversarial images is nan"):
        state.check(1)


def test_check_returns_what_was_watched_and_forgets_it(small: Network) -> None:
    state = state_of(small)
    loss = loss_of(state)
    state.descend(loss, *GROUPS)
    found = state.check(1)
    assert found["loss of experts and router"] == pytest.approx(loss.item())
    squares = [p.grad.square().sum() for p in state.parameters("router") if p.grad is not None]
    wanted = torch.stack(squares).sum().sqrt().item()
    assert found["gradient norm of router"] == pytest.approx(wanted, rel=1e-5)
    assert state.check(2) == {}


def test_router_without_a_gradient_is_refused_in_the_first_updates(small: Network) -> None:
    state = state_of(small)
    small.gate_gradient = False  # as a router would be that hands on integer choices
    state.descend(loss_of(state), *GROUPS)
    watched = state.check(1)
    for update in range(1, GATE_STEPS + 1):
        with pytest.raises(RouterError, match=f"step {update}: the router gets no gradient"):
            check_gate(update, watched)
    check_gate(GATE_STEPS + 1, watched)


def test_router_with_a_gradient_and_a_dense_net_pass(build: Callable[..., Network]) -> None:
    for settings in ({"num_experts": 2}, {"num_experts": 1}):
        state = state_of(build(ratio=0.125, **settings))
        state.descend(loss_of(state), *GROUPS)
        check_gate(1, state.check(1))


def test_watched_gradient_norm_is_the_one_before_clipping(small: Network) -> None:
    state, plain = state_of(copy.deepcopy(small), clip_norm=1e-3), state_of(small)
    for each in (state, plain):
        each.descend(loss_of(each), *GROUPS)
    assert state.check(1) == plain.check(1)
    for group in GROUPS:
        grads = [p.grad for p in state.parameters(group) if p.grad is not None]
        assert torch.nn.utils.get_total_norm(grads).item() <= 1e-3 * (1 + 1e-6)  # a rounding


# Two workers


class Brightness(nn.Module):
    """A router that sends images above half brightness to expert 1; its weight can learn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-1.0, 1.0]))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scores_BE: Tensor = x_BCHW.mean((1, 2, 3))[:, None] * self.weight
        return scores_BE + 0 * self.norm(scores_BE)


def uneven() -> tuple[Tensor, Tensor]:
    """Eight images of which the first four, rank 0's, are all dark, the others mixed."""
    level_B = torch.tensor([0.1, 0.2, 0.15, 0.12, 0.9, 0.1, 0.8, 0.2])[:, None, None, None]
    x_BCHW = 0.2 * torch.rand(8, 3, 8, 8, generator=generator_at("cpu", "uneven")) + level_B
    return x_BCHW.clamp(0, 1), torch.arange(8) % 4


def gather(tensors: list[Tensor]) -> list[Tensor]:
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    parts = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(parts, flat)
    return parts


RECIPE = {"awp_gamma": 0.01, "clip_norm": 0.5, "label_smoothing": 0.1}


def differing(model: Network, rank: int, **recipe: float) -> list[str]:
    """Train with every algorithm in turn; name those after which the replicas differ."""
    x_BCHW, y_B = (tensor[4 * rank :][:4] for tensor in uneven())
    counts = model.eval()(x_BCHW).route.bincount(minlength=2).tolist()
    assert counts == [[4, 0], [2, 2]][rank], "rank 0 gives one expert no image"
    state = state_of(model.train(), average=Session(rank, 2).average, **recipe)
    state.ema, bad = WeightAverage(0.9), []
    for step, name in enumerate(n for n in ALGORITHMS if n != "jtdmoe"):
        state.noise = Noise(generator_at("cpu", step), rank, 2)
        ALGORITHMS[name]().step(state, x_BCHW, y_B)
        state.check(step)
        state.ema.follow(model)
        nets = (model, state.deployed)
        floats = [t for n in nets for t in n.state_dict().values() if t.is_floating_point()]
        slots = [s for o in state.optimizers.values() for s in o.state.values()]
        one, other = gather([*floats, *(value for slot in slots for value in slot.values())])
        if not torch.equal(one, other):
            bad.append(name)
    return bad


def gradients(
    model: Network, algorithm: Any, recipe: dict[str, float], rank: int, world: int
) -> tuple[Any, Any]:
    """Take a step in eval mode, where BatchNorm does not look at the batch."""
    model, share = copy.deepcopy(model).eval(), 8 // world
    x_BCHW, y_B = (tensor[rank * share :][:share] for tensor in uneven())
    state = state_of(model, average=Session(rank, world).average, **recipe)
    state.noise = Noise(generator_at("cpu", 1), rank, world)
    algorithm.step(state, x_BCHW, y_B)
    return [parameter.grad for parameter in model.parameters()], state.check(1)


TRADES = Trades(beta=2.0, attack=PGD(eps=0.05, step_size=0.02, steps=2))
JOINT: tuple[tuple[Any, dict[str, float]], ...] = ((Standard(), {}), (TRADES, {}), (TRADES, RECIPE))


def work(rank: int, folder: str, model: Network) -> None:
    own = copy.deepcopy(model)  # what comes from the parent is in shared memory
    found = [gradients(own, algorithm, recipe, rank, 2) for algorithm, recipe in JOINT]
    bad = [differing(copy.deepcopy(own), rank, **recipe) for recipe in ({}, RECIPE)]
    torch.save({"gradients": found, "differing": bad}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def bright(build: Callable[..., Network]) -> Network:
    model = build(ratio=0.125)
    model.router = Brightness()
    return model


@pytest.fixture(scope="module")
def workers(bright: Network, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two workers of one run found."""
    folder = tmp_path_factory.mktemp("workers")
    run_pair(work, folder, bright)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_replicas_stay_equal_to_the_bit_where_one_gives_an_expert_no_image(
    workers: list[Any],
) -> None:
    assert [found["differing"] for found in workers] == [[[], []], [[], []]]


@pytest.mark.parametrize("number", range(len(JOINT)))
def test_gradient_of_two_workers_is_that_of_one_on_the_joint_batch(
    bright: Network, workers: list[Any], number: int
) -> None:
    wanted, numbers = gradients(bright, *JOINT[number], 0, 1)
    parts = [name for name in numbers if name.startswith("router scores")]
    for name in parts:  # of the workers' parts, the mean of the maxima
        numbers.pop(name)
    names = [name for name, _ in bright.named_parameters()]
    for found in workers:
        grads, watched = found["gradients"][number]
        for name, grad, whole in zip(names, grads, wanted, strict=True):
            torch.testing.assert_close(grad, whole, rtol=1e-4, atol=1e-6, msg=name)
        watched = {name: watched[name] for name in numbers}
        assert watched == pytest.approx(numbers, rel=1e-4), "so are the numbers that are reported"


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_averaging_does_not_touch_what_did_not_change(
    build: Callable[..., Network], scope: str
) -> None:
    """The mean of three equal numbers may differ from them in the last bit."""

    def mean_of_three(flat: Tensor) -> None:
        flat.copy_((flat + flat + flat) / 3)

    model = build(ratio=0.125, router_scope=scope)
    algorithm, state = AdvMoE(), state_of(model.train(), average=mean_of_three)
    before = {name: b.clone() for name, b in model.named_buffers()}
    algorithm._step_experts(state, *batch())
    after = dict(model.named_buffers())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not {n for n in changed if n.startswith(("router.", "normalize.")) or ".gate." in n}


def test_sum_and_mean_over_one_worker_change_nothing() -> None:
    numbers = torch.tensor([1.0, 2.0])
    Session().total(numbers)
    Session().average(numbers)
    assert numbers.tolist() == [1.0, 2.0]
