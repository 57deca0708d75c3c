"""Routing measures on routes that can be counted by hand."""

import pytest
import torch
from torch import Tensor

from pipeline.measures.routing_change import expert_overlap, flip_matrix, flip_rates, router_margin


def test_flips_are_counted_among_all_the_broken_and_the_surviving() -> None:
    before, after = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 0, 2])
    stands_N = torch.tensor([True, False, True, False, False])
    assert flip_rates(before, after, stands_N) == pytest.approx(
        {"all": 2 / 5, "broken": 2 / 3, "surviving": 0.0}
    )


def test_flips_of_self_routing_layers_are_shares_of_decisions() -> None:
    before = torch.tensor([[0, 1], [1, 1]])
    after = torch.tensor([[1, 0], [1, 0]])
    rates = flip_rates(before, after, torch.tensor([False, True]))
    assert rates == pytest.approx({"all": 0.75, "broken": 1.0, "surviving": 0.5})


@pytest.mark.parametrize(("stands", "missing"), [(True, "broken"), (False, "surviving")])
def test_group_without_an_image_has_no_rate(stands: bool, missing: str) -> None:
    route = torch.tensor([0, 1])
    rates = flip_rates(route, 1 - route, torch.tensor([stands, stands]))
    assert missing not in rates
    assert set(rates.values()) == {1.0}


def test_flip_matrix_counts_decisions_by_expert_before_and_after() -> None:
    before, after = torch.tensor([[0, 0], [1, 2], [2, 2]]), torch.tensor([[0, 1], [1, 0], [0, 2]])
    matrix = flip_matrix(before, after, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]
    assert matrix.diagonal().sum() / matrix.sum() == (before == after).float().mean()


def slow_overlap(before: Tensor, after: Tensor) -> list[float]:
    """Sets of Python, layer by layer."""
    layers = []
    for layer in range(before.shape[1]):
        shares = []
        for old, new in zip(before[:, layer].tolist(), after[:, layer].tolist(), strict=True):
            one, two = set(old) - {-1}, set(new) - {-1}
            shares.append(len(one & two) / len(one | two) if one | two else 1.0)
        layers.append(sum(shares) / len(shares))
    return layers


def test_overlap_is_that_of_the_sets_of_experts() -> None:
    draws = torch.Generator().manual_seed(0)
    before, after = torch.randint(-1, 4, (2, 50, 3, 2), generator=draws)
    wanted = slow_overlap(before, after)
    assert expert_overlap(before, after, 4).tolist() == pytest.approx(wanted)


def test_overlap_of_single_experts_is_the_share_of_equal_choices() -> None:
    before, after = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2, 2, 0])
    assert expert_overlap(before, after, 3).tolist() == [0.5]
    layers = expert_overlap(before.view(2, 2), after.view(2, 2), 3)
    assert layers.tolist() == [1.0, 0.0]


def test_router_margin_is_the_gap_of_the_two_highest_scores() -> None:
    scores_NE = torch.tensor([[3.0, 1.0, 2.5], [0.0, 0.0, -1.0]])
    assert router_margin(scores_NE).tolist() == [0.5, 0.0]
    assert router_margin(scores_NE.view(1, 2, 3)).tolist() == [[0.5, 0.0]]


def test_router_margin_of_a_dense_net_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 experts, got 1"):
        router_margin(torch.zeros(4, 1))
