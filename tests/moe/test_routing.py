"""Gates, routes and pieces against known answers."""

import pytest
import torch

from moe.routing import Route, Routing, at_least_float32, straight_through_top1

SCORES_BE = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, -1.0, 4.0], [2.0, 7.0, 7.0]])
CHOSEN_B = torch.tensor([1, 0, 2, 1])  # ties go to the lowest index


def test_gates_are_one_hot_and_ties_go_to_the_lowest_index() -> None:
    gates_BE = straight_through_top1(SCORES_BE)
    assert torch.equal(gates_BE, torch.eye(3)[CHOSEN_B])


def test_gates_pass_a_gradient_to_the_chosen_score_alone() -> None:
    scores_BE, grad_BE = SCORES_BE.clone().requires_grad_(), torch.randn(4, 3)
    straight_through_top1(scores_BE).backward(grad_BE)
    assert scores_BE.grad is not None
    assert torch.equal(scores_BE.grad, grad_BE * torch.eye(3)[CHOSEN_B])


def test_route_sorts_images_by_expert_and_keeps_their_order_within_one() -> None:
    route = Route.top1(SCORES_BE)
    assert route.order_B.tolist() == [1, 0, 3, 2]
    assert route.counts == (1, 2, 1)
    assert route.chosen_B.tolist() == [1, 0, 2, 1]
    assert route.order_B[route.inverse_B].tolist() == [0, 1, 2, 3]
    assert route.gate_B.tolist() == [1.0] * 4


def test_gates_of_a_route_pass_a_gradient_to_the_chosen_scores() -> None:
    scores_BE = SCORES_BE.clone().requires_grad_()
    Route.top1(scores_BE).gate_B.backward(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert scores_BE.grad is not None
    # sorted order is images 1, 0, 3, 2
    want = [[0, 20, 0], [10, 0, 0], [0, 0, 40], [0, 30, 0]]
    assert scores_BE.grad.tolist() == want


def test_given_route_may_leave_experts_idle() -> None:
    route = Route.fixed(torch.tensor([2, 2]), torch.zeros(2, 4))
    assert route.counts == (0, 0, 2, 0)


def test_route_rejects_another_batch_and_unknown_experts() -> None:
    with pytest.raises(ValueError, match=r"route has shape \(3,\), want \(2,\)"):
        Route.fixed(torch.tensor([0, 1, 0]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"route names expert 5, valid are 0 to 1"):
        Route.fixed(torch.tensor([0, 5]), torch.zeros(2, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_cover_the_sorted_batch_with_one_expert_each(size: int) -> None:
    chosen_B = torch.tensor([3, 0, 3, 3, 0, 1, 3, 3, 0])  # nobody chose expert 2
    route = Route.fixed(chosen_B, torch.zeros(9, 4))
    seen, sizes = [], dict[int, list[int]]()
    for rows, own in route.pieces(size):
        sizes.setdefault(int(own.chosen_B[0]), []).append(len(own.chosen_B))
        here_B = torch.arange(9)[rows]
        assert 1 <= len(here_B) <= size
        assert sum(own.counts) == len(here_B)
        assert torch.equal(own.chosen_B, chosen_B[route.order_B][rows])
        assert own.counts[int(own.chosen_B[0])] == len(here_B)
        assert len(own.gate_B) == len(here_B)
        seen += here_B.tolist()
    assert seen == list(range(9))
    for expert, count in ((0, 3), (1, 1), (3, 5)):
        assert len(sizes[expert]) == -(-count // size)
        assert max(sizes[expert]) - min(sizes[expert]) <= 1


def test_routing_keeps_each_layers_scores_and_decisions_in_order() -> None:
    routing, other_BE = Routing(), -SCORES_BE
    for scores_BE in (SCORES_BE, other_BE):
        routing.decide(scores_BE)
    assert torch.equal(torch.stack(routing.scores), torch.stack([SCORES_BE, other_BE]))
    assert [chosen.tolist() for chosen in routing.chosen] == [[1, 0, 2, 1], [0, 0, 1, 0]]


def test_routing_follows_a_given_route_layer_by_layer() -> None:
    fixed_BL = torch.tensor([[0, 2], [1, 2], [0, 2], [1, 0]])
    routing = Routing(fixed_BL=fixed_BL)
    for layer in range(2):
        assert torch.equal(routing.decide(SCORES_BE).chosen_B, fixed_BL[:, layer])
    assert torch.equal(torch.stack(routing.chosen, 1), fixed_BL)


def test_routing_without_gate_gradient_keeps_the_scores_gradient() -> None:
    routing, scores_BE = Routing(gate_gradient=False), SCORES_BE.clone().requires_grad_()
    assert not routing.decide(scores_BE).gate_B.requires_grad
    assert routing.scores[0].requires_grad


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_short_floats_widen_and_long_ones_stay(given: torch.dtype, want: torch.dtype) -> None:
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == want
