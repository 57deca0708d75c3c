"""The sorted dispatch in one graph against the network, at batch sizes that were not traced."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.network import Network
from moe.sorted_graph import exportable_for_batches, loggable

NETS = {
    "small, 3 experts": {"num_experts": 3, "ratio": 0.25},
    "small, dense": {"num_experts": 1, "ratio": 0.25},
    "small, per layer": {"num_experts": 2, "ratio": 0.25, "router_scope": "per_layer"},
    "resnet18": {"backbone": "resnet18", "size": 16, "ratio": 0.125},
    "mixture": {"backbone": "mixture", "num_experts": 3},
    "mixture, one of three": {"backbone": "mixture", "num_experts": 3, "top_k": 1, "gate": "hard"},
    "dual": {"backbone": "dual"},
    "vit": {"backbone": "vit", "num_experts": 1},
}


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_traced_graph_answers_as_the_network(
    build: Callable[..., Network], name: str, tmp_path: Path
) -> None:
    model, size = build(**NETS[name]), NETS[name].get("size", 8)
    x_BCHW = torch.rand(20, 3, size, size, generator=torch.Generator().manual_seed(1))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        exportable_for_batches(model), (x_BCHW[:4],), dynamic_shapes=[{0: auto}]
    )
    torch.export.save(program, tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    wanted = model(x_BCHW)
    for batch in (1, 2, 20):  # of one image, all experts but one get none
        logits_BK, route = graph(x_BCHW[:batch])
        torch.testing.assert_close(logits_BK, wanted.logits[:batch], rtol=1e-5, atol=1e-5)
        assert torch.equal(route, wanted.route[:batch])


def test_graph_spends_what_the_sorted_net_does(small: Network) -> None:
    def flops(module: torch.nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
        return int(counter.get_total_flops())

    assert flops(exportable_for_batches(small)) == flops(small)


def test_graph_has_the_gradient_of_the_images(small: Network) -> None:
    x_BCHW = torch.rand(6, 3, 8, 8, requires_grad=True)
    program = torch.export.export(
        exportable_for_batches(small),
        (x_BCHW.detach(),),
        dynamic_shapes=[{0: torch.export.Dim.AUTO}],
    )
    (found,) = torch.autograd.grad(program.module()(x_BCHW)[0].square().sum(), x_BCHW)
    route_B = small(x_BCHW).route
    (wanted,) = torch.autograd.grad(small.along(x_BCHW, route_B).square().sum(), x_BCHW)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.any()


@torch.no_grad()
def test_routed_tokens_give_logits_alone(build: Callable[..., Network]) -> None:
    model = build(backbone="vit", num_experts=2)
    logits, classifier = loggable(model)
    assert classifier is None
    x_BCHW = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(logits(x_BCHW), model(x_BCHW).logits, rtol=1e-4, atol=1e-5)
