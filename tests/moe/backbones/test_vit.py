"""Vision transformers: known sizes, torch's own encoder as the slow twin, timm's weights by name.

Shapes: B images, T tokens, D width, K classes.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from moe.backbones.mixture import NetworkMixture
from moe.backbones.vit import TransformerBody, ViT, mixture_blocks
from moe.cost import cost
from moe.fold_batchnorm import fold
from moe.network import Network
from moe.token_network import TokenNetwork


def body_of(model: Network) -> TransformerBody:
    assert isinstance(model.body, TransformerBody)
    return model.body


def timm_shapes(width: int, patch: int, tokens: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of timm's ViT of 12 blocks, written out."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for block in range(12):
        for name, shape in {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (4 * width, width),
            "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width),
            "mlp.fc2.bias": (width,),
        }.items():
            shapes[f"blocks.{block}.{name}"] = shape
    return shapes


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("size", "side", "classes", "gmac", "millions"),
    [
        ("small", 224, 1000, 4.60, 22.05),  # ViT-S/16: 4.6 GMAC, 22.05 M
        ("tiny", 224, 1000, 1.25, 5.72),  # ViT-Ti/16: 1.26 GMAC, 5.72 M
        ("small", 64, 200, 1.42, 21.47),
        ("tiny", 64, 200, 0.367, 5.43),
        ("small", 32, 10, 1.42, 21.34),
        ("tiny", 32, 10, 0.365, 5.36),
    ],
)
def test_transformer_costs_what_is_known_of_it(
    size: Any, side: int, classes: int, gmac: float, millions: float
) -> None:
    with torch.device("meta"):
        found = cost(ViT(size=size).build(classes, side), side)
    assert found.gmac == pytest.approx(gmac, rel=0.01)
    assert found.params / 1e6 == pytest.approx(millions, rel=0.001)
    assert found.gmac_router == 0


def test_half_the_ratio_of_small_is_as_wide_as_tiny() -> None:
    half, tiny = ViT(size="small", ratio=0.5).build(10, 32), ViT(size="tiny").build(10, 32)
    shapes = [p.shape for p in tiny.parameters()]
    assert [p.shape for p in half.parameters()] == shapes


def encoder(body: TransformerBody) -> nn.TransformerEncoder:
    """Torch's own encoder with the weights of ours."""
    width, heads = body.norm.weight.shape[0], body.blocks[0].attention.heads  # type: ignore[union-attr]
    layer = nn.TransformerEncoderLayer(
        width, int(heads), 4 * width, 0.0, "gelu", 1e-6, True, norm_first=True
    )
    twin = nn.TransformerEncoder(layer, len(body.blocks), enable_nested_tensor=False).double()
    for ours, theirs in zip(body.blocks, twin.layers, strict=True):
        attention: Any = ours.attention
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": attention.qkv.weight,
                "self_attn.in_proj_bias": attention.qkv.bias,
                "self_attn.out_proj.weight": attention.out.weight,
                "self_attn.out_proj.bias": attention.out.bias,
                **{f"linear1.{k}": v for k, v in ours.up.state_dict().items()},  # type: ignore[union-attr]
                **{f"linear2.{k}": v for k, v in ours.down.state_dict().items()},  # type: ignore[union-attr]
                **{f"norm1.{k}": v for k, v in ours.norm1.state_dict().items()},  # type: ignore[union-attr]
                **{f"norm2.{k}": v for k, v in ours.norm2.state_dict().items()},  # type: ignore[union-attr]
            }
        )
    return twin


