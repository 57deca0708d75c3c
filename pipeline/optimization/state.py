"""What training changes, and the one update that all algorithms share.

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from moe.fold_batchnorm import fold
from moe.network import Network, is_router_parameter
from moe.routing import Routed
from moe.token_network import TokenNetwork
from pipeline.attacks import Attack, Objective
from pipeline.attacks.pgd import UNSEEDED, Draw
from pipeline.context import keep
from pipeline.optimization.awp import Stack, perturbed, stacks, still_statistics
from pipeline.optimization.ema import WeightAverage
from pipeline.optimization.losses import cross_entropy_per_image
from pipeline.optimization.norm_bound import bound_norms

GROUPS = ("experts", "router")


@dataclass(frozen=True)
class Partition:
    """Which parameters share an optimizer.

    Attributes:
        names: Of the groups.
        of: From a parameter's name in the model to that of its group.
        mode: Puts a model in train mode but for the groups beside the one that is named; the empty
            name stands for all groups.
    """

    names: tuple[str, ...]
    of: Callable[[str], str]
    mode: Callable[[Network, str], None]


def _component_mode(model: Network, group: str) -> None:
    """Put a resting router in eval mode, without gradients through its gates.

    Resting experts keep normalizing by the statistics of the batch, as they do when they train,
    but those do not enter the running ones: early in training the running statistics lag so far
    behind that the straight-through gradient through them explodes.
    """
    model.train()
    for name, module in model.named_modules():
        if is_router_parameter(f"{name}."):
            module.train(group != "experts")
        elif isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = group != "router"
    model.gate_gradient = group != "experts"


def _half_mode(model: Network, group: str) -> None:
    for name, half in model.named_children():
        half.train(group in ("", name))


COMPONENTS = Partition(
    GROUPS, lambda name: "router" if is_router_parameter(name) else "experts", _component_mode
)
HALVES = Partition(("standard", "robust"), lambda name: name.partition(".")[0], _half_mode)
"""Of a dual model (``moe.dual_model``), each half with its router."""


def partition_of(algorithm: object) -> Partition:
    """Return the groups that an algorithm steps: its own, or experts and router."""
    found: Partition = getattr(algorithm, "partition", COMPONENTS)
    return found


Terms = Callable[[], dict[str, Tensor]]
"""Computes the terms of a loss at the weights as they are, by name, in nats per image."""


class NonFiniteError(RuntimeError):
    """A loss, gradient, score or adversarial image became NaN or infinite."""


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum the terms, each times its weight."""
    first, *rest = (weights[name] * term for name, term in terms.items())
    return sum(rest, first)


def check_reach(loss: Tensor, groups: Sequence[str]) -> None:
    """Refuse a loss that depends on no parameter that trains."""
    if not loss.requires_grad:
        raise ValueError(f"no gradient of the loss reaches {' and '.join(groups)}")


