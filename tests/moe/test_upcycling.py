"""Upcycling: function preserving where gates sum to one, refused where shapes differ."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moe.backbones import BACKBONES
from moe.backbones.vit import ViT
from moe.network import Network
from moe.upcycling import relative_change, upcycle


def settled(model: Network, size: int) -> Network:
    """Move BatchNorm's statistics and all weights off their start."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()(torch.rand(8, 3, size, size))
    return model.eval()


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@pytest.mark.parametrize("name", ["small", "resnet18", "densenet", "vgg16", "wrn28_10"])
def test_s_dense_becomes_adv_moe_without_changing_its_outputs(name: str, scope: str) -> None:
    torch.manual_seed(0)
    form = {"ratio": 0.125, "router_scope": scope}
    dense = settled(BACKBONES[name](num_experts=1, **form).build(5, 8), 8)
    mixture = BACKBONES[name](num_experts=3, **form).build(5, 8).eval()
    upcycle(dense, mixture, 8)
    x_BCHW = torch.rand(12, 3, 8, 8)
    want = dense(x_BCHW).logits.detach()
    atol = 1e-6 * float(want.abs().max())
    assert_close(mixture(x_BCHW).logits.detach(), want, rtol=1e-6, atol=atol)
    assert relative_change(dense, mixture, 8) < 1e-6


@pytest.mark.parametrize(
    ("settings", "preserved"),
    [
        ({"top_k": 2, "renormalize": True}, True),
        ({"top_k": 2}, False),
        ({"top_k": 1}, False),
    ],
    ids=str,
)
def test_dense_transformer_becomes_a_mixture(settings: dict[str, Any], preserved: bool) -> None:
    torch.manual_seed(0)
    form: dict[str, Any] = {"size": "micro", "ratio": 0.125, "patch": 4}
    dense = settled(ViT(**form).build(5, 8), 8)
    mixture = ViT(num_experts=4, **form, **settings).build(5, 8).eval()
    before = {n: p.clone() for n, p in mixture.named_parameters() if ".router." in n}
    upcycle(dense, mixture, 8)
    assert (relative_change(dense, mixture, 8) < 1e-6) == preserved
    assert all(torch.equal(p, before[n]) for n, p in mixture.named_parameters() if n in before)
    stack = mixture.get_parameter("body.blocks.1.mlp.up_EHD")
    for expert in stack:
        assert torch.equal(expert, dense.get_parameter("body.blocks.1.up.weight"))


def test_networks_that_do_not_fit_are_refused() -> None:
    small = BACKBONES["small"]
    with pytest.raises(ValueError, match="starts from a dense network, got 2 experts"):
        upcycle(small(num_experts=2).build(5, 8), small(num_experts=2).build(5, 8), 8)
    dense = small(num_experts=1, ratio=0.25).build(5, 8)
    with pytest.raises(ValueError, match="which is no copy for each expert of"):
        upcycle(dense, small(num_experts=2, ratio=0.125).build(5, 8), 8)
    with pytest.raises(ValueError, match=r"the mixture has no body\.blocks"):
        upcycle(dense, BACKBONES["wrn28_10"](num_experts=2, ratio=0.125).build(5, 8), 8)
    half = [small(num_experts=experts, ratio=0.5).build(5, 8) for experts in (1, 2)]
    with pytest.raises(ValueError, match=r"the mixture has no body\.blocks\.0\.shortcut"):
        upcycle(*half, 8)  # the mixture's stem is as wide as its first block
