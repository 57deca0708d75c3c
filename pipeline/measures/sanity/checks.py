"""The sanity checks one by one: each looks at the evidence and says what it saw.

Noise: every check but ``plausible`` compares two outcomes of the same images, and fails only where
the difference passes its bound *and* is at least ``FEW`` images, so that a small set raises no
false alarm. ``plausible`` compares with other people's images and uses the end of the 95% interval.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.measures.base import Role
from pipeline.measures.confidence import wilson
from pipeline.measures.outcomes import Outcome, counts
from pipeline.measures.sanity.leaderboard import Reference
from pipeline.measures.sanity.probe_attacks import FACTORS, Facts, at_eps
from pipeline.measures.threat import Evaluation

FEW = 3  # images that a difference needs, whatever its share
UNFAITHFUL = 15.0  # points of images; honest networks have up to 3, see docs/evaluation.md
REPEATED, BATCHED, NORMALIZED = 1e-4, 1e-2, 1e-3  # rounding of GPUs stays far below these


@dataclass(frozen=True)
class Evidence:
    """What the checks look at; what is missing makes its checks not applicable.

    Attributes:
        threat: Radius, norm and steps.
        num_classes: For the accuracy of a guess.
        correct: By metric, which of N images stand; ``worst_N`` against all attacks.
        outcomes: By metric, all of the outcome, for the images' distances.
        probes: By name, which of the probed images stand
        (``pipeline.measures.sanity.probe_attacks``).
        probed_M: Rows of the N images that were probed.
        roles: By metric, what each attack sees of the model; white box where nothing is said.
        planted: Where the attack missed a planted point.
        facts: Of the model's outputs.
        reference: The best public result for this size and data.
        tier: How thorough the evaluation was.
    """

    threat: Evaluation
    num_classes: int
    correct: Mapping[str, Tensor]
    worst_N: Tensor | None = None
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    probes: Mapping[str, Tensor] = field(default_factory=dict)
    probed_M: Tensor | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)
    planted: Tensor | None = None
    facts: Facts | None = None
    reference: Reference | None = None
    tier: str = ""

    @property
    def plain(self) -> str:
        """Name of the plain number: PGD on the cross-entropy."""
        return f"ra_pgd{self.threat.steps}"


@dataclass(frozen=True)
class CheckResult:
    """What one check saw: a number, the bound it must keep, and both in words."""

    ok: bool
    value: float
    bound: float
    words: str


def points(images: float, n: int) -> float:
    """Images as percentage points."""
    return 100 * images / n


def excess(weaker_N: Tensor, stronger_N: Tensor, bound: float, words: str) -> CheckResult:
    """Compare two attacks: the stronger must not leave more standing, by ``bound`` points.

    Args:
        words: With places for the two accuracies in percent.
    """
    n, more = len(weaker_N), int(stronger_N.sum()) - int(weaker_N.sum())
    shares = [points(int(hits.sum()), n) for hits in (stronger_N, weaker_N)]
    text = f"{words.format(*(f'{share:.1f}%' for share in shares))} ({n} images)"
    return CheckResult(not exceeds(more, n, bound), points(more, n), bound, text)


def exceeds(images: float, n: int, bound: float) -> bool:
    """Tell whether a number of images passes a bound in points, and is more than noise."""
    return images >= FEW and points(images, n) > bound


def logits(e: Evidence) -> CheckResult | None:
    """Outputs are logits: a softmax hides gradients from every loss that takes logits."""
    if e.facts is None:
        return None
    off = e.facts.probability
    return CheckResult(
        off > NORMALIZED, off, NORMALIZED, f"outputs are {off:.2g} from a distribution"
    )


def deterministic(e: Evidence) -> CheckResult | None:
    """The same batch twice gives the same outputs and routes."""
    if e.facts is None:
        return None
    moved = e.facts.repeat
    return CheckResult(
        moved <= REPEATED, moved, REPEATED, f"logits differ by {moved:.2g} sd if repeated"
    )


def batch(e: Evidence) -> CheckResult | None:
    """An image is judged alike alone, in a batch, and in another order."""
    if e.facts is None:
        return None
    moved, flipped = e.facts.batch, e.facts.flipped
    text = f"logits alone or reordered differ by {moved:.2g} sd, {flipped} class(es) change"
    ok = moved <= BATCHED and not flipped
    text += "" if ok else ": an image's answer depends on the other images of its batch"
    return CheckResult(ok, moved, BATCHED, text)


def gradients(e: Evidence) -> CheckResult | None:
    """Input gradients of the cross-entropy are finite and not zero."""
    return _share(e, "gradients", 0.1, "input gradients are zero or not finite")


def faithful(e: Evidence) -> CheckResult | None:
    """The margin changes as its input gradient says, at the size of an attack's step."""
    return _share(e, "faithful", UNFAITHFUL, "margins do not change as their gradients say")


