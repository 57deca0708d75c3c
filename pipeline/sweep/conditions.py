"""Conditions of a sweep's numbers, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.report.grouping import fraction, short
from pipeline.sweep.trials import Sweep, Trial, is_share


def conditions(sweep: Sweep, compared: Sequence[Trial]) -> list[str]:
    """Describe objectives, data, threat and code."""
    goals = ", ".join(f"{'highest' if a.mode == 'max' else 'lowest'} {a.title}" for a in sweep.axes)
    searched = ", ".join(sweep.keys) or "nothing"
    lines = [
        f"{len(sweep.trials)} trials ({ended(sweep)}); searched: {searched}; front of {goals}.",
    ]
    if not compared:
        return lines
    lines.append(f"{evaluated_on(sweep, compared)}; {threat(compared)}.")
    lines.append(trained(sweep, compared))
    if half := widest(sweep, compared):
        lines.append(
            f"An interval reaches up to {100 * half:.1f} points to either side: trials closer than "
            "that cannot be distinguished, whichever of them is on the front."
        )
    if len(seeds := {trial.run.seed for trial in compared}) == 1:
        lines.append(
            f"One seed ({seeds.pop()}): nothing is said of the spread between seeds. Many trials "
            "evaluated on the same images: the best of them looks better than it is."
        )
    return lines


def widest(sweep: Sweep, trials: Sequence[Trial]) -> float:
    """How far the shares' intervals reach at most; 0 where they have none."""
    axes = [axis.metric for axis in sweep.axes if is_share(axis.metric)]
    found = [trial.share(metric) for trial in trials for metric in axes]
    halves = [(s.high - s.low) / 2 for s in found if s is not None and s.high == s.high]
    return max(halves, default=0.0)


def ended(sweep: Sweep) -> str:
    """Count how the trials ended."""
    return ", ".join(f"{n} {status}" for status, n in sweep.counts.most_common()) or "none"


def evaluated_on(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """Say on which images the shares are taken."""
    images = sorted({trial.images for trial in trials if trial.images})
    count = " or ".join(f"{n:,}" for n in images) or "an unknown number of"
    tier = f", tier {sweep.tier}" if sweep.tier else ""
    return (
        f"Percent of {count} images of the {sweep.split} split{tier}, "
        "with 95% Wilson intervals over images"
    )


def threat(trials: Sequence[Trial]) -> str:
    """Describe the threat of the evaluations."""
    params = trials[0].run.params
    eps = fraction(params.get("evaluation.eps", "?"))
    return f"threat {params.get('evaluation.norm', '?')}, eps {eps}"


def trained(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """Say how the trials were trained, and by which code."""

    def each(key: str) -> str:
        return listed(short(trial.run.params.get(key)) for trial in trials)

    images = each("dataset.train_images")
    parts = [
        f"{each('dataset')}, training images {'all' if images == 'None' else images}",
        f"epochs {each('epochs')}",
        f"seed {each('seed')}",
    ]
    for name, most in (("commit", 12), ("hardware", 120)):
        own = [trial.run.tags[name] for trial in trials if name in trial.run.tags]
        if found := own or [tag for tag in [sweep.parent.tags.get(name)] if tag]:
            parts.append(f"{name} {listed(tag[:most] for tag in found)}")
    return f"Trained on {'; '.join(parts)}."


def listed(values: Iterable[str]) -> str:
    """Join values, each once."""
    return ", ".join(sorted(set(values)))
