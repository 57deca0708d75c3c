"""What training changes, and the one update that all algorithms share.

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from moe.folding import fold
from moe.network import Network, is_router_parameter
from pipeline.attacks import Attack, Objective
from pipeline.attacks.pgd import UNSEEDED, Draw

GROUPS = ("experts", "router")


class NonFiniteError(RuntimeError):
    """A loss, gradient, score or adversarial image became NaN or infinite."""


def keep(flat: Tensor) -> None:
    """Average over one worker: leave the numbers as they are."""


@dataclass
class TrainState:
    """A model and one optimizer per parameter group.

    Attributes:
        model: The network. Every replica holds the same numbers after every update.
        optimizers: By group: ``experts``, and ``router`` where there is one.
        average: Replaces a flat tensor by its mean over all workers, in place.
        noise: Random numbers of the current update, see ``pipeline.seeding``.
        watched: Scalars of the current update that must be finite, averaged over the workers.
    """

    model: Network
    optimizers: Mapping[str, Optimizer]
    average: Callable[[Tensor], None] = keep
    noise: Draw = UNSEEDED
    watched: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self, group: str) -> list[nn.Parameter]:
        """List the parameters of a group that train, in the order of the model."""
        want = group == "router"
        named = self.model.named_parameters()
        return [p for n, p in named if p.requires_grad and is_router_parameter(n) == want]

    @contextmanager
    def only(self, group: str) -> Iterator[Network]:
        """Train one group of the model; the other does not change by one bit.

        A resting router is in eval mode, and its gates carry no gradient. Resting experts keep
        normalizing by the statistics of the batch, as they do when they train, but those do not
        enter the running ones: early in training the running statistics lag so far behind that
        the straight-through gradient through them explodes.
        """
        resting = [p for other in GROUPS if other != group for p in self.parameters(other)]
        norms = [m for m in self.model.body.modules() if isinstance(m, nn.BatchNorm2d)]
        self.model.train()
        for name, module in self.model.named_modules():
            if name == "router" or name.endswith(".gate"):
                module.train(group == "router")
        for parameter in resting:
            parameter.requires_grad_(False)
        for norm in norms:
            norm.track_running_stats = group == "experts"
        self.model.gate_gradient = group == "router"
        try:
            yield self.model
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)
            for norm in norms:
                norm.track_running_stats = True
            self.model.gate_gradient = True
            self.model.train()

    def perturb(
        self, attack: Attack, aim: Callable[[Network, Tensor], Objective], x_BCHW: Tensor
    ) -> Tensor:
        """Attack a frozen copy of the model in eval mode; the model itself is not touched."""
        frozen = fold(self.model)
        x_adv = attack(aim(frozen, x_BCHW), x_BCHW, self.noise)
        self.watch("adversarial images", x_adv.mean())
        return x_adv

    def watch(self, name: str, value: Tensor) -> None:
        """Keep a scalar to be checked, and reported, at the end of the update."""
        self.watched[name] = value.detach().float()

    def descend(self, loss: Tensor, *groups: str) -> None:
        """Update the named groups once; discard what ``loss`` sends to others.

        Gradients, watched scalars and BatchNorm statistics are averaged over the workers in one
        collective, so that the replicas stay equal to the bit.

        Raises:
            ValueError: The loss depends on no parameter that trains.
        """
        if not loss.requires_grad:
            raise ValueError(f"no gradient of the loss reaches {' and '.join(groups)}")
        parameters = {g: self.parameters(g) for g in groups if g in self.optimizers}
        everything = [p for group in parameters.values() for p in group]
        for parameter in everything:
            parameter.grad = None
        self.watch(f"loss of {' and '.join(groups)}", loss)
        loss.backward(inputs=everything)  # type: ignore[no-untyped-call]
        for parameter in everything:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._share([p.grad for p in everything if p.grad is not None])
        for group, members in parameters.items():
            grads = [p.grad for p in members if p.grad is not None]
            self.watch(f"gradient norm of {group}", torch.nn.utils.get_total_norm(grads))
            self.optimizers[group].step()

    def _share(self, tensors: list[Tensor]) -> None:
        if self.average is keep:
            return
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]
        moving = [m for m in norms if m.track_running_stats]
        buffers = [b for m in moving for b in m.buffers() if b.is_floating_point()]
        shared = [*tensors, *buffers, *self.watched.values()]
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
