"""The sparse layer of a transformer, forward and backward, over a dense MLP of the same work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.moe_mlp import MoEMlp, TokenMixture
from moe.token_routing import TokenRouting
from pipeline.bench.race import Benchmark, RaceResult, Variant
from pipeline.bench.settings import Settings

WIDTH, HIDDEN, TOKENS = 384, 1536, 65  # of ViT-S on 64 patches and a class token
EXPERTS, TOP_K, SKEW = (8, 32), (1, 2), 0.9


def planned_scores(tokens: int, experts: int, skewed: bool) -> Tensor:
    """Make scores (1, N, E) of even use of all experts, or with 90% of first choices for one."""
    first_N = torch.arange(tokens) % experts
    if skewed:
        busy_N = torch.arange(tokens) % 10 < 10 * SKEW
        first_N = torch.where(busy_N, 0, 1 + first_N % (experts - 1))
    second_N = (first_N + 1 + torch.arange(tokens) // experts % (experts - 1)) % experts
    scores_NE = torch.zeros(tokens, experts).scatter(1, second_N[:, None], 1.0)
    return scores_NE.scatter(1, first_N[:, None], 2.0)[None]


def token_routing(settings: Settings) -> Benchmark:
    """Run the layer forward and backward on the tokens of a batch; routes are given."""
    torch.manual_seed(0)
    tokens = settings.batch * TOKENS
    x_1ND, slope_1ND = torch.randn(2, 1, tokens, WIDTH, device=settings.device)
    x_1ND.requires_grad_()
    variants: dict[str, Variant] = {}
    dense = {
        k: nn.Sequential(nn.Linear(WIDTH, k * HIDDEN), nn.GELU(), nn.Linear(k * HIDDEN, WIDTH))
        for k in TOP_K
    }
    layers: list[nn.Module] = []

    def variant(module: nn.Module, routing_scores: Tensor | None) -> Variant:
        module.to(settings.device)
        layers.append(module)

        def clear() -> None:
            x_1ND.grad = None
            module.zero_grad(set_to_none=True)

        def work() -> None:
            if routing_scores is None:
                y_1ND: Tensor = module(x_1ND)
            else:
                y_1ND = module(x_1ND, TokenRouting(held=[routing_scores]))
            y_1ND.backward(slope_1ND)  # type: ignore[no-untyped-call]

        return Variant(work, clear)

    for k, module in dense.items():
        variants[_dense(k)] = variant(module, None)
    for experts in EXPERTS:
        for k in TOP_K:
            mixture = TokenMixture(num_experts=experts, top_k=k, noise_std=0.0)
            layer = MoEMlp(WIDTH, HIDDEN, TOKENS, mixture)
            for skewed in (False, True):
                scores = planned_scores(tokens, experts, skewed).to(settings.device)
                variants[_sparse(experts, k, skewed)] = variant(layer, scores)

    def compare(outcome: RaceResult) -> list[str]:
        return [
            f"{name}: {outcome.speedup(_dense(k), over=name):.2f} of a dense MLP of the same work"
            for experts in EXPERTS
            for k in TOP_K
            for name in (_sparse(experts, k, False), _sparse(experts, k, True))
        ]

    def notes() -> list[str]:
        layer = MoEMlp(WIDTH, HIDDEN, TOKENS, TokenMixture(num_experts=8, top_k=2)).double().eval()
        x = torch.randn(1, 40, WIDTH, dtype=torch.float64)
        scores = planned_scores(40, 8, True).double()
        found = layer(x, TokenRouting(held=[scores]))
        gap = float((found - _masked(layer, x, scores)).abs().max().detach())
        return [f"in float64 the layer and its masked definition differ by {gap:.0e}"]

    return Benchmark(
        title=f"mixture of MLPs, {tokens} tokens, {WIDTH} to {HIDDEN} wide, forward and backward",
        variants=variants,
        notes=notes,
        compare=compare,
    )


def _masked(layer: MoEMlp, x_1ND: Tensor, scores_1NE: Tensor) -> Tensor:
    up_EHD, up_EH, down_EDH, down_ED = layer.stacks
    h = F.gelu(torch.einsum("bnd,ehd->bneh", x_1ND, up_EHD) + up_EH)
    y = torch.einsum("bneh,edh->bned", h, down_EDH) + down_ED
    weights = layer.weights(scores_1NE).view_as(scores_1NE)
    return torch.einsum("bne,bned->bnd", weights, y)


def _dense(k: int) -> str:
    return f"dense MLP, {k} x {HIDDEN} wide"


def _sparse(experts: int, k: int, skewed: bool) -> str:
    return f"E={experts}, k={k}, {'90:10' if skewed else 'balanced'}"
