"""MLflow's server or database: its address, a client for it, experiments and runs."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.tracking.database_file import (
    artifact_folder,
    drop_misread_folder,
    follow_move,
    to_path,
    to_uri,
)
from pipeline.tracking.reasons import RefusedError, reason, without_password


def resolve_uri(uri: str | None) -> str:
    """Return where to track: ``uri``, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` here.

    Raises:
        ValueError: The URI names no scheme that MLflow writes to.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or to_uri(Path("mlflow.db"))
    if not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://|databricks", uri):
        raise ValueError(
            f"tracking_uri must be http(s)://, sqlite:/// or another database, "
            f"got {without_password(uri)!r}"
        )
    if (file := to_path(uri)) is not None:
        return to_uri(Path.cwd() / file)
    return uri.rstrip("/")


def mlflow_client() -> Any:
    """Import mlflow, quiet and impatient unless the environment says otherwise."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    for noisy in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what they say is said once, here
    return MlflowClient


def open_client(uri: str) -> Any:
    """Make a client of a server or a database, whose artifacts lie where the database lies now."""
    follow_move(uri)
    client = mlflow_client()(uri)
    drop_misread_folder(uri)
    return client


def check_database(uri: str) -> None:
    """Refuse a database file that this MLflow cannot use, before hours of training.

    Raises:
        RefusedError: It is of another MLflow version, or is no database.
    """
    file = to_path(uri)
    if file is None or not file.exists():
        return
    with alone(uri):
        try:
            open_client(uri).search_experiments(max_results=1)
        except Exception as error:
            raise RefusedError(str(reason(error, uri))) from None


def active_run(client: Any, run_id: str | None) -> Any:
    """Return a run that exists and is not deleted, else None."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        return None
    return run if run is not None and run.info.lifecycle_stage == "active" else None


def experiment_id(client: Any, uri: str, name: str) -> str:
    """Return the id of an experiment, made or brought back from deletion if need be."""
    from mlflow.exceptions import MlflowException

    record = client.get_experiment_by_name(name)
    if record is None:
        location = None  # a server knows its own
        if (folder := artifact_folder(uri)) is not None:
            location = (folder / re.sub(r"[^\w\-. ]", "_", name)).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            record = client.get_experiment_by_name(name)  # another process was faster
    if record.lifecycle_stage != "active":
        client.restore_experiment(record.experiment_id)
    return str(record.experiment_id)


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Keep other processes out of a database file while its first user builds the tables.

    MLflow's own lock is not enough: of two first users at once, one fails in the migrations.
    """
    from filelock import FileLock

    with ExitStack() as stack:
        if (path := to_path(uri)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError, NotImplementedError):  # some network file systems have no locks
                stack.enter_context(FileLock(f"{path}.lock"))
        yield
