"""Writes the answer of a sweep: ``write_answer`` is what the driver calls at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

from pipeline.sweep.ablation import (
    Ablation,
    ablation_of,
    ablation_table,
    draw_ablation,
    write_ablation,
)
from pipeline.sweep.conditions import conditions
from pipeline.sweep.html_page import Picture, list_section, page, picture_section, table_section
from pipeline.sweep.importance import importance_table
from pipeline.sweep.pareto import front_of
from pipeline.sweep.trial_charts import Frame, draw_front, frame_of
from pipeline.sweep.trial_tables import (
    Table,
    as_markdown,
    cost,
    finalists_table,
    front_table,
    others_table,
    outcome,
    percent,
    safe,
    write_csv,
)
from pipeline.sweep.trials import Sweep, Trial, competing, read_sweep

NO_FRONT = "No trial can be compared yet: there is no front."


@dataclass(frozen=True)
class Answer:
    """What a sweep answers, before it is written in any form."""

    sweep: Sweep
    front: tuple[Trial, ...]
    compared: tuple[Trial, ...]
    conditions: tuple[str, ...]
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    ablation: Ablation | None = None

    @property
    def places(self) -> dict[str, int]:
        """Position of each trial, by its number: safe as a name where the number may be any."""
        return {trial.number: place for place, trial in enumerate(self.sweep.trials)}

    @property
    def title(self) -> str:
        """Name the sweep."""
        preset = f" on {self.sweep.preset}" if self.sweep.preset else ""
        return f"Sweep {self.sweep.space or self.sweep.parent.name}{preset}"


def write_answer(parent_run_id: str, folder: Path, tracking_uri: str | None = None) -> list[Path]:
    """Write the answer of a sweep, finished or not, into a folder; return the files.

    Raises:
        ValueError: There is no such run, or it is no sweep.
        ConnectionError: The MLflow server does not answer.
    """
    return write(answer(read_sweep(tracking_uri, parent_run_id)), folder)


def answer(sweep: Sweep) -> Answer:
    """Work out the front, and what has to be said of it."""
    able, notes = competing(sweep)
    front = front_of(able, sweep.axes)
    ablation = ablation_of(sweep, able)
    tables = [ablation_table(ablation)] if ablation else []
    tables += [front_table(sweep, front), finalists_table(sweep), others_table(sweep, front)]
    tables += [] if ablation else [importance_table(sweep, able)]
    return Answer(
        sweep,
        tuple(front),
        tuple(able),
        tuple(conditions(sweep, able)),
        (*sweep.notes, *notes),
        tuple(table for table in tables if table.rows),
        ablation,
    )


def write(found: Answer, folder: Path) -> list[Path]:
    """Write CSV, Markdown, picture and page."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "front.csv", folder / "answer.md"]
    write_csv(found.sweep, found.front, files[0])
    files[1].write_text(markdown(found), encoding="utf-8")
    if found.front:
        files.append(folder / "front.png")
        frame = frame_of(found.sweep, found.front, found.compared)
        draw_front(frame, found.places, files[-1], "png")
    if found.ablation:
        files += [folder / "ablation.csv", folder / "ablation.png"]
        write_ablation(found.ablation, files[-2])
        draw_ablation(found.ablation, files[-1], "png")
    files.append(folder / "front.html")
    files[-1].write_text(html(found), encoding="utf-8")
    return files


def html(found: Answer) -> str:
    """Write the whole answer as one page that loads nothing."""
    sections = [list_section("", found.conditions)]
    ids = {number: f"trial-{place}" for number, place in found.places.items()}
    if found.front:
        sections.append(picture_section(front_picture(found, ids)))
    else:
        sections.append(f"<p>{escape(NO_FRONT)}</p>")
    if ablation := found.ablation:
        said = f"Shares over the values of {ablation.name}, with 95% intervals; below, the cost."
        draw = partial(draw_ablation, ablation, kind="svg")
        sections.append(picture_section(Picture("ablation", said, draw, {})))
    sections += [table_section(table, ids) for table in found.tables]
    if found.notes:
        sections.append(list_section("Notes", found.notes))
    return page(found.title, sections)


def front_picture(found: Answer, ids: Mapping[str, str]) -> Picture:
    """The front as a figure of the page."""
    frame = frame_of(found.sweep, found.front, found.compared)
    members = {trial.number for trial in found.front}
    marks = {
        f"{panel}-{place}": (ids[number], spoken(trial, frame, number in members))
        for trial in found.sweep.trials
        for number in [trial.number]
        for place in [found.places[number]]
        for panel in "ab"
    }
    description = (
        f"{frame.y.title} over {frame.x.title}, coloured by {frame.cost.title}, and over "
        f"{frame.cost.title}: {len(found.front)} of {len(found.compared)} compared trials are on "
        "the front. The tables below hold every number."
    )
    return Picture(
        "front", description, partial(draw_front, frame, found.places, kind="svg"), marks
    )


def spoken(trial: Trial, frame: Frame, on_front: bool) -> str:
    """Say what a mark of the picture is."""
    told = [f"{a.title} {percent(s)}" for a in (frame.x, frame.y) if (s := trial.share(a.metric))]
    if (value := trial.value(frame.cost.metric)) is not None:
        told.append(f"{cost(frame.cost.metric, value)} {frame.cost.title}")
    kind = "on the front" if on_front else outcome(trial)
    return f"Trial {trial.number}, {kind}: {'; '.join(told)}"


def markdown(found: Answer) -> str:
    """Write the whole answer as Markdown."""

    def listed(lines: Sequence[str]) -> str:
        return "\n".join(f"- {safe(line)}" for line in lines)

    parts = [f"# {safe(found.title)}", listed(found.conditions)]
    if not found.front:
        parts.append(NO_FRONT)
    for table in found.tables:
        parts += [f"## {safe(table.title)}", *map(safe, table.notes), as_markdown(table)]
    if found.notes:
        parts += ["## Notes", listed(found.notes)]
    return "\n\n".join(parts) + "\n"
