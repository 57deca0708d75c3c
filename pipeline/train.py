"""Train one model: ``python -m pipeline.train [PRESET] [key=value ...]``."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from pipeline.cli.arguments import main, read_arguments
from pipeline.config.overrides import flatten, override
from pipeline.distributed.driver import train
from pipeline.evaluation.find_model import find
from pipeline.nearest_names import unknown
from pipeline.presets import PRESETS, headline, label

USAGE = """
usage: python -m pipeline.train [PRESET] [key=value ...] [--fresh] [--strict-tracking] [--list]

Train, select and judge one model on Ray Train, and track it in MLflow. Without a preset:
quickstart. The same command continues a run that did not finish.

  key=value  a dotted setting: epochs=3 algorithm.beta=3 algorithm.attack.eps=4/255
  --fresh    start over; what an earlier run of these settings left is kept under another name
  --list     the presets
  --strict-tracking  end with an error when MLflow is away for longer than ROBUST_MOE_TRACKING_WAIT
             seconds (default 20); without it training goes on, and MLflow gets everything later

Settings and their defaults: python -m pipeline.train --list PRESET
"""
FLAGS = ("--fresh", "--strict-tracking", "--list")


def run(argv: list[str]) -> int:
    """Read the command line, then train; returns the exit code."""
    given = read_arguments(argv, usage=USAGE, flags=FLAGS)
    if "--list" in given.flags:
        return show_presets(given.names)
    name = given.names[0] if given.names else "quickstart"
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    config = override(PRESETS[name](), given.settings)
    if config.upcycle and not config.upcycle_sha256:
        scratch = Path(config.storage) / "upcycle" / config.upcycle
        folder, _ = find(config.upcycle, config, scratch)
        config = override(config, {"upcycle": str(folder.resolve())})
    strict = "--strict-tracking" in given.flags
    return train(config, fresh="--fresh" in given.flags, strict=strict)


def show_presets(names: tuple[str, ...]) -> int:
    """Print the presets, or the label and all settings of one."""
    for name in names or PRESETS:
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        text = label(name) if names else headline(name)
        print(f"{name}\n{textwrap.indent(text, '    ')}\n")
        if names:
            print("\n".join(f"    {k}={v}" for k, v in flatten(PRESETS[name]()).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
