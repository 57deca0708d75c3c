"""Sparse upcycling keeps the function; a pathway costs what one route of the mixture costs."""

import pytest
import torch

from moe.backbones import BACKBONES
from moe.cost import cost
from moe.expert_pathway import fill_experts, pathway

NETS = [
    BACKBONES["small"](num_experts=3, ratio=0.25),
    BACKBONES["resnet18"](num_experts=2, ratio=0.25),
    BACKBONES["wrn28_10"](num_experts=2, ratio=0.1),
    BACKBONES["vgg16"](num_experts=2, ratio=0.1),
    BACKBONES["densenet"](num_experts=2, ratio=0.25),
    BACKBONES["small"](num_experts=2, ratio=0.25, router_scope="per_layer"),
]


@pytest.mark.parametrize("net", NETS, ids=str)
def test_mixture_starts_as_the_function_of_its_pathway_whatever_the_route(net: object) -> None:
    torch.manual_seed(0)
    dense = pathway(net.build(10, 32))  # type: ignore[attr-defined]
    x = torch.rand(6, 3, 32, 32)
    dense(x)  # BatchNorm's statistics are no longer those of a new net
    mixture = net.build(10, 32)  # type: ignore[attr-defined]
    fill_experts(dense, mixture)
    dense.eval(), mixture.eval()
    with torch.no_grad():
        want = dense(x).logits
        torch.testing.assert_close(mixture(x).logits, want, rtol=1e-6, atol=1e-6)
        chosen = mixture(x).route
        for expert in range(mixture.num_experts):
            got = mixture.along(x, torch.full_like(chosen, expert))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("net", NETS[:5], ids=str)
def test_pathway_costs_one_route_without_the_router(net: object) -> None:
    mixture = net.build(10, 32)  # type: ignore[attr-defined]
    whole, alone = cost(mixture, 32), cost(pathway(mixture), 32)
    assert alone.gmac == pytest.approx(whole.gmac - whole.gmac_router, rel=1e-9)
    assert alone.gmac_router == 0


def test_a_dense_net_has_no_pathway_and_a_net_of_another_shape_is_named() -> None:
    small = BACKBONES["small"]
    with pytest.raises(ValueError, match="num_experts must be at least 2, got 1"):
        pathway(small(num_experts=1, ratio=0.5).build(10, 32))
    narrow = pathway(small(num_experts=2, ratio=0.25).build(10, 32))
    with pytest.raises(ValueError, match=r"conv\.weight_FCRR has shape .*, the dense net has"):
        fill_experts(narrow, small(num_experts=2, ratio=0.5).build(10, 32))
