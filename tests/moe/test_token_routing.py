"""Token routing: known answers of the losses and of capacity, definitions written out in loops.

Shapes: B images, T tokens, N = B T, E experts, C experts per token, S slots.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.token_routing import (
    AuxiliaryWeights,
    TokenRoute,
    TokenRouter,
    auxiliary_loss,
    balance_statistics,
    expert_capacity,
    expert_choice,
    gshard_loss,
    soft_slots,
    squared_variation,
    token_gates,
    within_capacity,
)

GATES = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])


def test_known_answers_of_the_balance_losses() -> None:
    first_E = torch.nn.functional.one_hot(GATES.argmax(1), 3).float().mean(0)
    assert float(gshard_loss(GATES.mean(0), first_E)) == pytest.approx(1.0875, abs=1e-6)
    assert float(squared_variation(GATES.sum(0))) == pytest.approx(0.03875, abs=1e-7)
    assert float(squared_variation(GATES.mean(0))) == pytest.approx(0.03875, abs=1e-7)


@pytest.mark.parametrize(
    ("tokens", "top_k", "factor", "experts", "want"),
    [(32, 2, 1.0, 32, 4), (32, 2, 1.5, 8, 12), (65, 1, 1.05, 8, 12), (64, 1, 1.0, 2, 32)],
)
def test_capacity_is_rounded_up_to_a_multiple_of_four(
    tokens: int, top_k: int, factor: float, experts: int, want: int
) -> None:
    assert expert_capacity(tokens, top_k, factor, experts) == want


def kept_by_hand(
    chosen: list[list[int]], gates: list[list[float]], capacity: int, priority: bool
) -> list[list[bool]]:
    order = list(range(len(chosen)))
    if priority:
        order.sort(key=lambda n: -max(gates[n]))
    taken: dict[int, int] = {}
    kept = [[False] * len(row) for row in chosen]
    for rank in range(len(chosen[0])):
        for n in order:
            expert = chosen[n][rank]
            taken[expert] = taken.get(expert, 0) + 1
            kept[n][rank] = taken[expert] <= capacity
    return kept


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_capacity_takes_first_choices_first(priority: bool, top_k: int) -> None:
    torch.manual_seed(0)
    chosen_NC, gates_NC = token_gates(torch.randn(40, 3) * 2, top_k)
    kept_NC = within_capacity(chosen_NC, gates_NC, 3, 12, priority=priority)
    want = kept_by_hand(chosen_NC.tolist(), gates_NC.tolist(), 12, priority)
    assert kept_NC.tolist() == want
    assert not bool(kept_NC.all())


def test_priority_keeps_the_tokens_of_the_largest_gates() -> None:
    gates_N1 = torch.tensor([[0.5], [0.9], [0.6], [0.8], [0.7]])
    kept_N1 = within_capacity(torch.zeros(5, 1).long(), gates_N1, 2, 2, priority=True)
    assert kept_N1.flatten().tolist() == [False, True, False, True, False]


def test_gates_are_those_of_a_softmax_over_all_experts_or_sum_to_one() -> None:
    scores_NE = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    chosen_NC, gates_NC = token_gates(scores_NE, 2)
    assert chosen_NC.tolist() == [[1, 3]]  # ties go to the lowest index
    whole = 2 * math.exp(3) + math.exp(2) + math.exp(1)
    assert_close(gates_NC, torch.full((1, 2), math.exp(3) / whole))
    assert_close(token_gates(scores_NE, 2, renormalize=True)[1], torch.full((1, 2), 0.5))


def test_route_sorts_pairs_by_expert_and_undoes_it() -> None:
    chosen_NC = torch.tensor([[2, 0], [0, 2], [2, 1], [0, 1]])
    gates_NC = torch.tensor([[0.6, 0.3], [0.5, 0.4], [0.7, 0.1], [0.9, 0.05]], dtype=torch.float64)
    route = TokenRoute.of(chosen_NC, gates_NC, 4)
    assert route.counts == [3, 2, 3, 0]
    assert chosen_NC.flatten()[route.order_P].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    x_ND = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert_close(route.combine(route.dispatch(x_ND)), x_ND * gates_NC.sum(1, keepdim=True))
    assert torch.autograd.gradcheck(lambda x: route.combine(route.dispatch(x)), (x_ND,))


def test_load_is_the_probability_of_being_chosen_if_the_noise_is_drawn_again() -> None:
    """Of k - 1 other experts above the threshold and one at it, by a million draws."""
    torch.manual_seed(0)
    scores_NE = torch.tensor([[0.3, 0.1, -0.2]], dtype=torch.float64)
    noisy_NE = scores_NE + torch.tensor([[0.2, -0.1, 0.05]], dtype=torch.float64)
    chosen_NC, _ = token_gates(noisy_NE, 2)  # 0 and 1; the threshold is 0.0
    noise_std = 1.2  # sigma 0.4
    found_E = balance_statistics(scores_NE, noisy_NE, chosen_NC, noise_std)[1]
    again_ME = scores_NE + 0.4 * torch.randn(1_000_000, 3, dtype=torch.float64)
    assert_close(found_E, (again_ME > 0.0).double().mean(0), rtol=0, atol=2e-3)


def test_auxiliary_loss_adds_up_layers_and_depends_on_the_number_of_experts() -> None:
    torch.manual_seed(0)
    weights = AuxiliaryWeights(importance=0.5, load=0.25, gshard=2.0, z=0.125)
    for experts in (2, 4):
        layers, want = [], 0.0
        for _ in range(3):
            scores_NE = torch.randn(50, experts, dtype=torch.float64)
            noisy_NE = scores_NE + torch.randn_like(scores_NE) / experts
            chosen_NC, _ = token_gates(noisy_NE, 1)
            layers.append(balance_statistics(scores_NE, noisy_NE, chosen_NC, 1.0))
            soft = scores_NE.softmax(1).sum(0)
            probability = 1 - torch.distributions.Normal(0.0, 1.0).cdf(
                (noisy_NE.amax(1, keepdim=True) - scores_NE) * experts
            )
            load = probability.sum(0)
            first = torch.bincount(chosen_NC.flatten(), minlength=experts).double() / 50
            gate = noisy_NE.softmax(1).mean(0)
            z = scores_NE.exp().sum(1).log().square().mean()
            if experts == 2:
                own = 2.0 * experts**2 * (gate * first).mean()
            else:
                own = 0.5 * (soft.std(correction=0) / soft.mean()) ** 2
                own = own + 0.25 * (load.std(correction=0) / load.mean()) ** 2
            want += float(own + 0.125 * z)
        assert float(auxiliary_loss(torch.stack(layers), weights)) == pytest.approx(want, rel=1e-10)


def test_expert_choice_takes_the_tokens_that_want_an_expert_most() -> None:
    torch.manual_seed(0)
    scores_BTE = torch.randn(3, 7, 4)
    route = expert_choice(scores_BTE, 2)
    gates_BTE = scores_BTE.softmax(2)
    for image in range(3):
        for expert in range(4):
            taken = gates_BTE[image, :, expert].topk(2).indices.tolist()
            for token in range(7):
                want = float(gates_BTE[image, token, expert]) if token in taken else 0.0
                assert float(route.expert_weights[image, token, expert]) == pytest.approx(want)
    assert bool((route.dispatch_BTS.sum(1) == 1).all())


def test_soft_slots_are_distributions_over_tokens_and_over_slots() -> None:
    torch.manual_seed(0)
    route = soft_slots(torch.randn(2, 5, 6), 3)
    assert_close(route.dispatch_BTS.sum(1), torch.ones(2, 6))
    assert_close(route.expert_weights.sum(2), torch.ones(2, 5))


def test_soft_router_sees_directions_and_one_scale() -> None:
    torch.manual_seed(0)
    router = TokenRouter(6, 3, kind="soft", slots=2)
    x_BTD = torch.randn(2, 4, 6)
    found = router(x_BTD)
    assert_close(router(5 * x_BTD), found)
    assert found.shape == (2, 4, 6)
    assert float(found.detach().abs().amax()) <= 1
    assert router.scale is not None
    router.scale.data.fill_(3.0)
    assert_close(router(x_BTD), 3 * found)


@pytest.mark.parametrize("kind", ["top_k", "soft"])
def test_router_is_computed_in_float32_under_autocast(kind: str) -> None:
    torch.manual_seed(0)
    router = TokenRouter(16, 4, kind=kind)  # type: ignore[arg-type]
    x_BTD = torch.randn(2, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found: Tensor = router(x_BTD)
    assert found.dtype == torch.float32
    assert torch.equal(found, router(x_BTD))
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x_BTD.bfloat16()).dtype == torch.float32
