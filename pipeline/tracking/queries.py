"""Runs and artifacts that MLflow has, read back: the one reader of runs.

``Run`` is made from ``MlflowClient`` and not from the frame of ``mlflow.search_runs``: there a
metric that is NaN equals one that is missing, and the address of the server is a global of the
process, which trackers of several servers share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.algorithms.renamed_losses import with_current_names
from pipeline.config import ELSEWHERE
from pipeline.nearest_names import nearest
from pipeline.tracking.client import active_run, open_client, resolve_uri
from pipeline.tracking.database_file import to_path
from pipeline.tracking.reasons import reason, without_password

EVALUATED = "evaluated"  # tag of runs that judge another run again
GRID = "grid"  # tag of a run that is the parent of a grid's cells
KIND = "robust_moe.kind"  # tag of a run that is the parent of a sweep's trials
PARENTS = (GRID, KIND)  # these have no model, but children that do
PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class Run:
    """One run, as MLflow has it.

    Attributes:
        metrics: Last values, under the names that they have today.
        ended: Milliseconds since 1970; 0 while it runs.
        status: MLflow's own.
    """

    run_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    ended: int
    status: str = "FINISHED"

    @property
    def settings(self) -> dict[str, str]:
        """Parameters that decide its numbers, less the seed."""
        return {k: v for k, v in self.params.items() if k not in (*ELSEWHERE, "seed")}

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.params.get("seed", "0"))


def run_of(record: Any) -> Run:
    """Read a run from MLflow's record of it."""
    return Run(
        record.info.run_id,
        record.info.run_name,
        dict(record.data.params),
        with_current_names(record.data.metrics),
        dict(record.data.tags),
        record.info.end_time or 0,
        record.info.status,
    )


@contextmanager
def reading(tracking_uri: str | None) -> Iterator[Any]:
    """Give a client of an MLflow database or server that exists.

    Raises:
        ValueError: There is no such database; or as the block raises it.
        ConnectionError: Anything else went wrong in the block.
    """
    uri = resolve_uri(tracking_uri)
    shown = without_password(uri)
    if (file := to_path(uri)) is not None and not file.exists():
        raise ValueError(f"no tracking database {shown}")
    try:
        yield open_client(uri)
    except (ValueError, ConnectionError):
        raise
    except Exception as error:
        raise reason(error, uri) from error


def experiment_of(client: Any, name: str, tracking_uri: str | None) -> str:
    """Return the id of an experiment that exists, or raise ValueError with the nearest names."""
    if record := client.get_experiment_by_name(name):
        return str(record.experiment_id)
    known = nearest(name, [each.name for each in client.search_experiments()])
    shown = without_password(resolve_uri(tracking_uri))
    raise ValueError(f"no experiment {name!r} in {shown}; nearest: {', '.join(known) or 'none'}")


def search(client: Any, experiment_id: str, wanted: str = "") -> list[Run]:
    """Read the runs of an experiment that a filter of MLflow's lets through, page by page."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], wanted, max_results=500, page_token=token)
        runs += map(run_of, page)
        if not (token := page.token):
            return runs


def newest(client: Any, experiment_id: str, wanted: str, by: str = "end_time") -> list[Run]:
    """Read the fifty newest runs that a filter lets through, the newest first."""
    order = [f"attributes.{by} DESC"]
    page = client.search_runs([experiment_id], wanted, max_results=50, order_by=order)
    return [run_of(record) for record in page]


def resolve_run(tracking_uri: str, run: str, experiment: str) -> str:
    """Return the id of a run: itself, or for "latest" that of the training run that ended last.

    Raises:
        ValueError: There is no such database, experiment or run.
        ConnectionError: The server does not answer.
    """
    latest = run == "latest"
    with reading(tracking_uri) as client:
        if not latest and (found := active_run(client, run)):
            return str(found.info.run_id)
        finished = "attributes.status = 'FINISHED'" if latest else ""
        where = experiment_of(client, experiment, tracking_uri)
        known = [
            each.run_id
            for each in newest(client, where, finished)
            if not {EVALUATED, *PARENTS} & each.tags.keys()
        ]
        if latest and known:
            return known[0]
        what = "no finished run" if latest else f"no run {run!r}"
        shown = without_password(resolve_uri(tracking_uri))
        raise ValueError(
            f"{what} in experiment {experiment!r} of {shown}; the newest: "
            f"{', '.join(known[:3]) or 'none'}"
        )


def download(
    tracking_uri: str, run: str, artifact: str, destination: Path, experiment: str
) -> Path:
    """Fetch an artifact of a run; return the local file or folder.

    Args:
        run: MLflow run id, or "latest": the run of the experiment that finished last.

    Raises:
        ValueError: There is no such database, experiment, run or artifact.
        ConnectionError: The server does not answer.
    """
    run_id = resolve_run(tracking_uri, run, experiment)
    with reading(tracking_uri) as client:
        parent = Path(artifact).parent.as_posix()
        there = [
            file.path for file in client.list_artifacts(run_id, "" if parent == "." else parent)
        ]
        if artifact not in there:
            known = ", ".join(there) or "nothing"
            raise ValueError(f"run {run_id} has no artifact {artifact!r}, only {known}")
        destination.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, artifact, str(destination)))
