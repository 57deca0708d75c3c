"""What a person sees of a run: a live bar or plain lines, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from pipeline.measures import MEASURES, Transfer
from pipeline.measures.runner import Effort
from pipeline.measures.sanity.verdict import Verdict

EVERY = 9.0  # seconds between two plain lines within an epoch or an attack
WIDTH = 100  # of a table in a log, where a terminal's width is not known

TITLES = {
    "test/ra_worst": "RA, worst case over all attacks",
    "test/ra_transfer": Transfer.title,
    "test/ra_substitute": "RA, images made on a net trained on the answers",
    "route/entropy": "entropy of the load (nats)",
    "route/flip_rate": "routes changed by the white-box attack",
    "route/flip_rate_broken": "of the images that it broke",
    "route/flip_rate_surviving": "of the robust ones",
    "route/overlap": "overlap of the experts before and after (IoU)",
    "cost/gmac": "GMAC per image, router included",
    "cost/gmac_router": "GMAC of the router",
    "cost/params": "parameters",
    "cost/ratio_to_dense": "GMAC over the dense twin's",
    "cost/images_per_second": "images/s, one worker",
    "cost/images_per_second_dense": "images/s of the dense twin",
}


class Follower:
    """Shows the events of one run."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._last = time.monotonic()
        self._bar: Progress | None = None
        self._task: Any = None

    def handle(self, event: Mapping[str, Any]) -> None:
        """Show one event; kinds that say nothing to a person are ignored."""
        show = getattr(self, f"_show_{event['kind']}", None)
        if show is not None:
            show(event)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        (self._bar.console if self._bar else self.console).print(text, markup=False)
        self._last = time.monotonic()

    def _show_warning(self, event: Mapping[str, Any]) -> None:
        self.say(f"warning: {event['text']}")

    def _show_note(self, event: Mapping[str, Any]) -> None:
        self.say(str(event["text"]))

    def _show_resumed(self, event: Mapping[str, Any]) -> None:
        where = f"epoch {event['epoch']}" + (f", update {event['step']}" if event["step"] else "")
        self.say(f"continues after {where} from {event['checkpoint']}")

    def _show_crew(self, event: Mapping[str, Any]) -> None:
        self.say(f"{event['count']} of {event['of']} worker(s)")

    def _show_stopped(self, event: Mapping[str, Any]) -> None:
        self.say(event["text"])

    def _show_epoch(self, event: Mapping[str, Any]) -> None:
        v = event["values"]
        losses = " ".join(
            f"{name.removeprefix('train/loss_')} {value:.3f}"
            for name, value in v.items()
            if name.startswith("train/loss_")
        )
        self.say(
            f"epoch {event['epoch']}/{event['epochs']}  loss {losses}  "
            f"val SA {v['val/sa']:.1%} RA {v['val/ra']:.1%}  "
            f"{v['train/images_per_second']:.0f} images/s  {span(event['seconds_left'])} left"
        )

    def _show_progress(self, event: Mapping[str, Any]) -> None:
        text = (
            f"loss {event['loss']:.3f}  {event['images_per_second']:.0f} images/s  "
            f"{span(event['seconds_left'])} left"
        )
        where = f"epoch {event['epoch']}/{event['epochs']}"
        self._step(where, int(event["step"]), int(event["steps"]), text)

    def _show_judging(self, event: Mapping[str, Any]) -> None:
        text = f"{span(event['seconds'])} so far"
        if event.get("left") is not None:
            text += f", about {span(event['left'])} left"
        self._step(f"attacks: {event['what']}", int(event["done"]), int(event["of"]), text)

    def _show_judged(self, event: Mapping[str, Any]) -> None:
        effort = Effort(event["seconds"], event["attacked"], event["reused"])
        if not effort.attacked:
            self.say(f"{event['name']}: all {effort.reused:,} outcomes are known from before")
            return
        share = f" on the first of {event['world']} workers" if event["world"] > 1 else ""
        known = f", {effort.reused:,} known from before" if effort.reused else ""
        self.say(
            f"{event['name']}: {effort.attacked:,} images{share} in {span(effort.seconds)}, "
            f"{effort.pace:.3g} images/s{known}"
        )

    def _step(self, where: str, done: int, of: int, text: str) -> None:
        if not self.console.is_terminal:
            if time.monotonic() - self._last > EVERY:
                self.say(f"{where}  {done}/{of}  {text}")
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(where, text=text)
        self._bar.update(self._task, description=where, completed=done, total=of, text=text)

    @property
    def _width(self) -> int | None:
        return None if self.console.is_terminal else WIDTH

    def results(self, title: str, metrics: Mapping[str, float]) -> None:
        """Print the table at the end of a run."""
        self.close()
        self.console.print(results_table(title, metrics), width=self._width)

    def efforts(self, jobs: Mapping[str, Mapping[str, Effort]]) -> None:
        """Print what each attack cost, and how much was known before."""
        self.console.print(efforts_table(jobs), width=self._width)
        every = [effort for efforts in jobs.values() for effort in efforts.values()]
        reused = sum(effort.reused for effort in every)
        of = reused + sum(effort.attacked for effort in every)
        self.say(f"reused {reused:,} of {of:,} outcomes")

    def verdict(self, verdict: Verdict) -> None:
        """Print the verdict, and each check that did not pass."""
        passed = sum(check.status == "pass" for check in verdict.checks)
        self.say(f"verdict: {verdict.status} ({passed} checks pass)")
        if "unchecked" in (verdict.status, verdict.worst):
            self.say(f"  {verdict.why or 'no black box was tried'}")
        for check in verdict.checks:
            if check.status in ("fail", "skip"):
                self.say(f"  {check.status} {check.name}: {check.words}")
        if verdict.worst != verdict.status:
            self.say(f"  the number to quote, test/ra_worst, is {verdict.worst}")
        if verdict.reading:
            self.say(f"  test/ra_worst is {verdict.reading}")


