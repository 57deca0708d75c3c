"""What became of each image under each attack: the one thing that all numbers are made of.

Shapes: N images of a split, B of a batch, L self-routing layers (1 where one route serves all).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from moe.network import Network
from pipeline.measures import FLOORS
from pipeline.measures.base import Attacked, Measure
from pipeline.measures.routing_change import router_margin


def counts(name: str) -> bool:
    """Tell whether an attack counts into the worst case.

    Not so: no attack (sa); noise, a check of the others; and attackers with more power, who pick
    the expert as no image within eps may be able to (ra_floor, ra_each).
    """
    return name.startswith("ra_") and not name.startswith(("ra_noise", *FLOORS))


@dataclass(frozen=True)
class Outcome:
    """One attack's outcome, image by image; rows that nobody attacked are zero.

    Attributes:
        seen_N: Whether the attack was made, now or in an earlier evaluation.
        correct_N: Whether the deployed model still classifies the image right.
        route_NL: Experts chosen for the attacked image.
        gap_N: Distance of the router's best score from its second, the least over the layers; 0
            for a dense net.
        linf_N, l2_N: Distance of the attacked image from the clean one.
        valid_N: Whether the attacked image is finite and in [0, 1].
    """

    seen_N: Tensor
    correct_N: Tensor
    route_NL: Tensor
    gap_N: Tensor
    linf_N: Tensor
    l2_N: Tensor
    valid_N: Tensor

    @staticmethod
    def blank(n: int, layers: int) -> Outcome:
        """Make the outcome of no attack on any of n images."""
        shapes = {"route_NL": (n, layers)}
        return Outcome(**{k: torch.zeros(shapes.get(k, (n,)), dtype=t) for k, t in TYPES.items()})

    @property
    def columns(self) -> dict[str, Tensor]:
        """The tensors by name, all with one row per image."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def put(self, rows_B: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Fill in some images."""
        for name, tensor in self.columns.items():
            tensor[rows_B] = columns[name].to(tensor)

    def add(self, total: Callable[[Tensor], None]) -> None:
        """Join the shares of the workers, of which each filled in rows of its own."""
        for tensor in self.columns.values():
            whole = tensor.to(torch.float64)
            total(whole)
            tensor.copy_(whole)


TYPES = {
    "seen_N": torch.bool,
    "correct_N": torch.bool,
    "route_NL": torch.int64,
    "gap_N": torch.float32,
    "linf_N": torch.float32,
    "l2_N": torch.float32,
    "valid_N": torch.bool,
}


def observe(model: Network, x_BCHW: Tensor, outcome: Attacked) -> dict[str, Tensor]:
    """Describe a batch after an attack, as the columns of ``Outcome``."""
    x_adv = outcome.x_adv
    with torch.no_grad():
        routed = model(x_adv)
    step_BD = (x_adv - x_BCHW).flatten(1)
    return {
        "seen_N": torch.ones_like(outcome.correct_B),
        "correct_N": outcome.correct_B,
        "route_NL": routed.route.reshape(len(x_adv), -1),
        "gap_N": least_gap(routed.router),
        "linf_N": step_BD.abs().amax(1),
        "l2_N": step_BD.norm(dim=1),
        "valid_N": ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1),
    }


def least_gap(scores: Tensor) -> Tensor:
    """How clearly the router decides, (B,) from (B, E) or (B, L, E): the least over L, 0 if E=1."""
    if scores.shape[-1] < 2:
        return scores.new_zeros(len(scores))
    return router_margin(scores).reshape(len(scores), -1).amin(1)


class Store(Protocol):
    """Keeps outcomes from one evaluation to the next, see ``pipeline.evaluation.outcome_cache``.

    Images are known by numbers that stay theirs in every subset.
    """

    def read(self, measure: Measure) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images whose outcome is known, and its columns."""
        ...

    def write(self, measure: Measure, ids_B: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Keep the outcome of some images."""
        ...


def find(known_M: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
    """Match image numbers: positions in ``wanted_N`` that are known, and where they are kept."""
    place = {number: at for at, number in enumerate(known_M.tolist())}
    pairs = [(at, place[number]) for at, number in enumerate(wanted_N.tolist()) if number in place]
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