@dataclass
class TrainState:
    """A model and one optimizer per parameter group.

    Attributes:
        model: The network. Every replica holds the same numbers after every update.
        optimizers: By group: ``experts``, and ``router`` where there is one; or as ``partition``
            names them.
        average: Replaces a flat tensor by its mean over all workers, in place.
        noise: Random numbers of the current update, see ``pipeline.seeding``.
        watched: Scalars of the current update that must be finite, averaged over the workers.
        ema: The average of the weights over the updates, where one is kept.
        label_smoothing: Part of a label that ``cross_entropy`` spreads over all classes.
        clip_norm: Largest norm of a group's gradient; 0: any.
        norm_bound: Largest L-inf operator norm of a layer after an update; 0: any.
        awp_gamma: Size of the weight perturbation in ``minimize`` over that of the weights.
        partition: Which parameters are in which group.
        class_groups: Group of each class, where the data set has groups; see
            ``pipeline.data.base.class_groups``.
        balance: Statistics of token routers in the passes of ``forward`` since the last update.
    """

    model: Network
    optimizers: Mapping[str, Optimizer]
    average: Callable[[Tensor], None] = keep
    noise: Draw = UNSEEDED
    watched: dict[str, Tensor] = field(default_factory=dict)
    ema: WeightAverage = field(default_factory=WeightAverage)
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    norm_bound: float = 0.0
    awp_gamma: float = 0.0
    partition: Partition = COMPONENTS
    class_groups: tuple[int, ...] = ()
    balance: list[Tensor] = field(default_factory=list)

    @property
    def deployed(self) -> Network:
        """What is validated, kept as the model of a checkpoint and tested: the average, if any."""
        return self.ema.deployed(self.model)

    def parameters(self, group: str, part: str = "") -> list[nn.Parameter]:
        """List the parameters of a group that train, in the order of the model.

        Args:
            part: ``experts`` or ``router``: those of the group alone; empty: both.
        """
        return [
            p
            for n, p in self.model.named_parameters()
            if p.requires_grad and self.partition.of(n) == group and part in ("", COMPONENTS.of(n))
        ]

    @contextmanager
    def only(self, group: str) -> Iterator[Network]:
        """Train one group of the model; the others do not change by one bit."""
        resting = [p for g in self.partition.names if g != group for p in self.parameters(g)]
        for parameter in resting:
            parameter.requires_grad_(False)
        self.partition.mode(self.model, group)
        try:
            yield self.model
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)
            self.partition.mode(self.model, "")

    def perturb(
        self, attack: Attack, aim: Callable[[Network, Tensor], Objective], x_BCHW: Tensor
    ) -> Tensor:
        """Attack a frozen copy of the model in eval mode; the model itself is not touched."""
        frozen = fold(self.model)
        x_adv = attack(aim(frozen, x_BCHW), x_BCHW, self.noise)
        self.watch("adversarial images", x_adv.mean())
        return x_adv

    def forward(self, x_BCHW: Tensor) -> Routed:
        """Run the model for a loss; noise and auxiliary losses of token routers come with it."""
        token = isinstance(self.model, TokenNetwork)
        routed: Routed = self.model(x_BCHW, self.noise.normal) if token else self.model(x_BCHW)
        if routed.balance is not None:
            self.balance.append(routed.balance)
        return routed

    def _losses(
        self, terms: Terms, weights: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Compute the terms; with token routers their auxiliary losses too, as one more.

        These are functions of means over the whole batch. The value is that of the means over all
        workers, the gradient flows through this worker's own; averaged over the workers it is the
        gradient of the whole, whatever their number.
        """
        self.balance.clear()
        losses = terms()
        if not self.balance or not isinstance(self.model, TokenNetwork):
            return losses, dict(weights)
        own_LSE = torch.stack(self.balance).mean(0)
        whole_LSE = own_LSE.detach().clone()
        self._mean([whole_LSE])
        auxiliary = self.model.auxiliary_loss(own_LSE + (whole_LSE - own_LSE.detach()))
        return losses | {"auxiliary": auxiliary}, dict(weights) | {"auxiliary": 1.0}

    def watch(self, name: str, value: Tensor) -> None:
        """Keep a scalar to be checked, and reported, at the end of the update.

        The first of a name keeps its place: what is checked first is what went wrong first.
        """
        again = ", again" if name in self.watched else ""
        self.watched[name + again] = value.detach().float()

    def cross_entropy(self, logits_BK: Tensor, y_B: Tensor) -> Tensor:
        """Mean cross-entropy with smoothed labels, which are classes (B,) or shares (B, K)."""
        return cross_entropy_per_image(logits_BK, y_B, self.label_smoothing).mean()

    def minimize(
        self, terms: Terms, weights: Mapping[str, float], *groups: str
    ) -> dict[str, Tensor]:
        """Update the named groups once on the weighted sum of ``terms``; return them, detached.

        With ``awp_gamma`` the gradient is that at the worst weights of these groups nearby, for
        the same images (see ``pipeline.optimization.awp``), and so is the loss that is watched;
        the terms that
        are returned, and BatchNorm's running statistics, are those of the weights as they were,
        which the update starts from.
        """
        losses, weights = self._losses(terms, weights)
        loss = weighted(losses, weights)
        members = [p for own in self._members(*groups).values() for p in own]
        if self.awp_gamma and (layers := stacks(self.model, members)):
            check_reach(loss, groups)
            with self._worst_weights(loss, layers):
                self._backward(weighted(*self._losses(terms, weights)), *groups)
            self._step(*groups)
        else:
            self.descend(loss, *groups)
        return {name: term.detach() for name, term in losses.items()}

    def descend(self, loss: Tensor, *groups: str) -> None:
        """Update the named groups once; discard what ``loss`` sends to others.

        Gradients, watched scalars and BatchNorm statistics are averaged over the workers in one
        collective, so that the replicas stay equal to the bit.

        Raises:
            ValueError: The loss depends on no parameter that trains.
        """
        self._backward(loss, *groups)
        self._step(*groups)

    @contextmanager
    def _worst_weights(self, loss: Tensor, layers: Sequence[Stack]) -> Iterator[None]:
        weights = [weight for weight, _ in layers]
        slopes = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        self._mean(slopes)
        with perturbed(layers, slopes, self.awp_gamma), still_statistics(self.model):
            yield

    def _members(self, *groups: str) -> dict[str, list[nn.Parameter]]:
        return {g: self.parameters(g) for g in groups if g in self.optimizers}

    def _backward(self, loss: Tensor, *groups: str) -> None:
        check_reach(loss, groups)
        everything = [p for own in self._members(*groups).values() for p in own]
        for parameter in everything:
            parameter.grad = None
        self.watch(f"loss of {' and '.join(groups)}", loss)
        loss.backward(inputs=everything)  # type: ignore[no-untyped-call]
        for parameter in everything:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _step(self, *groups: str) -> None:
        members = self._members(*groups)
        self._share([p.grad for own in members.values() for p in own if p.grad is not None])
        for group, own in members.items():
            norm = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
            self.watch(f"gradient norm of {group}", norm)
            if group == "router" and isinstance(self.model, TokenNetwork):
                for name, layer in self.model.mixtures.items():
                    if (grad := layer.router.weight_SD.grad) is not None:
                        self.watch(f"gradient norm of {name}.router", grad.norm())
            if self.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(own, self.clip_norm, norm)
            self.optimizers[group].step()
            if self.norm_bound:
                bound_norms(own, self.norm_bound)

    def _share(self, tensors: list[Tensor]) -> None:
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]
        moving = [m for m in norms if m.track_running_stats]
        buffers = [b for m in moving for b in m.buffers() if b.is_floating_point()]
        self._mean([*tensors, *buffers, *self.watched.values()])

    def _mean(self, shared: Sequence[Tensor]) -> None:
        if self.average is keep:
            return
        flat = torch.cat([t.detach().flatten().float() for t in shared])
        self.average(flat)
        rows = torch.split(flat, [t.numel() for t in shared])
        for tensor, mean in zip(shared, rows, strict=True):
            tensor.detach().copy_(mean.view_as(tensor))

    def check(self, step: int) -> dict[str, float]:
        """Read the watched scalars and forget them.

        Raises:
            NonFiniteError: One of them is NaN or infinite; names the step and the quantity.
        """
        names, values = list(self.watched), list(self.watched.values())
        self.watched = {}
        numbers = dict(zip(names, torch.stack(values).tolist(), strict=True)) if values else {}
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise NonFiniteError(f"step {step}: {name} is {number}")
        return numbers
