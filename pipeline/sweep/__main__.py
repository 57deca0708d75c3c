"""Write the answer of a sweep again: ``python -m pipeline.sweep PARENT|latest [key=value ...]``."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.cli.arguments import fail, main, read_arguments
from pipeline.nearest_names import unknown
from pipeline.report.tables import as_text
from pipeline.sweep.answer import answer, write
from pipeline.sweep.trials import read_sweep
from pipeline.tracking import open_client, resolve_uri

USAGE = """
usage: python -m pipeline.sweep PARENT|latest [key=value ...] [--upload] [--help]

Write the answer of a sweep, finished or not, from MLflow alone: the Pareto front of its objectives
and every trial as CSV, Markdown, PNG and one HTML page; the ablation's table and plot where one
setting was searched, else which settings go with better numbers.

  folder        to write to (default: sweep)
  experiment    in which latest is looked for (default: robust-moe)
  tracking_uri  MLflow (default: MLFLOW_TRACKING_URI, else mlflow.db in the working directory)
  --upload      put the files on the parent run as well, below answer/
"""
KEYS = ("folder", "experiment", "tracking_uri")


def run(argv: list[str]) -> int:
    """Read the command line and MLflow, print and write; returns the exit code."""
    given = read_arguments(argv, usage=USAGE, flags=("--upload",))
    if not given.names:
        raise ValueError("which sweep? give the run id of its parent run, or latest")
    if wrong := [key for key in given.settings if key not in KEYS]:
        raise unknown("key", wrong[0], KEYS)
    uri = resolve_uri(given.settings.get("tracking_uri"))
    try:
        sweep = read_sweep(uri, given.names[0], given.settings.get("experiment", "robust-moe"))
        found = answer(sweep)
        files = write(found, Path(given.settings.get("folder", "sweep")))
        if "--upload" in given.flags:
            client = open_client(uri)
            for file in files:
                client.log_artifact(sweep.parent.run_id, str(file), "answer")
    except ConnectionError as error:
        return fail(str(error), 1)
    print("\n".join((found.title, *found.conditions)))
    print("\n" + as_text(found.tables))
    print("\n".join(("", *found.notes, f"written: {', '.join(map(str, files))}")))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