def test_transformer_equals_torchs_own_encoder_patch_by_patch_with_input_gradients() -> None:
    torch.manual_seed(0)
    model = ViT(ratio=0.125).build(4, 8).double()
    body = body_of(model)
    for parameter in body.parameters():  # biases and norms too
        nn.init.normal_(parameter, std=0.3)
    twin = encoder(body)
    x_BCHW = torch.rand(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    found_BK = model(x_BCHW).logits

    pixels_BCHW = model.normalize(x_BCHW)
    tokens = [body.token_11D[:, 0].expand(3, -1)]
    for row in (0, 4):
        for column in (0, 4):
            patch = pixels_BCHW[:, :, row : row + 4, column : column + 4].flatten(1)
            tokens.append(patch @ body.patches.weight.flatten(1).T + body.patches.bias)
    y_BTD = twin(torch.stack(tokens, 1) + body.position_1TD)
    want_BK = body.head(body.norm(y_BTD)[:, 0])

    assert_close(found_BK, want_BK, rtol=1e-9, atol=1e-10)
    weights_BK = torch.randn(3, 4, dtype=torch.float64)
    slopes = [
        torch.autograd.grad((logits_BK * weights_BK).sum(), x_BCHW)[0]
        for logits_BK in (found_BK, want_BK)
    ]
    assert bool(slopes[1].any())
    assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("expert", [False, True], ids=["alone", "as experts"])
def test_folded_transformer_computes_the_same_and_is_frozen(expert: bool) -> None:
    torch.manual_seed(0)
    one = ViT(ratio=0.125)
    net = NetworkMixture(num_experts=2, ratio=0.125, expert=ViT()) if expert else one
    model, x_BCHW = net.build(4, 8), torch.rand(5, 3, 8, 8)
    folded = fold(model.train())
    assert_close(folded(x_BCHW).logits, model.eval()(x_BCHW).logits)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not any(module.training for module in folded.modules())


def test_timm_weights_arrive_under_their_names() -> None:
    model = ViT(size="small").build(1000, 224)
    weights = drawn(timm_shapes(384, 16, 197, 1000))
    body = body_of(model)
    body.take_timm(weights)
    assert sum(w.numel() for w in weights.values()) == sum(p.numel() for p in body.parameters())
    block: Any = body.blocks[7]
    for ours, theirs in (
        (body.token_11D, "cls_token"),
        (body.position_1TD, "pos_embed"),
        (body.patches.weight, "patch_embed.proj.weight"),
        (block.attention.qkv.bias, "blocks.7.attn.qkv.bias"),
        (block.attention.out.weight, "blocks.7.attn.proj.weight"),
        (block.up.weight, "blocks.7.mlp.fc1.weight"),
        (block.down.weight, "blocks.7.mlp.fc2.weight"),
        (block.norm2.bias, "blocks.7.norm2.bias"),
        (body.norm.weight, "norm.weight"),
        (body.head.bias, "head.bias"),
    ):
        assert torch.equal(ours, weights[theirs]), theirs


@pytest.mark.parametrize("classes", [1000, 0], ids=["other classes", "no classifier"])
def test_classifier_of_other_classes_is_left_as_it_was_made(classes: int) -> None:
    body = body_of(ViT(ratio=0.125, patch=4).build(7, 8))
    weights = drawn(timm_shapes(24, 4, 5, classes))
    if not classes:
        del weights["head.weight"], weights["head.bias"]
    before = body.head.weight.detach().clone()
    body.take_timm(weights)
    assert torch.equal(body.head.weight, before)
    assert torch.equal(body.norm.weight, weights["norm.weight"])


def test_positions_of_another_grid_are_interpolated() -> None:
    body = body_of(ViT(ratio=0.125, patch=4).build(7, 16))  # a grid of 4
    weights = drawn(timm_shapes(24, 4, 1 + 8 * 8, 7))
    ramp_88 = torch.arange(8.0)[:, None].expand(8, 8)  # bicubic keeps a ramp but for its ends
    weights["pos_embed"][:, 1:] = ramp_88.reshape(1, 64, 1)
    body.take_timm(weights)
    found_44 = body.position_1TD[0, 1:, 0].view(4, 4)
    assert_close(found_44[1:3], torch.tensor([2.5, 4.5])[:, None].expand(2, 4), rtol=0, atol=0.05)
    assert_close(found_44, found_44.flip(0).neg() + 7, rtol=0, atol=1e-4)
    assert torch.equal(body.position_1TD[:, :1], weights["pos_embed"][:, :1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, "weights hold no norm.bias"),
        ({"dist_token": torch.zeros(1, 1, 24)}, "weights hold dist_token, which this network"),
        (
            {"patch_embed.proj.weight": torch.zeros(24, 3, 16, 16)},
            r"patch_embed.proj.weight has shape \(24, 3, 16, 16\), want \(24, 3, 4, 4\): .*patch",
        ),
        ({"pos_embed": torch.zeros(1, 7, 24)}, "the class token and a square grid, got 7"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    change: dict[str, Tensor | None], message: str
) -> None:
    weights: dict[str, Any] = drawn(timm_shapes(24, 4, 5, 7)) | change
    weights = {name: w for name, w in weights.items() if w is not None}
    with pytest.raises(ValueError, match=message):
        body_of(ViT(ratio=0.125).build(7, 8)).take_timm(weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2, "top_k": 3}, r"top_k must be from 1 to num_experts \(2\), got 3"),
        ({"num_experts": 2, "renormalize": True}, "top_k must be at least 2 with renormalize=true"),
        ({"placement": "first_2"}, "placement must be every_N or last_N, got 'first_2'"),
        ({"placement": "last_7"}, "placement last_7 needs more than 12 blocks"),
        ({"pooling": "max"}, "pooling must be token or mean, got 'max'"),
        ({"hidden": 0}, "hidden must be above 0, got 0"),
        ({"size": "huge"}, "size must be micro, tiny, small or base, got 'huge'"),
        ({"pixels": "x"}, "pixels must be data or half, got 'x'"),
        ({"patch": -1}, "patch must be at least 0, got -1"),
        ({"weights": "none.safetensors"}, "weights must be a safetensors file, got 'none.s"),
    ],
)
def test_settings_that_make_no_transformer_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(**settings)


