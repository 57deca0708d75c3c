"""The exported graph against the network that it came from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe.export import exportable, exportable_parts, exportable_with_route
from moe.network import Network

NETS = {
    "small, shared": {"num_experts": 2},
    "small, 3 experts": {"num_experts": 3, "ratio": 0.25},
    "small, per layer": {"num_experts": 3, "ratio": 0.25, "router_scope": "per_layer"},
    "small, dense": {"num_experts": 1, "ratio": 0.25},
    "resnet18, shared": {"backbone": "resnet18", "size": 16, "ratio": 0.125},
    "resnet18, per layer": {
        "backbone": "resnet18",
        "size": 16,
        "ratio": 0.125,
        "router_scope": "per_layer",
    },
    "resnet18 above 64 px": {"backbone": "resnet18", "size": 65, "ratio": 0.125},
    "wrn28_10, shared": {"backbone": "wrn28_10", "size": 16, "ratio": 0.0625},
    "wrn28_10 above 64 px": {"backbone": "wrn28_10", "size": 65, "ratio": 0.0625},
    "vgg16, shared": {"backbone": "vgg16", "size": 16, "ratio": 0.125, "num_experts": 3},
    "densenet, per layer": {"backbone": "densenet", "ratio": 0.25, "router_scope": "per_layer"},
    "densenet, dense": {"backbone": "densenet", "ratio": 0.25, "num_experts": 1},
}


TRACED = ("shared", "per layer", "dense")


def images(count: int, size: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def traced(module: nn.Module, example_BCHW: Tensor) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    return torch.export.export(module, (example_BCHW,), dynamic_shapes=[{0: auto}])


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_exportable_gives_the_logits_of_the_network(
    build: Callable[..., Network], name: str
) -> None:
    model = build(**NETS[name])
    module, size = exportable(model), NETS[name].get("size", 8)
    x_BCHW = images(40, size)
    wanted = model(x_BCHW)
    experts = wanted.route.unique().numel()
    assert experts == NETS[name].get("num_experts", 2), "the images must reach every expert"
    for batch in (1, 2, 7, 40):
        found = module(x_BCHW[:batch])
        assert isinstance(found, Tensor)
        same(found, wanted.logits[:batch])


@pytest.mark.parametrize("name", [name for name in NETS if name.partition(", ")[2] in TRACED])
@torch.no_grad()
def test_traced_graph_takes_batches_of_other_sizes(
    build: Callable[..., Network], name: str, tmp_path: Path
) -> None:
    model, size = build(**NETS[name]), NETS[name].get("size", 8)
    torch.export.save(traced(exportable(model), images(2, size)), tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    x_BCHW = images(9, size)
    wanted = model(x_BCHW).logits
    for batch in (1, 2, 9):
        same(graph(x_BCHW[:batch]), wanted[:batch])


@torch.no_grad()
def test_exportable_is_a_copy_that_later_training_does_not_change(small: Network) -> None:
    x_BCHW = images(4, 8)
    module, before = exportable(small), {k: v.clone() for k, v in small.state_dict().items()}
    wanted = module(x_BCHW).clone()
    after = small.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for parameter in small.parameters():
        parameter.add_(1.0)
    assert torch.equal(module(x_BCHW), wanted)
    assert not small.training
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_exported_net_spends_what_the_sorted_net_does(small: Network) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(module: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(images(6, 8))
        return int(counter.get_total_flops())

    assert flops(exportable(small)) == flops(small)


PARTS = {
    "small, 3 experts": {"num_experts": 3, "ratio": 0.25},
    "small, dense": {"num_experts": 1, "ratio": 0.25},
    "wrn28_10": {"backbone": "wrn28_10", "size": 16, "ratio": 0.0625},
    "mixture": {"backbone": "mixture", "num_experts": 3},
}


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_parts_give_the_scores_and_the_pathways_of_the_network(
    build: Callable[..., Network], name: str
) -> None:
    model, size = build(**PARTS[name]), PARTS[name].get("size", 8)
    parts, tree = exportable_parts(model)
    x_BCHW = images(5, size)
    if tree["router"] is not None:
        same(parts[tree["router"]](x_BCHW), model(x_BCHW).router)
    for expert, part in enumerate(tree["experts"]):
        same(parts[part](x_BCHW), model.along(x_BCHW, torch.full((5,), expert)))


def test_layers_that_route_have_no_pathways(build: Callable[..., Network]) -> None:
    model = build(num_experts=2, router_scope="per_layer")
    with pytest.raises(ValueError, match="every layer routes for itself"):
        exportable_parts(model)


@pytest.mark.parametrize("name", ["small, 3 experts", "small, per layer", "small, dense"])
@torch.no_grad()
def test_exportable_gives_the_route_where_it_is_asked(
    build: Callable[..., Network], name: str
) -> None:
    model, x_BCHW = build(**NETS[name]), images(9, 8)
    assert torch.equal(exportable_with_route(model)(x_BCHW)[1], model(x_BCHW).route)
