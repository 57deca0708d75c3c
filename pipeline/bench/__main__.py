"""Time the sparse networks: ``python -m pipeline.bench [NAME] [key=value ...]``."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pipeline.bench import BENCHMARKS, LONG
from pipeline.bench.race import Benchmark, RaceResult, race
from pipeline.bench.settings import Settings, read_settings
from pipeline.cli.arguments import main, read_arguments
from pipeline.nearest_names import unknown
from pipeline.tracking.open_run import commit

USAGE = """
usage: python -m pipeline.bench [NAME] [key=value ...] [--list] [--help]

Time the sparse mixture against every expert masked, as published code computes it, and against
the dense net. All variants take turns in one process; seconds are medians over all turns, and
ratios medians of each turn's own ratio, which a busy machine moves less. Measure on a quiet one
with all its cores, or with threads=1. Without a name: the first two, two minutes on two cores.

  inference  classify a batch: folded and sorted, masked, dense plain, dense folded; with
             compiled=true also router and pathways by torch.compile, in precision=fp32 or bf16
  mixture    whole networks as experts: a call an expert, and a call an image as released code does
  token_routing  the sparse layer of a transformer, forward and backward, over a dense MLP
  step       one AdvMoE update, both phases: ours, plainly over masked layers; dense TRADES
  autoattack AutoAttack standard on few images: ours, masked; and the ratio of inference
             (needs the extra eval)
  pipeline   an epoch through Ray Train with tracking, over one of the bare loop

keys and their defaults:
"""


def run(argv: list[str]) -> int:
    """Read the command line, race, print; returns the exit code."""
    defaults = "\n".join(f"  {f.name}={getattr(Settings(), f.name)}" for f in fields(Settings))
    given = read_arguments(argv, usage=USAGE.rstrip() + "\n" + defaults, flags=("--list",))
    for name in given.names:
        if name not in BENCHMARKS:
            raise unknown("benchmark", name, BENCHMARKS)
    if "--list" in given.flags:
        print("\n".join(BENCHMARKS))
        return 0
    settings = read_settings(given.settings)
    kept = keep_heap()
    console, threads = Console(highlight=False, soft_wrap=True), torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        console.print(conditions(settings, kept), markup=False)
        for name in given.names or [name for name in BENCHMARKS if name not in LONG]:
            benchmark = BENCHMARKS[name](settings)
            console.print(f"\n{benchmark.title}", markup=False)
            outcome = race(benchmark, settings.rounds, lambda text: console.print(f"  {text}"))
            console.print(table(benchmark, outcome))
            lines = [*benchmark.notes(), *benchmark.compare(outcome)]
            console.print("\n".join(lines), markup=False)
    finally:
        torch.set_num_threads(threads)
    return 0


def conditions(settings: Settings, kept: bool) -> str:
    """Say what the figures were taken on and with."""
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "on the CPU"
    net = " ".join(
        f"{key}={getattr(settings, key)}"
        for key in ("backbone", "num_experts", "ratio", "router_scope", "image_size", "rounds")
    )
    return "\n".join(
        [
            f"machine   {processor()}, {os.cpu_count()} cores",
            f"running   {device}, {settings.threads} threads, fp32",
            f"memory    {'kept' if kept else 'returned to the system'} when freed",
            f"versions  torch {torch.__version__}, Python {platform.python_version()}",
            f"commit    {commit()}",
            f"networks  {net}",
        ]
    )


def keep_heap() -> bool:
    """Have glibc keep freed memory in the process; returns whether it does.

    By its defaults large blocks go back to the kernel, or not, depending on what the process freed
    before, and coming back they fault page by page: the masked twin, whose tensors are the largest,
    took 0.25 s or 0.42 s for the same batch. Here every variant is timed without such faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


def processor() -> str:
    """Name the CPU."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(benchmark: Benchmark, outcome: RaceResult) -> Table:
    """Show seconds and multiply-accumulates of one call, and ratios to the first variant."""
    ours = next(iter(benchmark.variants))
    counted = bool(outcome.gmac[ours])  # those of other processes are not
    shown, first = Table("variant"), "ours is" if counted else "the first is"
    for column in ("seconds", first, *(("GMAC", "over ours") if counted else ())):
        shown.add_column(column, justify="right")
    for name in benchmark.variants:
        seconds, gmac = outcome.median(name), outcome.gmac[name]
        cells = [f"{seconds:.3f}", f"{outcome.speedup(ours, name):.2f} x faster"]
        if counted:
            cells += [f"{gmac:.2f}", f"{gmac / outcome.gmac[ours]:.2f}"]
        shown.add_row(name, *cells)
    return shown


if __name__ == "__main__":
    sys.exit(main(run))