def test_patches_that_do_not_fill_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="patch must divide the image's side of 28 pixels, got 8"):
        ViT(patch=8).build(10, 28)


def test_pixels_are_normalized_as_said() -> None:
    half, data = ViT(pixels="half", ratio=0.125), ViT(ratio=0.125)
    assert float(half.build(4, 8).normalize.std[0, 0]) == 0.5
    assert float(data.build(4, 8).normalize.mean[0, 0]) == pytest.approx(0.4914)


@pytest.mark.parametrize(
    ("placement", "depth", "want"),
    [
        ("every_2", 6, [1, 3, 5]),
        ("every_1", 3, [0, 1, 2]),
        ("every_3", 6, [2, 5]),
        ("last_2", 12, [9, 11]),
        ("last_1", 6, [5]),
    ],
)
def test_mixtures_are_placed_as_in_v_moe(placement: str, depth: int, want: list[int]) -> None:
    assert mixture_blocks(placement, depth) == want


def v_moe(**settings: Any) -> TokenNetwork:
    torch.manual_seed(0)
    net = ViT(size="micro", ratio=0.125, patch=4, **{"num_experts": 4} | settings).build(3, 8)
    assert isinstance(net, TokenNetwork)
    for name, parameter in net.named_parameters():  # so that routes and biases matter
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return net.double().eval()


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
@pytest.mark.parametrize("side", [32, 64, 224])
def test_mixture_counts_its_router_and_the_experts_of_a_token(router: Any, side: int) -> None:
    """Against counts written out, and torch's counter on the same network with real numbers."""
    experts, top_k = 8, 2
    with torch.device("meta"):
        dense = cost(ViT(size="micro").build(10, side), side)
        found = cost(
            ViT(size="micro", num_experts=experts, top_k=top_k, router=router).build(10, side), side
        )
    tokens = 1 + (side // {32: 4, 64: 8, 224: 16}[side]) ** 2
    slots = round(tokens * top_k / experts)
    columns = experts * (slots if router == "soft" else 1)
    rows = tokens * top_k if router == "top_k" else experts * slots
    mlp, layers = 2 * 128 * 512, 3
    routers = layers * tokens * 128 * columns
    mixing = 0 if router == "top_k" else layers * 2 * tokens * experts * slots * 128
    want = dense.gmac + (layers * (rows - tokens) * mlp + routers + mixing) / 1e9
    assert found.gmac_router == pytest.approx(routers / 1e9, rel=1e-9)
    assert found.gmac == pytest.approx(want, rel=1e-9)
    assert found.params_router == layers * (128 * columns + (router == "soft"))
    per_expert = mlp + 512 + 128
    assert found.params == dense.params + layers * (experts - 1) * per_expert + found.params_router
    if side == 32:
        net = ViT(size="micro", num_experts=experts, top_k=top_k, router=router).build(10, side)
        assert cost(net, side) == found


def test_v_moe_b16_costs_what_is_known_of_its_parts() -> None:
    """ViT-B/16: 86.6 M parameters; eight experts in every second block add 7 MLPs to six."""
    with torch.device("meta"):
        dense = cost(ViT(size="base").build(1000, 224), 224)
        found = cost(ViT(size="base", num_experts=8).build(1000, 224), 224)
    assert dense.params / 1e6 == pytest.approx(86.57, abs=0.01)
    assert dense.gmac == pytest.approx(17.56, rel=0.01)
    added = 6 * (7 * (2 * 768 * 3072 + 3072 + 768) + 8 * 768)
    assert found.params == dense.params + added
    assert found.gmac - found.gmac_router == pytest.approx(dense.gmac, rel=1e-9)


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_v_moe_answers_an_image_alike_in_any_batch(router: Any, pooling: Any) -> None:
    net = v_moe(router=router, pooling=pooling, top_k=2)
    x_BCHW = torch.rand(70, 3, 8, 8, dtype=torch.float64)  # more than one piece
    whole = net(x_BCHW)
    alone = torch.cat([net(x[None]).logits for x in x_BCHW[:5]])
    assert_close(alone, whole.logits[:5], rtol=1e-10, atol=1e-10)
    order_B = torch.randperm(70)
    moved = net(x_BCHW[order_B])
    assert_close(moved.logits, whole.logits[order_B], rtol=1e-10, atol=1e-10)
    assert torch.equal(moved.route, whole.route[order_B])
    tokens = 4 + (pooling == "token")
    assert whole.router.shape == (70, 3 * tokens, 4)
    assert net.num_layers == 3 * tokens
    assert len(whole.route.unique()) > 1


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
def test_held_and_forced_routes_of_a_v_moe(router: Any) -> None:
    net = v_moe(router=router, top_k=2)
    x_BCHW, other = torch.rand(2, 6, 3, 8, 8, dtype=torch.float64)
    logits_BK = net(x_BCHW).logits
    assert_close(net.held(x_BCHW, net.routing_scores(x_BCHW)), logits_BK)
    assert not torch.allclose(net.held(x_BCHW, net.routing_scores(other)), logits_BK)
    whole, parts = net(x_BCHW), net(x_BCHW[:4])
    assert_close(net.along(x_BCHW[:4], whole.route[:4]), net.along(x_BCHW[:4], parts.route))
    with pytest.raises(ValueError, match="route names expert 4, valid are 0 to 3"):
        net.along(x_BCHW, torch.full_like(whole.route, 4))


def test_forced_route_of_first_choices_is_the_network_itself_for_one_expert_per_token() -> None:
    net = v_moe(top_k=1)
    x_BCHW = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    routed = net(x_BCHW)
    assert_close(net.along(x_BCHW, routed.route), routed.logits)


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
def test_every_router_of_a_v_moe_learns_and_folding_changes_nothing(router: Any) -> None:
    net = v_moe(router=router)
    x_BCHW = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    assert_close(fold(net.train())(x_BCHW).logits, net.eval()(x_BCHW).logits)
    net.train()(x_BCHW).logits.square().sum().backward()
    for layer in net.mixtures.values():
        assert layer.router.weight_SD.grad is not None
        assert bool(layer.router.weight_SD.grad.any())


def test_dense_checkpoints_of_before_load_with_the_names_that_they_have() -> None:
    """Names and order of the dense network's weights, as runs have them on disk."""
    names = list(ViT(ratio=0.125).build(4, 8).state_dict())
    assert names[:4] == [
        "body.token_11D",
        "body.position_1TD",
        "body.patches.weight",
        "body.patches.bias",
    ]
    block = [name.removeprefix("body.blocks.0.") for name in names if ".blocks.0." in name]
    parts = ["norm1", "attention.qkv", "attention.out", "norm2", "up", "down"]
    assert block == [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert names[-4:] == [
        "body.norm.weight",
        "body.norm.bias",
        "body.head.weight",
        "body.head.bias",
    ]


def test_mixture_from_timm_weights_is_the_dense_network_where_gates_sum_to_one() -> None:
    torch.manual_seed(0)
    weights = drawn(timm_shapes(24, 4, 5, 7))
    dense = ViT(ratio=0.125, patch=4).build(7, 8).eval()
    body_of(dense).take_timm(weights)
    settings: dict[str, Any] = {"ratio": 0.125, "patch": 4, "num_experts": 4, "top_k": 2}
    x_BCHW = torch.rand(5, 3, 8, 8)
    want_BK = dense(x_BCHW).logits
    for renormalize in (True, False):
        net = ViT(renormalize=renormalize, **settings).build(7, 8).eval()
        body_of(net).take_timm(weights)
        found_BK = net(x_BCHW).logits
        assert torch.allclose(found_BK, want_BK, rtol=1e-4, atol=1e-4) == renormalize
