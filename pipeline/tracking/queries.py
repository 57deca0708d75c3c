"""Runs and artifacts that MLflow has, read back."""

from pathlib import Path
from typing import Any

from pipeline.tracking.client import (
    active_run,
    open_client,
    resolve_uri,
    without_password,
)
from pipeline.tracking.database_file import to_path
from pipeline.tracking.reasons import reason

EVALUATED = "evaluated"  # tag of runs that judge another run again
PARENTS = ("grid", "robust_moe.kind")  # tags of runs that have no model, but children that do


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
    uri = resolve_uri(tracking_uri)
    try:
        client = open_client(uri)
        parent = Path(artifact).parent.as_posix()
        there = [
            file.path for file in client.list_artifacts(run_id, "" if parent == "." else parent)
        ]
        if artifact not in there:
            known = ", ".join(there) or "nothing"
            raise ValueError(f"run {run_id} has no artifact {artifact!r}, only {known}")
        destination.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, artifact, str(destination)))
    except ValueError:
        raise
    except Exception as error:
        raise reason(error, uri) from error


def resolve_run(tracking_uri: str, run: str, experiment: str) -> str:
    """Return the id of a run: itself, or for "latest" that of the training run that ended last.

    Raises:
        ValueError: There is no such database, experiment or run.
        ConnectionError: The server does not answer.
    """
    uri = resolve_uri(tracking_uri)
    shown = without_password(uri)
    if (file := to_path(uri)) is not None and not file.exists():
        raise ValueError(f"no tracking database {shown}")
    try:
        return find_run(open_client(uri), run, experiment, shown)
    except ValueError:
        raise
    except Exception as error:
        raise reason(error, uri) from error


def find_run(client: Any, run: str, experiment: str, shown: str) -> str:
    """Turn a run id or "latest" into the id of a run that exists, or raise ValueError."""
    if run != "latest" and (found := active_run(client, run)):
        return str(found.info.run_id)
    record = client.get_experiment_by_name(experiment)
    if record is None:
        raise ValueError(f"no experiment {experiment!r} in {shown}")
    finished = "attributes.status = 'FINISHED'" if run == "latest" else ""
    newest = client.search_runs(
        [record.experiment_id], finished, max_results=50, order_by=["attributes.end_time DESC"]
    )
    newest = [found for found in newest if not {EVALUATED, *PARENTS} & found.data.tags.keys()][:5]
    if run == "latest" and newest:
        return str(newest[0].info.run_id)
    what = "no finished run" if run == "latest" else f"no run {run!r}"
    known = ", ".join(found.info.run_id for found in newest) or "none"
    raise ValueError(f"{what} in experiment {experiment!r} of {shown}; the newest: {known}")


PARENT = "mlflow.parentRunId"


GRID = "grid"  # tag of a run that is the parent of others
