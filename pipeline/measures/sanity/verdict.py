"""Whether a robust accuracy can be believed: the checks in order, and the verdict they add up to.

A check that presupposes another one, which failed, is skipped: the cause is named and not its
symptoms. A gate that throws dice fails ``deterministic`` alone, though every comparison after it is
off as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.measures.sanity import checks
from pipeline.measures.sanity.checks import CheckResult, Evidence


@dataclass(frozen=True)
class Check:
    """One line of the verdict.

    Attributes:
        status: ``pass``, ``fail``, ``skip`` (presupposes a check that failed) or ``none`` (there
            is nothing to look at).
        value, bound: What was seen, and what it must not pass; None where nothing was.
    """

    name: str
    status: Literal["pass", "fail", "skip", "none"]
    words: str
    value: float | None = None
    bound: float | None = None


STEADY = ("deterministic", "batch")
SOUND = ("logits", *STEADY, "gradients", "faithful")
CLIMBS = (*SOUND, "single_step", "noise")
STRONG = (*CLIMBS, "falls_with_steps", "converged", "black_box")
CHECKS: dict[str, tuple[Callable[[Evidence], CheckResult | None], tuple[str, ...]]] = {
    "logits": (checks.logits, ()),
    "deterministic": (checks.deterministic, ()),
    "batch": (checks.batch, ("deterministic",)),
    "gradients": (checks.gradients, ("logits", *STEADY)),
    "faithful": (checks.faithful, ("logits", *STEADY, "gradients")),
    "continuous": (checks.continuous, ("logits", *STEADY, "gradients")),
    "router_gradient": (checks.router_gradient, STEADY),
    "router_faithful": (checks.router_faithful, (*STEADY, "router_gradient")),
    "in_ball": (checks.in_ball, ("gradients",)),  # a gradient of NaN makes images of NaN
    "eps_zero": (checks.eps_zero, SOUND),
    "single_step": (checks.single_step, SOUND),
    "noise": (checks.noise, (*SOUND, "single_step")),
    "falls_with_steps": (checks.falls_with_steps, CLIMBS),
    "converged": (checks.converged, (*CLIMBS, "falls_with_steps")),
    "black_box": (checks.black_box, (*CLIMBS, "falls_with_steps", "converged")),
    "falls_with_eps": (checks.falls_with_eps, (*STRONG, "eps_zero")),
    "unbounded": (checks.unbounded, STRONG),
    "planted": (checks.planted, (*STRONG, "unbounded")),
    "gap": (checks.gap, STEADY),
    "plausible": (checks.plausible, ()),
}
"""Each check, and the checks that it presupposes, which stand before it."""


NEEDED = (*SOUND, "noise", "single_step")
"""Without these no robust number is called reliable."""
NEEDED_WORST = (*NEEDED, "black_box")
"""Nor the worst case without these; ``router_gradient`` too where there is a router."""
Status = Literal["reliable", "optimistic", "unreliable", "implausible", "unchecked"]

READINGS: dict[str, str] = {
    "unreliable": "an upper bound by these attacks, not a measurement",
    "unchecked": "an upper bound by these attacks: not every check that it needs was made",
}


@dataclass(frozen=True)
class Verdict:
    """What the checks add up to.

    Attributes:
        status: Of the plain number: ``reliable``; ``optimistic`` if stronger attacks lower it, and
            nothing else is wrong; ``unreliable`` if a check failed; ``implausible`` if that is the
            only objection; ``unchecked`` if one that it needs was not made.
        why: The failed or missing checks in words, empty if there are none.
        worst: The same for the number to quote, ``ra_worst``, which the gap does not spoil.
    """

    checks: tuple[Check, ...]
    status: Status
    why: str
    worst: Status

    @property
    def text(self) -> str:
        """The verdict in one line; of what is optimistic, first by how many points."""
        over = next((c.value for c in self.checks if c.name == "gap"), None)
        if self.status == "optimistic" and over is not None:
            return f"optimistic: {over:.1f} points; {self.why}"
        return f"{self.status}: {self.why}" if self.why else self.status

    @property
    def reading(self) -> str:
        """How to read the worst case where it is not reliable; empty where it is."""
        return READINGS.get(self.worst, "")

    @property
    def tags(self) -> dict[str, str]:
        """The verdict as MLflow gets it."""
        return {"verdict": self.status, "verdict_why": self.why, "verdict_worst": self.worst}


def decide(evidence: Evidence) -> Verdict:
    """Make every check, in order, and say what follows."""
    made: list[Check] = []
    failed: set[str] = set()
    for name, (check, needs) in CHECKS.items():
        seen = check(evidence)
        if seen is None:
            made.append(Check(name, "none", "not looked at"))
            continue
        if spoiled := [need for need in needs if need in failed]:
            words = f"presupposes {spoiled[0]}, which failed; saw: {seen.words}"
            made.append(Check(name, "skip", words, seen.value, seen.bound))
            continue
        failed |= set() if seen.ok else {name}
        status: Literal["pass", "fail"] = "pass" if seen.ok else "fail"
        made.append(Check(name, status, seen.words, seen.value, seen.bound))
    missing = {check.name for check in made if check.status == "none"}
    worst = _status(failed - {"gap"}, [name for name in NEEDED_WORST if name in missing])
    lacks = [name for name in NEEDED if name in missing]
    why = "; ".join(f"{c.name}: {c.words}" for c in made if c.status == "fail")
    if not failed - {"gap"} and lacks:
        why = "; ".join([*([why] if why else []), f"not looked at: {', '.join(lacks)}"])
    return Verdict(tuple(made), _status(failed, lacks), why, worst)


def _status(failed: set[str], missing: Sequence[str]) -> Status:
    if failed - {"gap", "plausible"}:
        return "unreliable"
    if missing:
        return "unchecked"
    if "plausible" in failed:
        return "implausible"
    return "optimistic" if failed else "reliable"