def results_table(title: str, metrics: Mapping[str, float]) -> Table:
    """Lay out metrics with their intervals."""
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")) or name.startswith("check/"):
            continue
        share = name.startswith(("test/", "corruption/"))
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        band = "" if low is None or high is None else f"{low:.1%} to {high:.1%}"
        table.add_row(describe(name), f"{value:.1%}" if share else f"{value:.4g}", band)
    return table


def efforts_table(jobs: Mapping[str, Mapping[str, Effort]]) -> Table:
    """Lay out seconds and pace: a line for each attack of the table, one for each other job."""
    table = Table(show_edge=False)
    for title in ("attack", "images attacked", "reused", "seconds", "images/s"):
        table.add_column(title, justify="left" if title == "attack" else "right")
    for job, efforts in jobs.items():
        rows = efforts if job == "main" else {f"checks: {job}": total(efforts.values())}
        for name, effort in rows.items():
            pace = f"{effort.pace:.1f}" if effort.attacked else ""
            counts = (f"{effort.attacked:,}", f"{effort.reused:,}", f"{effort.seconds:.1f}")
            table.add_row(name, *counts, pace)
    return table


def total(efforts: Iterable[Effort]) -> Effort:
    """Add up several attacks."""
    every = list(efforts)
    return Effort(
        sum(effort.seconds for effort in every),
        sum(effort.attacked for effort in every),
        sum(effort.reused for effort in every),
    )


def describe(name: str) -> str:
    """Say a metric in words, with its name."""
    if name.startswith("test/ra_pgd"):
        steps, _, aim = name.removeprefix("test/ra_pgd").partition("_")
        words = f"RA, PGD-{steps} on the {aim or 'cross-entropy'}"
    elif name.startswith("test/ra_each_"):
        words = f"RA of expert {name.removeprefix('test/ra_each_')} alone"
    else:
        kind = MEASURES.get(name.removeprefix("test/"))
        words = TITLES.get(name) or str(getattr(kind, "title", ""))
    return f"{name}  {words}".rstrip()


def span(seconds: float) -> str:
    """Say a time in the largest unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def aligned(rows: Sequence[tuple[str, ...]], left: int = 1) -> str:
    """Lay out rows as text for a terminal or a log: so many columns to the left, numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place < left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
