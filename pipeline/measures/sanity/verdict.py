"""Whether a robust accuracy can be believed: the checks in order, and the verdict they add up to.

A check that presupposes another one, which failed, is skipped: the cause is named and not its
symptoms. A gate that throws dice fails ``deterministic`` alone, though every comparison after it is
off as well.
"""

from __future__ import annotations

from collections.abc import Callable
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
SOUND = ("logits", *STEADY, "gradients")
STRONG = (*SOUND, "noise", "single_step", "black_box")
CHECKS: dict[str, tuple[Callable[[Evidence], CheckResult | None], tuple[str, ...]]] = {
    "logits": (checks.logits, ()),
    "deterministic": (checks.deterministic, ()),
    "batch": (checks.batch, ("deterministic",)),
    "gradients": (checks.gradients, ("logits", *STEADY)),
    "in_ball": (checks.in_ball, ("gradients",)),  # a gradient of NaN makes images of NaN
    "eps_zero": (checks.eps_zero, SOUND),
    "single_step": (checks.single_step, SOUND),
    "noise": (checks.noise, (*SOUND, "single_step")),
    "black_box": (checks.black_box, SOUND),
    "falls_with_eps": (checks.falls_with_eps, (*STRONG, "eps_zero")),
    "falls_with_steps": (checks.falls_with_steps, STRONG),
    "converged": (checks.converged, (*STRONG, "falls_with_steps")),
    "unbounded": (checks.unbounded, STRONG),
    "planted": (checks.planted, (*STRONG, "unbounded")),
    "gap": (checks.gap, STEADY),
    "plausible": (checks.plausible, ()),
}
"""Each check, and the checks that it presupposes, which stand before it."""


@dataclass(frozen=True)
class Verdict:
    """What the checks add up to.

    Attributes:
        status: ``reliable``; ``unreliable`` if a check failed; ``implausible`` if that is the only
            objection.
        why: The failed checks in words, empty if there are none.
        worst: The same for the number to quote, ``ra_worst``: the gap above it does not spoil it.
    """

    checks: tuple[Check, ...]
    status: Literal["reliable", "unreliable", "implausible"]
    why: str
    worst: Literal["reliable", "unreliable", "implausible"]

    @property
    def text(self) -> str:
        """The verdict in one line."""
        return f"{self.status}: {self.why}" if self.why else self.status

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
    why = "; ".join(f"{c.name}: {c.words}" for c in made if c.status == "fail")
    return Verdict(tuple(made), _status(failed), why, _status(failed - {"gap"}))


def _status(failed: set[str]) -> Literal["reliable", "unreliable", "implausible"]:
    if not failed:
        return "reliable"
    return "implausible" if failed == {"plausible"} else "unreliable"
