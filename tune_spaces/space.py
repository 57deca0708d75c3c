"""What a search varies, what it wants, and what it may spend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

Objectives = tuple[tuple[str, str], ...]
FRONT: Objectives = (("val/sa", "max"), ("val/ra_worst", "max"), ("cost/gmac", "min"))
"""Accuracy, robustness and cost pull apart: no single number is what a search wants."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A search space: ``param_space=dict(space.keys)`` of a Tuner, or ``python -m pipeline.tune``.

    Attributes:
        title: What is searched, in a line.
        preset: The run that is varied, unless the command line names another.
        keys: Dotted settings to ``ray.tune`` samplers, or all of them to ``tune.grid_search``.
        objectives: Metrics of a trial's end, each with ``max`` or ``min``; all on validation data.
        watched: Metric and mode that decide, epoch by epoch, which trials are stopped early.
        num_samples: Trials; those of a grid are its points.
        grace: Epochs that every trial has before it may be stopped.
        reduction: Of the trials that come to a rung (grace, grace * reduction, ... epochs), about
            one in so many goes on.
        workers: Data-parallel workers of a trial, each with a CPU, or a GPU where there are any.

    Raises:
        ValueError: There is no key, samplers and grids are mixed, or a number is out of its range.
    """

    title: str
    preset: str
    keys: Mapping[str, Any]
    objectives: Objectives = FRONT
    watched: tuple[str, str] = ("val/ra", "max")
    num_samples: int = 20
    grace: int = 1
    reduction: int = 2
    workers: int = 1

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys must name at least one setting, got none")
        if 0 < len(self.grid) < len(self.keys):
            mixed = ", ".join(self.grid)
            raise ValueError(f"keys must be all samplers or all grids, got grids for {mixed} alone")
        for name, least in (("num_samples", 1), ("grace", 1), ("reduction", 2), ("workers", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for metric, mode in (*self.objectives, self.watched):
            if mode not in ("max", "min"):
                raise ValueError(f"mode of {metric} must be max or min, got {mode!r}")

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values of each key that is searched in full; empty: keys are sampled."""
        return {
            key: list(value["grid_search"])
            for key, value in self.keys.items()
            if isinstance(value, dict) and "grid_search" in value
        }

    @property
    def points(self) -> int:
        """Count the points of a grid; zero where keys are sampled."""
        return prod(map(len, self.grid.values())) if self.grid else 0
