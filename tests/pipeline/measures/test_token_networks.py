"""Evaluation of token routing: coupled batches are found, gates pass gradients, export agrees.

Shapes: B images, CHW channels and sides.
"""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moe.backbones.vit import ViT
from moe.export import exportable
from moe.fold_batchnorm import fold
from moe.token_network import TokenNetwork
from pipeline.attacks.pgd import PGD
from pipeline.measures import MEASURES
from pipeline.measures.sanity.checks import Evidence, batch
from pipeline.measures.sanity.faithful import RouterGradient
from pipeline.measures.sanity.probe_attacks import facts
from pipeline.measures.soft_gates import VARIANTS
from pipeline.measures.threat import Evaluation
from pipeline.seeding import ImageNoise

ROUTERS = ("top_k", "expert_choice", "soft")


def net(**settings: Any) -> TokenNetwork:
    torch.manual_seed(0)
    settings = {"num_experts": 4, "top_k": 2} | settings
    model = ViT(size="micro", ratio=0.125, patch=4, **settings).build(10, 8)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folded = fold(model)
    assert isinstance(folded, TokenNetwork)
    return folded


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_verdict_says_that_an_answer_depends_on_its_companions(
    router: Any, capacity: float
) -> None:
    """Capacity of top-k alone couples images; one image is a group of the other routers."""
    found = facts(net(router=router, capacity=capacity), torch.rand(24, 3, 8, 8))
    check = batch(Evidence(Evaluation(), 10, {}, facts=found))
    assert check is not None
    coupled = router == "top_k" and capacity > 0
    assert check.ok != coupled
    assert ("depends on the other images of its batch" in check.words) == coupled


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_surrogate_gates_pass_a_finite_gradient(router: Any, name: str) -> None:
    model, x_BCHW = net(router=router), torch.rand(3, 3, 8, 8).requires_grad_()
    logits_BK = VARIANTS[name](model)(x_BCHW)
    (slope,) = torch.autograd.grad(logits_BK.logsumexp(1).sum(), x_BCHW)
    assert bool(slope.isfinite().all())
    assert bool(slope.any())
    if name in ("hard", "straight_through", "soft_backward") or router == "soft":
        assert_close(logits_BK, model(x_BCHW).logits)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "name", ["ra_vmoe", "ra_other_routes", "ra_forced", "ra_router", "ra_expert", "ra_surrogate"]
)
def test_attacks_on_tokens_stay_in_the_ball_and_break_images(router: Any, name: str) -> None:
    model, x_BCHW = net(router=router), torch.rand(6, 3, 8, 8)
    y_B = model(x_BCHW).logits.argmax(1)
    attack = PGD(eps=0.2, step_size=0.05, steps=10)
    found = MEASURES[name](attack=attack)(model, x_BCHW, y_B, ImageNoise(0, torch.arange(6)))
    assert float((found.x_adv - x_BCHW).abs().max()) <= 0.2 + 1e-6
    assert torch.equal(found.correct_B, model(found.x_adv).logits.argmax(1) == y_B)
    assert int(found.correct_B.sum()) < 6 or name == "ra_router"


@pytest.mark.parametrize("router", ROUTERS)
def test_exported_graph_computes_the_same_at_any_batch_size(router: Any) -> None:
    model = net(router=router)
    plain, x_BCHW = exportable(model), torch.rand(4, 3, 8, 8)
    batch_size = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch_size},)
    graph = torch.export.export(plain, (x_BCHW,), dynamic_shapes=shapes).module()
    for count in (1, 4, 9):
        x = torch.rand(count, 3, 8, 8)
        assert_close(graph(x), model(x).logits, rtol=1e-4, atol=1e-5)


def test_a_coupled_batch_is_not_exported() -> None:
    with pytest.raises(ValueError, match="capacity must be 0 for export"):
        exportable(net(capacity=0.5))


def test_router_whose_inputs_are_cut_from_the_graph_is_found() -> None:
    x_BCHW, y_B = torch.rand(12, 3, 8, 8), torch.zeros(12).long()
    noise = ImageNoise(0, torch.arange(12))
    model, attack = net(), PGD(step_size=2 / 255)
    assert RouterGradient(attack=attack)(model, x_BCHW, y_B, noise).correct_B.all()
    for name, module in model.named_modules():
        if name.endswith("router"):
            module.register_forward_pre_hook(lambda _, found: tuple(x.detach() for x in found))
    assert not RouterGradient(attack=attack)(model, x_BCHW, y_B, noise).correct_B.any()
