"""Timing of variants in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Variant(NamedTuple):
    """One way to do the work.

    Attributes:
        work: What is timed.
        before: What is done before, and not timed.
        trial: What warms up and is counted, where the work is too long for that; None: the work.
        timed: The work, where it takes times of its own: seconds of each repetition in it.
    """

    work: Callable[[], object]
    before: Callable[[], object] = lambda: None
    trial: Callable[[], object] | None = None
    timed: Callable[[], list[float]] | None = None


@dataclass(frozen=True)
class Benchmark:
    """Several ways to do the same work.

    Attributes:
        title: What is timed.
        variants: By name.
        notes: Called after all rounds; lines that say whether the variants agree.
        turns: How often each variant has its turn in a round; more where a call is short.
        compare: Called with the outcome after all rounds; lines that say what follows.
    """

    title: str
    variants: Mapping[str, Variant]
    notes: Callable[[], list[str]]
    turns: int = 1
    compare: Callable[[RaceResult], list[str]] = lambda _: []


@dataclass(frozen=True)
class RaceResult:
    """What a race found, by variant.

    Attributes:
        gmac: 10^9 multiply-accumulates of one call.
        seconds: One time a turn.
    """

    gmac: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds of a variant."""
        return median(self.seconds[name])

    def speedup(self, name: str, over: str) -> float:
        """How many times faster a variant is than another: median of the turns' own ratios."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return median(slow / fast for slow, fast in pairs)


def race(benchmark: Benchmark, rounds: int, say: Callable[[str], object]) -> RaceResult:
    """Run all variants in turn, round by round; ``say`` gets a line per round.

    A first round warms up and counts multiply-accumulates, and is not timed.
    """
    outcome = RaceResult(seconds={name: [] for name in benchmark.variants})
    say("warming up")
    for name, variant in benchmark.variants.items():
        variant.before()
        with _Counter() as counter:
            (variant.trial or variant.work)()
        outcome.gmac[name] = counter.flops / 2e9
    for done in range(rounds):
        say(f"round {done + 1} of {rounds}")
        for name, variant in [*benchmark.variants.items()] * benchmark.turns:
            variant.before()
            took = variant.timed() if variant.timed else [seconds(variant.work)]
            outcome.seconds[name] += took
    return outcome


def seconds(work: Callable[[], object]) -> float:
    """Time one call, to the end of what it started on a GPU."""
    began = _now()
    work()
    return _now() - began


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Counter(TorchDispatchMode):
    """Counts floating-point operations of whatever runs, gradients of images alone included.

    ``FlopCounterMode`` counts the same, but stops at ``torch.autograd.grad``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=found)
        return found
