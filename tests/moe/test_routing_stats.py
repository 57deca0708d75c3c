"""Diagnostics of routes against answers worked by hand."""

import math

import pytest
import torch

from moe.routing_stats import class_load, effective_experts, entropy, flip_rate, load


def test_load_is_the_share_of_decisions_idle_experts_included() -> None:
    assert load(torch.tensor([0, 2, 2, 2]), 4).tolist() == [0.25, 0.0, 0.75, 0.0]
    assert load(torch.tensor([[0, 1], [1, 1]]), 2).tolist() == [0.25, 0.75]
    assert load(torch.tensor([], dtype=torch.int64), 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("shares", "want"),
    [
        ([1.0, 0.0, 0.0], 0.0),
        ([0.25] * 4, math.log(4)),
        ([0.5, 0.25, 0.25], 1.5 * math.log(2)),
    ],
)
def test_entropy_is_in_nats_and_its_exponential_counts_experts(
    shares: list[float], want: float
) -> None:
    assert float(entropy(torch.tensor(shares))) == pytest.approx(want)
    assert float(effective_experts(torch.tensor(shares))) == pytest.approx(math.exp(want))


def test_class_load_has_a_row_for_each_class() -> None:
    route_B, y_B = torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 2, 2])
    want = [[1 / 3, 2 / 3], [0.0, 0.0], [0.5, 0.5]]  # nobody has class 1
    torch.testing.assert_close(class_load(route_B, y_B, 2, 3), torch.tensor(want))


def test_class_load_of_layers_that_route_for_themselves_counts_every_decision() -> None:
    route_BL, y_B = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([0, 1])
    want = [[1 / 3, 2 / 3], [0.0, 1.0]]
    torch.testing.assert_close(class_load(route_BL, y_B, 2, 2), torch.tensor(want))


def test_flip_rate_is_the_share_of_changed_decisions() -> None:
    before, after = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 0], [1, 0]])
    assert float(flip_rate(before, after)) == 0.25
    assert float(flip_rate(before, before)) == 0.0
