"""The MLflow run of a run folder, and the commit of the code."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config
from pipeline.config.overrides import flatten
from pipeline.tracking import Tracker, resolve_uri
from pipeline.tracking.client import check_database


def open_run(
    config: Config, folder: Path, tags: Mapping[str, str], strict: bool = False
) -> Tracker:
    """Begin or continue the MLflow run of a folder, with the config as its parameters.

    Raises:
        RefusedError: The database is of another MLflow version.
    """
    check_database(resolve_uri(config.tracking_uri))
    return Tracker.open(
        folder,
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        name=config.name,
        params={key: str(value) for key, value in flatten(config).items()},
        tags={"commit": commit(), **tags},
        strict=strict,
    )


def commit() -> str:
    """Name the commit of the code, with ``-dirty`` where it was changed since."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("ROBUST_MOE_COMMIT", "unknown")  # set by pipeline.submit
