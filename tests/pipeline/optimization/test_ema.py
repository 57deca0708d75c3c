"""The average of the weights against the sum written out; what is deployed, kept and restored."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.network import Network
from pipeline.optimization.ema import WeightAverage


def shaken(model: Network, seed: int) -> dict[str, Tensor]:
    """Give every weight and running statistic new numbers; return them in float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.startswith("normalize"):
            continue
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            tensor.fill_(seed)
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def by_definition(seen: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Each update's share is (1 - d) times the decays of all that came after it."""
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(1, len(seen))]
    shares = [1.0, *(1 - d for d in decays)]
    for index in range(len(shares)):
        for later in decays[index:]:
            shares[index] *= later
    assert sum(shares) == pytest.approx(1)
    return {
        name: sum(
            (share * step[name] for share, step in zip(shares, seen, strict=True)), torch.zeros(())
        )
        for name in seen[0]
    }


@pytest.mark.parametrize("decay", [0.25, 0.99])
@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_average_of_weights_and_statistics_is_the_weighted_sum_of_all_updates(
    build: Callable[..., Network], decay: float, scope: str
) -> None:
    model, average = build(ratio=0.0625, router_scope=scope), WeightAverage(decay)
    seen = []
    for update in range(1, 9):
        seen.append(shaken(model, update))
        average.follow(model)
        wanted = by_definition(seen, decay)
        found = average.deployed(model).state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(
                    tensor.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name
                )
            else:
                assert tensor == update, "a count is the newest one"
    assert average.updates == 8


def test_average_of_weights_that_rest_is_those_weights_to_the_bit(small: Network) -> None:
    average = WeightAverage(0.999)
    for _ in range(30):
        average.follow(small)
    found = average.deployed(small).state_dict()
    assert all(torch.equal(found[name], w) for name, w in small.state_dict().items())


def test_average_leaves_the_model_alone_and_takes_no_gradient(small: Network) -> None:
    small.train()
    (small(torch.rand(4, 3, 8, 8)).logits.square().sum()).backward()
    grads = [p.grad for p in small.parameters()]
    before, average = copy.deepcopy(small.state_dict()), WeightAverage(0.9)
    average.follow(small)
    shaken(small, 1)
    now = copy.deepcopy(small.state_dict())
    average.follow(small)
    mean = average.deployed(small)
    assert mean is not small
    assert all(torch.equal(now[name], w) for name, w in small.state_dict().items())
    assert any(not torch.equal(before[name], w) for name, w in mean.state_dict().items())
    assert small.training
    assert all(p.requires_grad for p in small.parameters())
    assert [p.grad for p in small.parameters()] == grads
    assert not mean.training
    assert not any(p.requires_grad or p.grad is not None for p in mean.parameters())


def test_without_a_decay_the_model_itself_is_deployed(small: Network) -> None:
    average = WeightAverage()
    average.follow(small)
    assert average.deployed(small) is small
    assert average.saved(small) == {}


def test_average_that_was_saved_goes_on_as_if_it_had_not_been(small: Network) -> None:
    average = WeightAverage(0.9)
    for update in range(3):
        shaken(small, update)
        average.follow(small)
    kept, mean = average.saved(small), average.deployed(small).state_dict()
    again, resumed = copy.deepcopy(small), WeightAverage(0.9)
    again.load_state_dict(mean)  # as the loop does, from the checkpoint's model
    resumed.restore(copy.deepcopy(kept), again)
    for name, weight in small.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), "the weights that train are back"
    for model, own in ((small, average), (again, resumed)):
        shaken(model, 7)
        own.follow(model)
    assert resumed.updates == average.updates == 4
    one, other = average.deployed(small).state_dict(), resumed.deployed(again).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_average_begins_anew_for_another_network(build: Callable[..., Network]) -> None:
    average, wide, narrow = WeightAverage(0.9), build(ratio=0.125), build(ratio=0.0625)
    average.follow(wide)
    assert average.deployed(narrow) is narrow
    assert average.saved(narrow) == {}
    average.follow(narrow)
    found = average.deployed(narrow).state_dict()
    assert all(torch.equal(found[name], w) for name, w in narrow.state_dict().items())
    assert average.updates == 1