def continuous(e: Evidence) -> CheckResult | None:
    """The margin passes through zero where the class changes."""
    return _share(e, "continuous", UNFAITHFUL, "margins jump where the class changes")


def router_gradient(e: Evidence) -> CheckResult | None:
    """The router's scores have input gradients: without, no attack on routes sees where to go."""
    words = "gaps between two experts have no input gradient: attacks on routes are blind"
    return _share(e, "router gradient", 0.1, words)


def router_faithful(e: Evidence) -> CheckResult | None:
    """The gap between two experts changes as its gradient says, near a change of route too."""
    words = "gaps between two experts do not change as their gradients say"
    return _share(e, "router faithful", UNFAITHFUL, words)


def _share(e: Evidence, probe: str, bound: float, words: str) -> CheckResult | None:
    if (fine := e.probes.get(probe)) is None:
        return None
    n, bad = len(fine), int((~fine).sum())
    return CheckResult(not exceeds(bad, n, bound), points(bad, n), bound, f"{bad} of {n} {words}")


def in_ball(e: Evidence) -> CheckResult | None:
    """Attacked images lie within eps of the clean ones, and in [0, 1]."""
    seen = {name: outcome for name, outcome in e.outcomes.items() if name != "sa"}
    if not seen:
        return None
    bound, linf = e.threat.eps + 1e-6 * (1 + e.threat.eps), e.threat.norm == "linf"
    far, outside = {}, 0
    for name, outcome in seen.items():
        distance_N = (outcome.linf_N if linf else outcome.l2_N)[outcome.seen_N]
        far[name] = float(distance_N.amax()) if len(distance_N) else 0.0
        outside += int((~outcome.valid_N[outcome.seen_N]).sum())
    worst = max(far, key=lambda name: far[name] if far[name] == far[name] else float("inf"))
    text = f"{worst} moves an image by {far[worst]:.6g} of eps {e.threat.eps:.6g}"
    text += f"; {outside} image(s) outside [0, 1] or not finite"
    return CheckResult(far[worst] <= bound and not outside, far[worst], bound, text)


def eps_zero(e: Evidence) -> CheckResult | None:
    """RA at eps=0 equals SA."""
    if (robust := e.probes.get("eps 0")) is None:
        return None
    clean, n = e.probes["sa"], len(robust)
    differ = int((robust != clean).sum())
    shares = [points(int(hits.sum()), n) for hits in (robust, clean)]
    text = f"RA at eps=0 is {shares[0]:.1f}%, SA {shares[1]:.1f}% ({n} images)"
    return CheckResult(differ == 0, points(differ, n), 0.0, text)


def falls_with_eps(e: Evidence) -> CheckResult | None:
    """RA does not rise with eps, by 0.1 points from any radius to the next."""
    names = [at_eps(e.threat, factor) for factor in FACTORS]
    return _falls([name for name in names if name in e.probes], e)


def falls_with_steps(e: Evidence) -> CheckResult | None:
    """RA does not rise with steps, by 0.1 points."""
    names = [name for name in e.probes if name.startswith("steps ")]
    return _falls(sorted(names, key=lambda name: int(name.split()[1])), e)


def _falls(names: list[str], e: Evidence) -> CheckResult | None:
    found = [
        excess(e.probes[a], e.probes[b], 0.1, f"RA is {{0}} at {b} and {{1}} at {a}")
        for a, b in pairwise(names)
    ]
    return max(found, key=lambda seen: seen.value, default=None)


def converged(e: Evidence) -> CheckResult | None:
    """Four times the steps change RA by less than 0.5 points."""
    names = [f"steps {factor * e.threat.steps}" for factor in (1, 4)]
    if any(name not in e.probes for name in names):
        return None
    few, many = (e.probes[name] for name in names)
    return excess(many, few, 0.5, f"RA is {{0}} at {names[0]} and {{1}} at {names[1]}")


def single_step(e: Evidence) -> CheckResult | None:
    """Many steps are at least as strong as one."""
    if (single := e.probes.get("single")) is None:
        return None
    many = e.probes[f"steps {e.threat.steps}"]
    return excess(single, many, 0.1, f"RA is {{0}} at {e.threat.steps} steps and {{1}} at one")


