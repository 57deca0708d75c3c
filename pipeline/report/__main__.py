"""Compare runs: ``python -m pipeline.report [EXPERIMENT] [key=value ...]``."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.cli.arguments import fail, main, read_arguments
from pipeline.report.chart import plot_over_cost
from pipeline.report.grouping import blocks_of
from pipeline.report.runs import find
from pipeline.report.tables import (
    as_markdown,
    as_text,
    block_records,
    block_table,
    foot,
    write_csv,
)

USAGE = """
usage: python -m pipeline.report [EXPERIMENT] [key=value ...] [--help]

Lay out the finished runs of an MLflow experiment (default: robust-moe) as the paper does: a block
for each backbone, dataset and threat, a row for each algorithm, seeds averaged, and the difference
to the dense net, or another row, with its 95% interval. Printed, and written as CSV, Markdown
and PNG.

  key=value     only runs with this setting: epochs=16 dataset=cifar10,cifar100
  grid=RUN      only the cells of this parent run
  over=ROW      the row to subtract, such as s_dense or moe_at (default: dense)
  tracking_uri  MLflow (default: MLFLOW_TRACKING_URI, else mlflow.db in the working directory)
  out           folder to write to (default: report)
"""


def run(argv: list[str]) -> int:
    """Read the command line and MLflow, print and write; returns the exit code."""
    given = read_arguments(argv, usage=USAGE)
    wanted = dict(given.settings)
    uri, out = wanted.pop("tracking_uri", ""), Path(wanted.pop("out", "report"))
    over = wanted.pop("over", "dense")
    experiment = given.names[0] if given.names else "robust-moe"
    try:
        found = find(uri, experiment, wanted)
    except ConnectionError as error:
        return fail(str(error), 1)
    if not found.runs:
        counts = ", ".join(f"{n} {why}" for why, n in found.left_out.items()) or "none at all"
        return fail(f"no finished training run in experiment {experiment!r}: {counts}", 1)
    blocks = blocks_of(found.runs, over)
    tables, notes = [block_table(block) for block in blocks], foot(blocks, found.left_out)
    print("\n".join((as_text(tables), "", *notes)))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "report.csv", block_records(blocks))
    (out / "report.md").write_text(as_markdown(tables, notes, picture="report.png"), "utf-8")
    plot_over_cost(blocks, out / "report.png")
    print(f"written: {', '.join(str(out / f'report.{kind}') for kind in ('csv', 'md', 'png'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
