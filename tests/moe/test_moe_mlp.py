"""The sparse layer against its masked definition, which runs every expert on every token.

Shapes: B images, T tokens, N = B T, E experts, C experts per token, D width.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from moe.moe_mlp import MoEMlp, TokenMixture, grouped_mlp
from moe.token_routing import TokenRouting, expert_capacity, token_gates, within_capacity

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def every_expert(layer: MoEMlp, x_BTD: Tensor) -> Tensor:
    """Outputs of all experts for all tokens, (B, T, E, D)."""
    h = torch.einsum("btd,ehd->bteh", x_BTD, layer.up_EHD) + layer.stacks[1]
    return torch.einsum("bteh,edh->bted", F.gelu(h), layer.down_EDH) + layer.stacks[3]


def masked(layer: MoEMlp, x_BTD: Tensor, normal: Tensor | None = None) -> Tensor:
    """``sum_e m_e gate_e MLP_e(x)`` with a mask of the experts that take part."""
    settings = layer.settings
    scores_BTE = x_BTD @ layer.router.weight_SD.T
    if normal is not None:
        scores_BTE = scores_BTE + settings.noise_std / layer.num_experts * normal
    gates_BTE = scores_BTE.softmax(2)
    mask_BTE = torch.zeros_like(gates_BTE)
    mask_BTE.scatter_(2, scores_BTE.topk(settings.top_k, 2).indices, 1.0)
    gates_BTE = gates_BTE * mask_BTE
    if settings.renormalize:
        gates_BTE = gates_BTE / gates_BTE.sum(2, keepdim=True)
    return torch.einsum("bte,bted->btd", gates_BTE, every_expert(layer, x_BTD))


def made(tokens: int = 6, width: int = 8, hidden: int = 12, **settings: Any) -> MoEMlp:
    torch.manual_seed(0)
    layer = MoEMlp(width, hidden, tokens, TokenMixture(**settings)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def gradients(layer: MoEMlp, y_BTD: Tensor, x_BTD: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    loss = (y_BTD * torch.randn_like(y_BTD)).sum()
    return list(torch.autograd.grad(loss, [x_BTD, *layer.parameters()], materialize_grads=True))


def assert_same(layer: MoEMlp, found: Tensor, want: Tensor, x_BTD: Tensor) -> None:
    assert_close(found, want, **CLOSE)
    for a, b in zip(gradients(layer, found, x_BTD), gradients(layer, want, x_BTD), strict=True):
        assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 4, "top_k": 1},
        {"num_experts": 4, "top_k": 2},
        {"num_experts": 4, "top_k": 2, "renormalize": True},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 3, "top_k": 3},
        {"num_experts": 16, "top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("load", ["as drawn", "skewed", "one expert"])
def test_layer_equals_the_masked_definition_with_all_gradients(
    settings: dict[str, Any], load: str
) -> None:
    layer = made(**settings)
    x_BTD = torch.randn(3, 6, 8, dtype=torch.float64)
    if load != "as drawn":  # a feature of all tokens that pulls them to expert 0
        x_BTD[..., 0] = 1.0
        layer.router.weight_SD.data[0, 0] += 2.0 if load == "skewed" else 100.0
    x_BTD.requires_grad_()
    assert_same(layer, layer(x_BTD, TokenRouting()), masked(layer, x_BTD), x_BTD)


def test_experts_that_no_token_chose_get_a_zero_gradient() -> None:
    layer = made(num_experts=4, top_k=1)
    x_BTD = torch.randn(2, 6, 8, dtype=torch.float64)
    x_BTD[..., 0] = 1.0
    layer.router.weight_SD.data[2, 0] += 100.0
    layer(x_BTD, TokenRouting()).sum().backward()
    for stack in (layer.up_EHD, layer.up_bias, layer.down_EDH, layer.down_bias):
        assert stack.grad is not None
        assert [bool(own.any()) for own in stack.grad.chunk(4)] == [False, False, True, False]


def test_noise_of_training_moves_the_choice_and_the_gates() -> None:
    layer = made(num_experts=4, top_k=2).train()
    x_BTD = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    noise_BTE = 3 * torch.randn(3, 6, 4, dtype=torch.float64)
    routing = TokenRouting(normal=lambda _: noise_BTE)
    found = layer(x_BTD, routing)
    assert_same(layer, found, masked(layer, x_BTD, noise_BTE), x_BTD)
    assert not torch.allclose(found, masked(layer, x_BTD))
    assert_close(routing.scores[0], x_BTD @ layer.router.weight_SD.T)  # without noise


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
def test_an_image_is_answered_alike_alone_in_a_batch_and_in_another_order(router: Any) -> None:
    layer = made(num_experts=4, top_k=2, router=router)
    x_BTD = torch.randn(5, 6, 8, dtype=torch.float64)
    whole = layer(x_BTD, TokenRouting())
    alone = torch.cat([layer(x[None], TokenRouting()) for x in x_BTD])
    order_B = torch.tensor([3, 1, 4, 0, 2])
    permuted = layer(x_BTD[order_B], TokenRouting())
    assert_close(alone, whole, **CLOSE)
    assert_close(permuted, whole[order_B], **CLOSE)


@pytest.mark.parametrize("priority", [False, True])
def test_capacity_couples_the_images_of_a_group(priority: bool) -> None:
    layer = made(num_experts=2, top_k=1, capacity=0.5, group=3, priority=priority)
    x_BTD = torch.randn(6, 6, 8, dtype=torch.float64)
    whole = layer(x_BTD, TokenRouting())
    alone = torch.cat([layer(x[None], TokenRouting()) for x in x_BTD])
    assert not torch.allclose(alone, whole)
    other = torch.cat([x_BTD[:3], torch.randn(3, 6, 8, dtype=torch.float64)])
    assert_close(layer(other, TokenRouting())[:3], whole[:3], **CLOSE)  # another group


@pytest.mark.parametrize("priority", [False, True])
def test_capacity_is_a_mask_on_gates(priority: bool) -> None:
    layer = made(num_experts=3, top_k=2, capacity=0.6, group=2, priority=priority)
    x_BTD = torch.randn(5, 6, 8, dtype=torch.float64, requires_grad=True)
    parts = []
    for group in x_BTD.split(2):
        scores_NE = (group @ layer.router.weight_SD.T).flatten(0, 1)
        chosen_NC, gates_NC = token_gates(scores_NE, 2)
        room = expert_capacity(len(chosen_NC), 2, 0.6, 3)
        kept_NC = within_capacity(chosen_NC, gates_NC, 3, room, priority=priority)
        assert not bool(kept_NC.all())
        gates_NE = torch.zeros_like(scores_NE).scatter(1, chosen_NC, gates_NC * kept_NC)
        every = every_expert(layer, group)
        parts.append(torch.einsum("bte,bted->btd", gates_NE.view(every.shape[:3]), every))
    assert_same(layer, layer(x_BTD, TokenRouting()), torch.cat(parts), x_BTD)


def test_expert_choice_equals_its_definition() -> None:
    layer = made(num_experts=3, top_k=1, router="expert_choice")
    assert layer.slots == 2
    x_BTD = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    gates_BTE = (x_BTD @ layer.router.weight_SD.T).softmax(2)
    mask_BTE = torch.zeros_like(gates_BTE).scatter(1, gates_BTE.topk(2, 1).indices, 1.0)
    want = torch.einsum("bte,bted->btd", gates_BTE * mask_BTE, every_expert(layer, x_BTD))
    assert_same(layer, layer(x_BTD, TokenRouting()), want, x_BTD)


def test_soft_moe_equals_its_definition() -> None:
    layer = made(num_experts=3, top_k=1, router="soft")
    x_BTD = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    phi_SD = layer.router.weight_SD / layer.router.weight_SD.norm(dim=1, keepdim=True)
    scores_BTS = (x_BTD / x_BTD.norm(dim=2, keepdim=True)) @ phi_SD.T * layer.router.scale
    slots_BSD = torch.einsum("bts,btd->bsd", scores_BTS.softmax(1), x_BTD)
    every_BSED = every_expert(layer, slots_BSD)
    out_BSD = torch.stack([every_BSED[:, slot, slot // 2] for slot in range(6)], 1)
    want = torch.einsum("bts,bsd->btd", scores_BTS.softmax(2), out_BSD)
    assert_same(layer, layer(x_BTD, TokenRouting()), want, x_BTD)


def test_forced_tokens_run_the_given_expert_at_the_scale_of_their_own_choice() -> None:
    layer = made(num_experts=4, top_k=2)
    x_BTD = torch.randn(2, 6, 8, dtype=torch.float64)
    forced_BLT = torch.randint(4, (2, 1, 6))
    found = layer(x_BTD, TokenRouting(forced_BLT=forced_BLT))
    mass_BT = (x_BTD @ layer.router.weight_SD.T).softmax(2).topk(2, 2).values.sum(2)
    index = forced_BLT[:, 0, :, None, None].expand(-1, -1, 1, 8)
    want = every_expert(layer, x_BTD).gather(2, index).squeeze(2) * mass_BT[..., None]
    assert_close(found, want, **CLOSE)


def test_relaxed_layer_comes_to_the_deployed_one_as_its_temperature_falls() -> None:
    layer = made(num_experts=4, top_k=1)
    x_BTD = torch.randn(2, 6, 8, dtype=torch.float64)
    cold = TokenRouting(relax=lambda s: (s / 1e-4).softmax(1))
    assert_close(layer(x_BTD, cold), layer(x_BTD, TokenRouting()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_hard_forward_has_the_deployed_output_and_a_gradient_to_every_expert(top_k: int) -> None:
    layer = made(num_experts=4, top_k=top_k)
    x_BTD = torch.randn(2, 6, 8, dtype=torch.float64)
    x_BTD[..., 0] = 1.0
    routing = TokenRouting(relax=lambda s: s.softmax(1), hard_forward=True)
    found = layer(x_BTD, routing)
    assert_close(found, layer(x_BTD, TokenRouting()), **CLOSE)
    (slope,) = torch.autograd.grad(found.square().sum(), layer.router.weight_SD)
    assert bool(slope.any(1).all())


def test_held_scores_take_the_place_of_the_layers_own() -> None:
    layer = made(num_experts=4, top_k=2)
    x_BTD, other = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    scores_BTE = other @ layer.router.weight_SD.T
    gates_BTE = scores_BTE.softmax(2)
    mask_BTE = torch.zeros_like(gates_BTE).scatter(2, scores_BTE.topk(2, 2).indices, 1.0)
    want = torch.einsum("bte,bted->btd", gates_BTE * mask_BTE, every_expert(layer, x_BTD))
    assert_close(layer(x_BTD, TokenRouting(held=[scores_BTE])), want, **CLOSE)


def test_experts_start_alike_or_not() -> None:
    same = MoEMlp(8, 12, 6, TokenMixture(num_experts=3, identical=True))
    assert torch.equal(same.up_EHD[0], same.up_EHD[2])
    drawn = MoEMlp(8, 12, 6, TokenMixture(num_experts=3))
    assert not torch.equal(drawn.up_EHD[0], drawn.up_EHD[2])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
def test_grouped_products_equal_the_loop(device: str) -> None:
    torch.manual_seed(0)
    layer = MoEMlp(32, 64, 6, TokenMixture(num_experts=4)).to(device, torch.bfloat16)
    x_PD = torch.randn(37, 32, device=device, dtype=torch.bfloat16)
    counts_E = torch.tensor([5, 0, 30, 2], device=device)
    stacks = layer.stacks
    found = grouped_mlp(x_PD, counts_E, *stacks)
    rows = x_PD.float().split(counts_E.tolist())
    want = [
        F.linear(F.gelu(F.linear(x, *(s[e].float() for s in stacks[:2]))), stacks[2][e].float())
        + stacks[3][e].float()
        for e, x in enumerate(rows)
    ]
    assert_close(found.float(), torch.cat(want), rtol=0.05, atol=5e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, r"top_k must be from 1 to num_experts \(4\), got 5"),
        ({"num_experts": 4, "renormalize": True}, "top_k must be at least 2 with renormalize"),
        ({"num_experts": 4, "router": "hash"}, "router must be top_k, expert_choice or soft"),
        ({"num_experts": 4, "capacity": -1.0}, "capacity must be at least 0, got -1"),
        ({"num_experts": 4, "group": 0}, "group must be at least 1, got 0"),
    ],
)
def test_settings_of_no_mixture_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenMixture(**settings)
