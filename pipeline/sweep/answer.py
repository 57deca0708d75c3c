"""Answer of a sweep: front, importance or ablation, as CSV, Markdown, plots and HTML."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.report.tables import TextTable, as_markdown, write_csv
from pipeline.sweep.ablation import Ablation, ablation_of, ablation_records, ablation_table
from pipeline.sweep.conditions import conditions
from pipeline.sweep.html_page import image_figure, render, svg_figure
from pipeline.sweep.importance import importance_table
from pipeline.sweep.pareto import front_of
from pipeline.sweep.trial_charts import Frame, draw_ablation, draw_front, frame_of
from pipeline.sweep.trial_tables import finalists_table, front_table, others_table, trial_records
from pipeline.sweep.trials import Sweep, Trial, competing, read_sweep

NO_FRONT = "No trial can be compared yet: there is no front."


@dataclass(frozen=True)
class Answer:
    """Contents of the answer, before it is written in any form."""

    sweep: Sweep
    front: tuple[Trial, ...]
    compared: tuple[Trial, ...]
    conditions: tuple[str, ...]
    notes: tuple[str, ...]
    tables: tuple[TextTable, ...]
    ablation: Ablation | None = None

    @property
    def ids(self) -> dict[str, str]:
        """Id of each trial's row by its number, which may be any text."""
        return {trial.number: f"trial-{place}" for place, trial in enumerate(self.sweep.trials)}

    @property
    def frame(self) -> Frame:
        """Contents of the plot of the front."""
        links = {number: f"#{name}" for number, name in self.ids.items()}
        return frame_of(self.sweep, self.front, self.compared, links)

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
    """Compute the front, its tables and its conditions."""
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
    """Write CSV, Markdown, plots and page."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "front.csv", folder / "answer.md"]
    write_csv(files[0], trial_records(found.sweep, found.front))
    lead = (*found.conditions, *(() if found.front else (NO_FRONT,)))
    text = as_markdown(found.tables, found.notes, title=found.title, lead=lead)
    files[1].write_text(text, encoding="utf-8")
    if found.front:
        files.append(folder / "front.png")
        draw_front(found.frame, files[-1], "png")
    if found.ablation:
        files += [folder / "ablation.csv", folder / "ablation.png"]
        write_csv(files[-2], ablation_records(found.ablation))
        draw_ablation(found.ablation, files[-1])
    files.append(folder / "front.html")
    files[-1].write_text(page(found), encoding="utf-8")
    return files


def page(found: Answer) -> str:
    """Write the whole answer as one page."""
    frame, figures = found.frame, []
    if found.front:
        caption = (
            f"{frame.y.title} over {frame.x.title}, coloured by {frame.cost.title}, and over "
            f"{frame.cost.title}: {len(found.front)} of {len(found.compared)} compared trials are "
            "on the front. The tables below hold every number."
        )
        figures.append(svg_figure(partial(draw_front, frame, kind="svg"), caption))
    if ablation := found.ablation:
        caption = f"Shares over the values of {ablation.name}, with 95% intervals; below, the cost."
        figures.append(image_figure(partial(draw_ablation, ablation), caption))
    return render(
        title=found.title,
        lead=found.conditions,
        figures=figures,
        no_figure=NO_FRONT,
        tables=found.tables,
        ids=found.ids,
        notes=found.notes,
    )
