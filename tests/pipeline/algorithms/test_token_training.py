"""Training of token routers: auxiliary losses over all workers, gradients of each router.

Shapes: B images, CHW channels and sides.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.backbones.vit import ViT
from moe.token_network import TokenNetwork
from moe.token_routing import auxiliary_loss
from pipeline.algorithms.attack_objectives import error, with_auxiliary_loss
from pipeline.algorithms.moe_at import MoEAT
from pipeline.algorithms.pgd_training import PGDTraining
from pipeline.algorithms.standard import Standard
from pipeline.algorithms.trades import Trades
from pipeline.attacks.pgd import PGD
from pipeline.loop import RouterError, check_gate
from pipeline.optimization.awp import stacks
from pipeline.optimization.losses import cross_entropy_per_image
from pipeline.optimization.norm_bound import bound_norms
from pipeline.optimization.state import GROUPS, TrainState
from pipeline.seeding import Noise, generator_at

ATTACK = PGD(eps=0.1, step_size=0.05, steps=2)


def net(**settings: Any) -> TokenNetwork:
    torch.manual_seed(0)
    settings = {"num_experts": 4, "balance": 20.0, "z_loss": 0.01} | settings
    model = ViT(size="micro", ratio=0.125, patch=4, **settings).build(4, 8)
    assert isinstance(model, TokenNetwork)
    for layer in model.mixtures.values():
        torch.nn.init.normal_(layer.router.weight_SD, std=0.5)
    return model.train()


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    x_BCHW = torch.rand(count, 3, 8, 8, generator=generator_at("cpu", "batch"))
    return x_BCHW, torch.arange(count) % 4


def state_of(model: TokenNetwork, **settings: Any) -> TrainState:
    state = TrainState(model, {}, **settings)
    state.optimizers = {g: torch.optim.SGD(state.parameters(g), lr=0.1) for g in GROUPS}
    state.noise = Noise(generator_at("cpu", "update"))
    return state


@pytest.mark.parametrize("experts", [2, 4])
def test_auxiliary_loss_enters_the_objective(experts: int) -> None:
    model = net(num_experts=experts, noise_std=0.0)
    twin, (x_BCHW, y_B) = copy.deepcopy(model), batch()
    state = state_of(model)
    losses = Standard().step(state, x_BCHW, y_B)
    routed = twin(x_BCHW)
    assert routed.balance is not None
    auxiliary = auxiliary_loss(routed.balance, twin.auxiliary_weights)
    assert_close(losses["auxiliary"], auxiliary.detach())
    loss = cross_entropy_per_image(routed.logits, y_B).mean() + auxiliary
    loss.backward()  # type: ignore[no-untyped-call]
    for found, want in zip(model.parameters(), twin.parameters(), strict=True):
        assert want.grad is not None
        assert_close(found, want - 0.1 * want.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "algorithm",
    [Standard(), PGDTraining(attack=ATTACK), Trades(attack=ATTACK), MoEAT(attack=ATTACK)],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_an_update_does_not_depend_on_the_number_of_workers(algorithm: Any) -> None:
    """Two workers in lockstep, each on half of the batch, against one on the whole."""
    import threading

    x_BCHW, y_B = batch()
    alone = state_of(net())
    losses = algorithm.step(alone, x_BCHW, y_B)
    barrier, flats, found = threading.Barrier(2), [torch.empty(0)] * 2, [{}, {}]
    models = [net(), net()]

    def work(rank: int) -> None:
        def average(flat: Tensor) -> None:
            flats[rank] = flat.clone()
            barrier.wait()
            flat.copy_((flats[0] + flats[1]) / 2)
            barrier.wait()

        state = state_of(models[rank], average=average)
        state.noise = Noise(generator_at("cpu", "update"), rank, 2)
        own = slice(4 * rank, 4 * rank + 4)
        found[rank] = algorithm.step(state, x_BCHW[own], y_B[own])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0]["auxiliary"] == found[1]["auxiliary"]
    assert_close(found[0]["auxiliary"], losses["auxiliary"], rtol=1e-4, atol=1e-6)
    for one, other, want in zip(
        models[0].parameters(), models[1].parameters(), alone.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)
        assert_close(one, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
def test_every_router_is_watched(router: Any) -> None:
    state = state_of(net(router=router))
    PGDTraining(attack=ATTACK).step(state, *batch())
    watched = state.check(1)
    norms = [v for k, v in watched.items() if k.endswith(".mlp.router")]
    assert len(norms) == 3
    assert min(norms) > 0
    check_gate(1, watched)


def test_a_router_without_a_gradient_stops_the_run_by_name() -> None:
    model = net(balance=0.0, z_loss=0.0)
    layer = model.mixtures["body.blocks.3.mlp"]
    plain = layer.router.forward
    layer.router.forward = lambda x: plain(x).detach()  # type: ignore[method-assign]
    state = state_of(model)
    Standard().step(state, *batch())
    with pytest.raises(RouterError, match=r"the body\.blocks\.3\.mlp\.router gets no gradient"):
        check_gate(1, state.check(1))


def test_attack_may_raise_the_auxiliary_losses_too() -> None:
    model = net(balance=1e4).eval()
    x_BCHW, y_B = batch()
    plain = ATTACK(error(y_B)(model, x_BCHW), x_BCHW, Noise(generator_at("cpu", "a")))
    raised = with_auxiliary_loss(error(y_B))(model, x_BCHW)
    both = ATTACK(raised, x_BCHW, Noise(generator_at("cpu", "a")))
    height = [
        model.auxiliary_per_image(model.router_scores(x)).mean() for x in (x_BCHW, plain, both)
    ]
    assert height[2] > height[0]
    assert height[2] > height[1]
    own_B = model.auxiliary_per_image(model.router_scores(x_BCHW))
    alone = torch.stack(
        [model.auxiliary_per_image(model.router_scores(x[None]))[0] for x in x_BCHW]
    )
    assert_close(own_B, alone, rtol=1e-4, atol=1e-6)


def test_experts_of_a_stack_are_perturbed_and_bounded_each_for_itself() -> None:
    model = net()
    counts = {id(weight): count for weight, count in stacks(model, list(model.parameters()))}
    layer = model.mixtures["body.blocks.1.mlp"]
    assert counts[id(layer.up_EHD)] == counts[id(layer.down_EDH)] == 4
    assert id(layer.up_bias) not in counts
    before_EHD = layer.up_EHD.detach().clone()
    layer.up_EHD.data[1, 2] *= 100
    large_EHD = layer.up_EHD.detach().clone()
    bound_norms([layer.up_EHD], 1.0)
    assert_close(layer.up_EHD[1, 2], large_EHD[1, 2] / large_EHD[1, 2].abs().sum())
    assert torch.equal(layer.up_EHD[0], before_EHD[0])