def noise(e: Evidence) -> CheckResult | None:
    """Random noise is weaker than the attack."""
    if (still := e.probes.get("noise")) is None:
        return None
    many = e.probes[f"steps {e.threat.steps}"]
    return excess(still, many, 0.0, "RA is {0} under PGD and {1} under noise")


def unbounded(e: Evidence) -> CheckResult | None:
    """An attack that may do anything leaves no more than a guess would."""
    if (far := e.probes.get("unbounded")) is None:
        return None
    n, hits, guess = len(far), int(far.sum()), 1 / e.num_classes
    text = f"RA at eps=0.5 is {points(hits, n):.1f}%, a guess {100 * guess:.1f}% ({n} images)"
    return CheckResult(not exceeds(hits - guess * n, n, 0.0), points(hits, n), 100 * guess, text)


def black_box(e: Evidence) -> CheckResult | None:
    """Attacks without gradients break next to nothing that gradients do not."""
    blind = ("black_box", "transfer")
    black = [h for k, h in e.correct.items() if counts(k) and e.roles.get(k) in blind]
    white_N = white_box(e)
    if white_N is None:
        return None
    found = []
    if black:
        found.append(_beaten(white_N, torch.stack(black).all(0), "black-box attacks"))
    if (queried_M := e.probes.get("queries")) is not None and e.probed_M is not None:
        standing_N = white_N if e.worst_N is None else e.worst_N
        found.append(_beaten(standing_N[e.probed_M], queried_M, "random search"))
    return max(found, key=lambda seen: (not seen.ok, seen.value), default=None)


def _beaten(white_N: Tensor, black_N: Tensor, who: str) -> CheckResult:
    won, n = int((white_N & ~black_N).sum()), len(white_N)
    text = f"{who} alone break {won} of {n} images"
    return CheckResult(not exceeds(won, n, 0.2), points(won, n), 0.2, text)


def white_box(e: Evidence) -> Tensor | None:
    """Which images stand against all attacks by the model's own gradients; None: none was made."""
    white = [
        hits
        for name, hits in e.correct.items()
        if counts(name) and e.roles.get(name, "white_box") == "white_box"
    ]
    return torch.stack(white).all(0) if white else None


def planted(e: Evidence) -> CheckResult | None:
    """The attack finds adversarial points that were planted (binarization test)."""
    if e.planted is None:
        return None
    missed, n = int(e.planted.sum()), len(e.planted)
    text = f"{missed} of {n} planted adversarial points were missed"
    return CheckResult(not exceeds(missed, n, 5.0), points(missed, n), 5.0, text)


def gap(e: Evidence) -> CheckResult | None:
    """The plain number is at most 2 points above the worst case."""
    if e.worst_N is None or e.plain not in e.correct:
        return None
    if sum(counts(name) for name in e.correct) < 2:
        return None
    plain_N, n = e.correct[e.plain], len(e.worst_N)
    over = int(plain_N.sum()) - int(e.worst_N.sum())
    shares = [points(int(hits.sum()), n) for hits in (plain_N, e.worst_N)]
    text = f"{e.plain} {shares[0]:.1f}% is {points(over, n):.1f} points above the worst case"
    text += f" {shares[1]:.1f}%"
    if exceeds(over, n, 2.0):
        text += f": quote ra_worst; what {e.plain} leaves is broken by {_who(e)}"
    return CheckResult(not exceeds(over, n, 2.0), points(over, n), 2.0, text)


def _who(e: Evidence) -> str:
    """Name the attack that breaks most of what the plain one leaves."""
    left = {
        name: int((e.correct[e.plain] & ~hits).sum())
        for name, hits in e.correct.items()
        if counts(name)
    }
    name = max(left, key=lambda key: left[key])
    return f"{name} ({left[name]} images)"


def plausible(e: Evidence) -> CheckResult | None:
    """RA is not 2 points above the best public one, unless the full tier says so."""
    if e.reference is None or e.worst_N is None:
        return None
    hits, n, best = int(e.worst_N.sum()), len(e.worst_N), e.reference.robust
    low = 100 * wilson(hits, n)[0]
    text = f"RA {points(hits, n):.1f}% (interval from {low:.1f}%), best public {best:.2f}% "
    text += f"({e.reference.backbone}, {e.reference.dataset})"
    ok = low <= best + 2 or e.tier == "full"
    return CheckResult(ok, points(hits, n), best + 2, text)
