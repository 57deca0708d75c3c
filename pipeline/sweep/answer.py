"""Writes the answer of a sweep: ``write_answer`` is what the driver calls at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.sweep.conditions import conditions
from pipeline.sweep.front import front_of
from pipeline.sweep.tables import (
    Table,
    as_markdown,
    finalists_table,
    front_table,
    others_table,
    write_csv,
)
from pipeline.sweep.trials import Sweep, Trial, competing, read_sweep


@dataclass(frozen=True)
class Answer:
    """What a sweep answers, before it is written in any form."""

    sweep: Sweep
    front: tuple[Trial, ...]
    conditions: tuple[str, ...]
    notes: tuple[str, ...]
    tables: tuple[Table, ...]

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
    tables = [front_table(sweep, front), others_table(sweep, front), finalists_table(sweep)]
    return Answer(
        sweep,
        tuple(front),
        tuple(conditions(sweep, able)),
        (*sweep.notes, *notes),
        tuple(table for table in tables if table.rows),
    )


def write(found: Answer, folder: Path) -> list[Path]:
    """Write CSV, Markdown, picture and page."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "front.csv", folder / "answer.md"]
    write_csv(found.sweep, found.front, files[0])
    files[1].write_text(markdown(found), encoding="utf-8")
    return files


def markdown(found: Answer) -> str:
    """Write the whole answer as Markdown."""
    parts = [f"# {found.title}", "\n".join(f"- {line}" for line in found.conditions)]
    if not found.front:
        parts.append("No trial can be compared yet: there is no front.")
    for table in found.tables:
        parts += [f"## {table.title}", as_markdown(table)]
    if found.notes:
        parts += ["## Notes", "\n".join(f"- {line}" for line in found.notes)]
    return "\n\n".join(parts) + "\n"
