"""A vision transformer whose tokens route for themselves in every mixture layer (V-MoE).

Shapes: B images, T tokens, L mixture layers, E experts, S slots, K classes, M = L T decisions of an
image, the first layer's tokens first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moe.moe_mlp import MoEMlp
from moe.network import PIECE, Network
from moe.normalize import Normalize
from moe.routing import Routed
from moe.token_routing import (
    AuxiliaryWeights,
    Relaxation,
    TokenRouting,
    auxiliary_loss,
    gshard_loss,
    squared_variation,
)


class TokenNetwork(Network):
    """A classifier with a router for the tokens of each mixture layer.

    What routes and attacks on them mean here, where an image makes M = L T decisions and there are
    E^M routes (or more, with several experts per token), which no search covers:

    - ``Routed.router`` holds scores per decision, (B, M, E); ``Routed.route`` each token's first
      choice, (B, M). The gates are a function of the scores.
    - A forced route (``along``): each token runs one given expert, weighted by the sum of the gates
      of its own choice, so that the output keeps its scale; that sum stays a function of the image.
      ``ra_forced`` and ``ra_each`` try the E routes that take one expert throughout, ``ra_floor``
      is over the same E routes: a hint, and no lower bound.
    - RA-E (``held``): scores of the clean image in every layer, whatever the tokens have become.
    - RA-R: the mean over decisions of the cross-entropy of the scores against the first choices.
    - In place of a search over routes: gradients through soft gates (``along_soft``), the pull of
      all tokens to one expert, routes frozen at clean values, and routes of other images; success
      is that of the deployed network.

    Gates are differentiable, so attacks take their true gradient, whatever ``gate_gradient`` says;
    what the gradient does not see is which experts are chosen.

    Args:
        body: Module ``(x_BCHW, TokenRouting) -> logits (B, K)`` with one or more ``MoEMlp``.
        normalize: Of the pixels.
        tokens: T.
    """

    def __init__(self, body: nn.Module, *, normalize: Normalize, tokens: int):
        layers = [module for module in body.modules() if isinstance(module, MoEMlp)]
        super().__init__(
            body,
            None,
            normalize=normalize,
            num_experts=layers[0].num_experts,
            num_layers=len(layers) * tokens,
        )
        self.tokens = tokens

    @property
    def mixtures(self) -> dict[str, MoEMlp]:
        """The mixture layers by name, in order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, MoEMlp)}

    @property
    def depth(self) -> int:
        """Number of mixture layers, L."""
        return self.num_layers // self.tokens

    @property
    def couples(self) -> bool:
        """Whether an image's answer may depend on the other images of a batch (capacity)."""
        return any(layer.settings.couples for layer in self.mixtures.values())

    @property
    def auxiliary_weights(self) -> AuxiliaryWeights:
        """Weights of the auxiliary losses."""
        return next(iter(self.mixtures.values())).settings.weights

    def forward(self, x_BCHW: Tensor, normal: Callable[[Tensor], Tensor] | None = None) -> Routed:
        """Classify pixels in [0, 1].

        Args:
            normal: Draws the noise of the routers in training, by default from torch's generator.
        """
        if self.training:
            routing = TokenRouting(normal=normal or torch.randn_like)
            logits_BK = self.body(self.normalize(x_BCHW), routing)
            return self._routed(logits_BK, routing)
        parts = []
        for x in self._pieces(x_BCHW):
            routing = TokenRouting()
            parts.append(self._routed(self.body(self.normalize(x), routing), routing))
        if len(parts) == 1:
            return parts[0]
        return Routed(*(torch.cat(column) for column in zip(*(p[:3] for p in parts), strict=True)))

    def along(self, x_BCHW: Tensor, route: Tensor) -> Tensor:
        """Classify (B, K) with one given expert for each decision (B, M), see the class.

        Raises:
            ValueError: The route has another shape, or names an expert that is not there.
        """
        self.check_route(x_BCHW, route)
        forced_BLT = torch.unflatten(route, 1, (self.depth, self.tokens))
        return self._run(x_BCHW, TokenRouting(forced_BLT=forced_BLT))

    def held(self, x_BCHW: Tensor, scores: Tensor) -> Tensor:
        """Classify (B, K) with the routing of other images, given by ``routing_scores``."""
        held = list(torch.unflatten(scores, 1, (self.depth, self.tokens)).unbind(1))
        return self._run(x_BCHW, TokenRouting(held=held))

    def routing_scores(self, x_BCHW: Tensor) -> Tensor:
        """Return what ``held`` routes by: scores (B, M, E), of Soft MoE per slot (B, M, S)."""
        routing = TokenRouting()
        self._run(x_BCHW, routing)
        return torch.cat(routing.raw, 1)

    def decisions(self, route: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Say who decided what: each layer's router its tokens' first choices."""
        layers = torch.split(route, self.tokens, 1)
        names = (f"router of {name.removeprefix('body.')}" for name in self.mixtures)
        return {n: (own, self.num_experts) for n, own in zip(names, layers, strict=True)}

    def router_scores(self, x_BCHW: Tensor) -> Tensor:
        """Score the experts for each decision on pixels in [0, 1], (B, M, E)."""
        scores_BME: Tensor = self(x_BCHW).router
        return scores_BME

    def scores_along(self, x_BCHW: Tensor, route: Tensor) -> Tensor:
        """Score the experts as deployed: a token's gates are smooth, and so few scores jump."""
        return self.router_scores(x_BCHW)

    def along_soft(
        self, x_BCHW: Tensor, relax: Relaxation, *, hard_forward: bool = False
    ) -> Tensor:
        """Classify (B, K) with all experts in each token's output, weighted by ``relax``.

        Soft MoE has nothing to relax and runs as it is.

        Args:
            hard_forward: Whether the deployed weights are used, with the gradient of ``relax``.
        """
        return self._run(x_BCHW, TokenRouting(relax=relax, hard_forward=hard_forward))

    def auxiliary_per_image(self, scores_BME: Tensor) -> Tensor:
        """Auxiliary losses of each image's own tokens (B,), summed over layers, without noise.

        What an attack with ``attack_auxiliary_loss`` raises, image by image.
        """
        soft_BLTE = torch.unflatten(scores_BME, 1, (self.depth, self.tokens)).softmax(3)
        mean_BLE, weights = soft_BLTE.mean(2), self.auxiliary_weights
        if self.num_experts > 2:
            return weights.importance * squared_variation(mean_BLE).sum(1)
        first_BLT = soft_BLTE.argmax(3)
        first_BLE = nn.functional.one_hot(first_BLT, self.num_experts).to(soft_BLTE).mean(2)
        return weights.gshard * gshard_loss(mean_BLE, first_BLE).sum(1)

    def auxiliary_loss(self, balance_LSE: Tensor) -> Tensor:
        """Auxiliary losses of a batch from ``Routed.balance``, averaged over all workers."""
        return auxiliary_loss(balance_LSE, self.auxiliary_weights)

    def _run(self, x_BCHW: Tensor, routing: TokenRouting) -> Tensor:
        logits_BK: Tensor = self.body(self.normalize(x_BCHW), routing)
        return logits_BK

    def _routed(self, logits_BK: Tensor, routing: TokenRouting) -> Routed:
        scores_BME = torch.cat(routing.scores, 1)
        balance = torch.stack(routing.balance) if routing.balance else None
        return Routed(logits_BK, scores_BME, scores_BME.argmax(2), balance)

    def _pieces(self, x_BCHW: Tensor) -> Sequence[Tensor]:
        """Cut a batch for the cache of a CPU, but not where its images share a capacity."""
        if x_BCHW.device.type != "cpu" or self.couples or not len(x_BCHW):
            return (x_BCHW,)
        return torch.split(x_BCHW, PIECE)
