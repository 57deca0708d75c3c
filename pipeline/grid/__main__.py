"""Train a grid of models: ``python -m pipeline.grid [backbone=a,b] [key=value ...]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from pipeline.cli.arguments import PREEMPTED, fail, main, read_arguments
from pipeline.cli.console import aligned
from pipeline.distributed.cluster import ray_cluster, stoppable
from pipeline.distributed.preflight import capacity
from pipeline.grid.cell_log import CellLog, shares
from pipeline.grid.grid_request import GridRequest, read_request
from pipeline.grid.scheduler import drive
from pipeline.presets.paper_grid import costs
from pipeline.storage.run_folder import check_lasting, owned, run_folder, set_aside, shown
from pipeline.storage.sync import restore
from pipeline.tracking import OutageError

USAGE = """
usage: python -m pipeline.grid [key=value ...] [--dry-run] [--fresh] [--strict-tracking]

Train every cell of a grid as a run of its own, as many at a time as there is room for, below one
parent run in MLflow. Without keys: AdvMoE on the paper's backbones and datasets. The same command
again trains what is not finished, goes on where a cell stopped, and tries again what failed.

  backbone=a,b dataset=a,b   lists; without one of them: the paper's that are there
  algorithm=a,b              of dense, s_dense, sparse, moe_at, adv_moe; or all (default: adv_moe)
  seed=0,1,2                 a run for each (default: 0)
  backbone.ratio=, backbone.num_experts=   of the nets that are narrow, or mixtures
  at_once=N                  most cells at a time (default: CPUs, or GPUs, over workers)
  name=N                     of the parent run (default: grid)
  key=value                  any other setting, as in pipeline.train, for the cells that have it
  --dry-run  print the cells and what they cost, start nothing
  --fresh    begin all cells again; what earlier ones left is kept under other names
  --strict-tracking  end with an error where MLflow is away for long, as in pipeline.train
"""
FLAGS = ("--dry-run", "--fresh", "--strict-tracking")


def run(argv: list[str]) -> int:
    """Read the command line, run the cells; returns the exit code."""
    given = read_arguments(argv, usage=USAGE, flags=FLAGS, most_names=0)
    request = read_request(given.settings)
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    if "--dry-run" in given.flags:
        show_costs(request, console)
        return 0
    for config in request.configs:
        check_lasting(config)
    with owned(request.folder, say) as free:
        if not free:
            return fail(f"another process runs this grid in {shown(request.folder)}", 1)
        if "--fresh" in given.flags:
            begin_anew(request, say)
        try:
            return carry_out(request, console, strict="--strict-tracking" in given.flags)
        except OutageError as error:
            return fail(str(error), 1)


def begin_anew(request: GridRequest, say: Callable[[str], None]) -> None:
    """Put aside what earlier runs of these cells left, and the grid's own folder."""
    for folder in {run_folder(config) for config in request.configs}:
        with owned(folder, say) as free:
            if not free:
                raise ValueError(f"another process is at {shown(folder)}")
            set_aside(folder)
    set_aside(request.folder)


def carry_out(request: GridRequest, console: Console, *, strict: bool) -> int:
    """Run the cells that are not finished, and say how all of them ended; returns the exit code.

    Raises:
        OutageError: MLflow is away at the start or at the end, and the grid is strict.
    """

    def say(text: str) -> None:
        console.print(text, markup=False)

    for config in request.configs:
        restore(run_folder(config), "tracking")  # what other machines finished
    log = CellLog(request, strict=strict)
    status = "failed"
    try:
        with stoppable():
            waiting = log.unfinished()
            done = len(log.entries) - len(waiting)
            say(f"{request.folder.name}: {len(log.entries)} cells, {done} finished before")
            if waiting:
                run_cells(log, waiting, say)
        if all(entry.status == "finished" for entry in log.entries):
            status = "finished"
        elif not log.having("failed"):
            status = "preempted"  # cells that were stopped one by one
    except (KeyboardInterrupt, SystemExit):
        status = "preempted"
    finally:
        sent = log.close(status)
    say(outcome(log))
    if strict and not sent:
        raise log.tracker.outage()
    if not sent:
        say("warning: MLflow does not have everything yet; the same command sends it")
    first = request.configs[0]
    grid = f" grid={log.tracker.run_id}" if log.tracker.run_id else ""
    say(f"compare: python -m pipeline.report {first.experiment}{grid}")
    say(f"see it with: {log.tracker.ui_hint()}")
    return conclude(log, status)


def conclude(log: CellLog, status: str) -> int:
    """Say what is missing; returns the exit code."""
    failed = log.having("failed")
    for entry in failed:
        print(f"failed: {entry.key}: {entry.reason}", file=sys.stderr)
    left = sum(entry.status != "finished" for entry in log.entries)
    if status == "preempted":
        text = f"stopped; {left} cell(s) left, which the same command continues"
        return fail(text, PREEMPTED)
    if failed:
        return fail(
            f"{len(failed)} of {len(log.entries)} cells failed; logs in "
            f"{shown(log.folder / 'logs')}; the same command tries them again",
            1,
        )
    return 0


def run_cells(log: CellLog, waiting: list[int], say: Callable[[str], None]) -> None:
    """Run cells in one Ray: that of ``RAY_ADDRESS``, or one that ends with them."""
    import ray

    configs = [log.request.configs[place] for place in waiting]
    workers = max(int(config.workers) for config in configs)
    with ray_cluster(configs[0]):
        there = capacity()
        gpus = there.get("GPU", 0)
        unit = "GPU" if gpus >= workers else "CPU"  # as pipeline.train chooses
        slots = max(1, min(int(there[unit] // workers), log.request.at_once or len(waiting)))
        say(f"{len(waiting)} to run, {slots} at a time on {there[unit]:.0f} {unit}s")
        address = os.environ.get("RAY_ADDRESS") or ray.get_runtime_context().gcs_address

        def room() -> int:
            return int(capacity().get(unit, 0) // workers)

        drive(log, waiting, slots, address=address, say=say, room=room)


def outcome(log: CellLog) -> str:
    """Lay out how the cells ended."""
    rows = [(entry.key, entry.status, shares(entry.metrics)) for entry in log.entries]
    return aligned([("cell", "ended", "reached"), *rows], left=3)


def show_costs(request: GridRequest, console: Console) -> None:
    """Print the cells and what one image costs each, without Ray and data."""
    rows: list[tuple[str, ...]] = [
        ("cell", "px", "GMAC", "of it router", "parameters", "dense GMAC", "over dense")
    ]
    for config in dict.fromkeys(replace(config, seed=0) for config in request.configs):
        own, dense = costs(config)
        rows.append(
            (
                config.name,
                str(config.dataset.image_size),
                f"{own.gmac:.4f}",
                f"{own.gmac_router:.4f}",
                f"{own.params / 1e6:.3f} M",
                f"{dense.gmac:.4f}",
                f"{own.gmac / dense.gmac:.3f}",
            )
        )
    console.print(aligned(rows), markup=False)
    seeds = dict.fromkeys(config.seed for config in request.configs)
    console.print(f"{len(request.configs)} runs; seeds {', '.join(map(str, seeds))}")


if __name__ == "__main__":
    sys.exit(main(run))
