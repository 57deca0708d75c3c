"""Whole networks as experts, against the released form: a loop over images.

Shapes: B images, E experts, K classes.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.backbones.mixture import NetworkMixture
from moe.backbones.resnet import ResNet18
from moe.cost import cost
from moe.export import exportable
from moe.fold_batchnorm import fold
from moe.mixture_of_networks import Mixture
from moe.routing import Routed
from pipeline.bench.masked import masked
from pipeline.bench.step import training_state
from pipeline.config import Config, read
from pipeline.config.overrides import flatten, override
from pipeline.optimization.losses import cross_entropy_per_image

EXPERTS, CLASSES, SIZE, BATCH = 3, 4, 8, 24
FORMS = {
    "softmax, two": {"top_k": 2},
    "softmax, all": {"top_k": EXPERTS},
    "softmax, logits": {"top_k": 2, "mix": "logits"},
    "softmax, all logits": {"top_k": EXPERTS, "mix": "logits"},
    "hard": {"top_k": 1, "gate": "hard"},
    "hard, logits": {"top_k": 1, "gate": "hard", "mix": "logits"},
}


def made(**settings: Any) -> Mixture:
    """Three small experts in float64, with running statistics of random images."""
    torch.manual_seed(0)
    backbone = NetworkMixture(**{"num_experts": EXPERTS, "ratio": 1 / 16, **settings})
    model = backbone.build(CLASSES, SIZE)
    assert isinstance(model, Mixture)
    with torch.no_grad():
        for expert in model.train().experts:
            expert(images(16).float())
    return model.double().eval()


def images(count: int = BATCH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)


def one_by_one(model: Mixture, x_BCHW: Tensor) -> Routed:
    """Classify image by image: each calls its experts by itself."""
    rows = []
    for x_CHW in x_BCHW:
        score_E = model.router(model.normalize(x_CHW[None]))[0]  # type: ignore[misc]
        taken = sorted(range(EXPERTS), key=lambda e: -score_E[e].item())[: model.top_k]
        weights = score_E[taken].softmax(0)
        if model.gate == "hard":
            weights = 1.0 + score_E[taken] - score_E[taken].detach()
            weights = weights if model.gate_gradient else weights.detach()
        found = []
        for weight, expert in zip(weights, taken, strict=True):
            z_K = model.experts[expert](x_CHW[None]).logits[0]
            if model.mix == "probabilities":
                z_K = z_K.log_softmax(0) if model.gate == "hard" else z_K.softmax(0)
            found.append(weight * z_K)
        whole_K = torch.stack(found).sum(0)
        logs = model.mix == "probabilities" and model.gate == "softmax"
        rows.append((whole_K.log() if logs else whole_K, score_E, torch.tensor(taken[0])))
    logits, scores, route = zip(*rows, strict=True)
    return Routed(torch.stack(logits), torch.stack(scores), torch.stack(route))


def gradients(model: Mixture, found: Routed, x_BCHW: Tensor) -> list[Tensor]:
    """Send random gradients into the logits; return those of the images and all parameters."""
    weights = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(2)).double()
    everything = [x_BCHW, *model.parameters()]
    return list(
        torch.autograd.grad(
            (found.logits * weights).sum(), everything, allow_unused=True, materialize_grads=True
        )
    )


@pytest.mark.parametrize("gate_gradient", [True, False], ids=["gates learn", "gates rest"])
@pytest.mark.parametrize("form", FORMS)
def test_mixture_equals_a_loop_over_images_with_all_gradients(
    form: str, gate_gradient: bool
) -> None:
    model = made(**FORMS[form])
    model.gate_gradient = gate_gradient
    x_BCHW = images().requires_grad_()
    found, want = model(x_BCHW), one_by_one(model, x_BCHW)
    assert len(found.route.unique()) == EXPERTS
    assert torch.equal(found.route, want.route)
    assert_close(found.router, want.router, rtol=0, atol=1e-10)
    assert_close(found.logits, want.logits, rtol=0, atol=1e-10)
    for own, other in zip(
        gradients(model, found, x_BCHW), gradients(model, want, x_BCHW), strict=True
    ):
        assert_close(own, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_true_gradient_passes_a_softmax_gate_and_no_hard_one(form: str) -> None:
    model, x_BCHW = fold(made(**FORMS[form])), images()
    assert isinstance(model, Mixture)
    model.router.requires_grad_()  # type: ignore[union-attr]
    logits_BK = model(x_BCHW).logits
    if FORMS[form].get("gate") == "hard":
        assert not logits_BK.requires_grad
        return
    (slope,) = torch.autograd.grad(logits_BK[:, 0].sum(), model.router.linear.weight)  # type: ignore[union-attr, arg-type]
    assert bool((slope != 0).any())


def test_experts_logits_are_those_along_each_route() -> None:
    model, x_BCHW = made(), images()
    every_BEK = model.experts_logits(x_BCHW)
    for expert in range(EXPERTS):
        along_BK = model.along(x_BCHW, torch.full((BATCH,), expert))
        assert_close(along_BK, every_BEK[:, expert], rtol=0, atol=1e-10)
        assert_close(along_BK, model.experts[expert](x_BCHW).logits, rtol=0, atol=1e-10)
    mixed = torch.arange(BATCH) % EXPERTS
    along_BK = model.along(x_BCHW, mixed)
    assert_close(along_BK, every_BEK[torch.arange(BATCH), mixed], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_a_softmax_of_the_output_is_the_mixture_where_probabilities_are_mixed(mix: str) -> None:
    model, x_BCHW = made(top_k=EXPERTS, mix=mix), images()
    found = model(x_BCHW)
    a_BE1 = found.router.softmax(1)[:, :, None]
    every_BEK = model.experts_logits(x_BCHW)
    if mix == "probabilities":
        assert_close(found.logits.exp(), (a_BE1 * every_BEK.softmax(2)).sum(1))
    else:
        assert_close(found.logits, (a_BE1 * every_BEK).sum(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.expert": "mixture"}, "backbone.expert must be a single network"),
        ({"backbone.expert.ratio": 0.5}, r"backbone\.expert\.ratio must be 1, got 0\.5"),
        ({"backbone.expert.num_experts": 2}, r"backbone\.expert\.num_experts must be 1, got 2"),
        ({"backbone.gate": "hard"}, r"backbone\.top_k must be 1 for gate=hard, got 2"),
        ({"backbone.top_k": 1}, r"backbone\.top_k must be from 2 to num_experts \(4\)"),
        ({"backbone.top_k": 5}, r"backbone\.top_k must be from 2 to num_experts \(4\)"),
        ({"backbone.router": "mlp"}, r"backbone\.router must be one of linear, cnn, got 'mlp'"),
        ({"backbone.router_scope": "per_layer"}, r"backbone\.router_scope must be shared"),
    ],
)
def test_settings_that_make_no_mixture_are_refused(changes: dict[str, Any], message: str) -> None:
    config = Config(backbone=NetworkMixture())
    with pytest.raises(ValueError, match=message):
        override(config, changes)


def test_experts_are_any_backbone_by_name() -> None:
    config = override(
        Config(),
        {
            "backbone": "mixture",
            "backbone.num_experts": "4",
            "backbone.expert": "resnet18",
            "backbone.expert.width": "16",
            "backbone.gate": "hard",
            "backbone.top_k": "1",
        },
    )
    assert read(flatten(config)) == config
    assert config.fingerprint != override(config, {"backbone.expert": "wrn28_10"}).fingerprint
    model = config.backbone.build(10, 8)
    assert isinstance(model, Mixture)
    assert len(model.experts) == 4
    assert config.backbone == override(config, {"backbone.expert.width": 16}).backbone


def test_equal_experts_are_one_expert() -> None:
    model = made(top_k=2)
    for expert in model.experts[1:]:
        expert.load_state_dict(copy.deepcopy(model.experts[0].state_dict()))
    x_BCHW = images()
    alone_BK = model.experts[0](x_BCHW).logits.log_softmax(1)
    assert_close(model(x_BCHW).logits, alone_BK, rtol=0, atol=1e-10)


def routed_to(model: Mixture, counts: list[int]) -> Tensor:
    """Pick images that the router sends to each expert in these numbers."""
    pool_BCHW = images(200, seed=4)
    route_B = model.router_scores(pool_BCHW).argmax(1)
    rows = [(route_B == e).nonzero().flatten()[:count] for e, count in enumerate(counts)]
    assert [len(own) for own in rows] == counts
    return pool_BCHW[torch.cat(rows)]


def statistics(model: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def test_experts_train_on_their_own_images_alone() -> None:
    model = made(top_k=1, gate="hard")
    x_BCHW = routed_to(model, [5, 3, 0])
    before = statistics(model)
    alone = copy.deepcopy(model.experts[0]).train()
    found_BK = model.train()(x_BCHW).logits
    assert_close(found_BK[:5], alone(x_BCHW[:5]).logits.log_softmax(1))
    after = statistics(model)
    for key, value in statistics(alone).items():
        assert torch.equal(after[f"body.0.{key}"], value)
    moved = {key.split(".")[1] for key in after if not torch.equal(after[key], before[key])}
    assert moved == {"0", "1"}
    found_BK.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in model.experts[2].parameters())


def test_a_lone_image_trains_its_expert_by_the_running_statistics() -> None:
    model = made(top_k=1, gate="hard", expert=ResNet18(num_experts=1, ratio=1.0))
    x_BCHW = routed_to(model, [4, 1, 0])  # one value a channel in the last stage
    before, want_1K = statistics(model.experts[1]), model.experts[1](x_BCHW[4:]).logits
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.experts[1].train()(x_BCHW[4:])
    model.load_state_dict({f"body.1.{k}": v for k, v in before.items()}, strict=False)
    found_BK = model.train()(x_BCHW).logits
    assert_close(found_BK[4:], want_1K.log_softmax(1))
    assert all(torch.equal(v, before[k]) for k, v in statistics(model.experts[1]).items())
    found_BK[4].square().sum().backward()  # type: ignore[no-untyped-call]
    slopes = [p.grad for p in model.experts[1].parameters()]
    assert all(slope is not None and slope.any() for slope in slopes)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("form", FORMS)
def test_each_half_trains_alone_and_the_other_rests(form: str) -> None:
    model = made(**FORMS[form]).float()
    state = training_state(model)
    x_BCHW, y_B = images().float(), torch.arange(BATCH) % CLASSES
    for group, resting in (("experts", "router."), ("router", "body.")):
        before = copy.deepcopy(model.state_dict())
        with state.only(group):
            loss = cross_entropy_per_image(model(x_BCHW).logits, y_B).mean()
            state.descend(loss, group)
        after = model.state_dict()
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        assert not [key for key in moved if key.startswith(resting)]
        names = {k for k, _ in model.named_parameters() if not k.startswith(resting)}
        assert names <= moved


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_exported_mixture_gives_the_same_logits_for_any_batch(form: str) -> None:
    model, x_BCHW = made(**FORMS[form]).float(), images().float()
    wanted_BK, module = model(x_BCHW).logits, exportable(model)
    auto = torch.export.Dim.AUTO
    graph = torch.export.export(module, (x_BCHW[:2],), dynamic_shapes=[{0: auto}]).module()
    for batch in (1, 2, 7):
        assert_close(module(x_BCHW[:batch]), wanted_BK[:batch], rtol=1e-5, atol=1e-5)
        assert_close(graph(x_BCHW[:batch]), wanted_BK[:batch], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top_k", "gate"), [(1, "hard"), (2, "softmax"), (3, "softmax")])
@pytest.mark.parametrize("router", ["linear", "cnn"])
def test_cost_is_that_of_the_router_and_of_the_experts_that_take_part(
    top_k: int, gate: Any, router: Any
) -> None:
    backbone = NetworkMixture(num_experts=3, ratio=0.5, top_k=top_k, gate=gate, router=router)
    for device in ("meta", "cpu"):
        with torch.device(device):
            found = cost(backbone.build(10, 32), 32)
            one = cost(replace(backbone, num_experts=1).build(10, 32), 32)
        linear = router == "linear"
        own = 3 * 32 * 32 * 3 if linear else round(0.0406e9)
        assert found.gmac_router * 1e9 == pytest.approx(own, rel=0.01)
        assert found.gmac == pytest.approx(top_k * one.gmac + found.gmac_router)
        assert found.params == 3 * one.params + found.params_router
        assert one.params_router == 0


def test_masked_form_is_refused() -> None:
    with pytest.raises(ValueError, match="whole networks as experts have no masked form"):
        masked(made())
