"""MLflow, for the driver process: one run is told in events, and kept on disk until MLflow has it.

The only room that imports mlflow, and only inside functions: that import takes seconds.
"""

import json
import logging
import os
import re
import shlex
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.journal import Courier, Journal, Row, name_for_server, replace_file

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

LOG = logging.getLogger(__name__)
SQLITE = "sqlite:///"
EVALUATED = "evaluated"  # tag of runs that judge another run again
PARENTS = ("grid", "robust_moe.kind")  # tags of runs that have no model, but children that do
STATUSES = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "preempted": "KILLED",
    "stopped": "KILLED",  # by a sweep's scheduler
    "infeasible": "KILLED",  # a point of a sweep that could not be run
}
RESULTS = (
    "config.json",
    "card.md",
    "claim.json",
    "plots",
    "checkpoints/best",
)  # what a run folder uploads


def resolve_uri(uri: str | None) -> str:
    """Return where to track: ``uri``, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` here.

    Raises:
        ValueError: The URI names no scheme that MLflow writes to.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://|databricks", uri):
        raise ValueError(
            f"tracking_uri must be http(s)://, sqlite:/// or another database, "
            f"got {without_password(uri)!r}"
        )
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path.cwd() / uri.removeprefix(SQLITE)}"
    return uri.rstrip("/")


def without_password(uri: str) -> str:
    """Drop user and password from a URI, to print, store and compare it."""
    if uri.startswith("sqlite"):
        return uri
    bare = re.sub(r"(?<=://)[^/?#]*@", "", uri)
    return re.sub(r"(?i)([?&][^=&]*(?:user|password|token)=)[^&]*", r"\1...", bare)


class Tracker:
    """One MLflow run, opened once per start of the driver and continued by the next start.

    Every event goes to the journal in the run folder; a thread sends the journal. So nothing here
    waits for the network except ``open``, ``close``, ``upload`` and ``log_model``, and those have
    a bound. A server that is away costs nothing but its charts, until it is back.
    """

    def __init__(self, folder: Path, uri: str, info: dict[str, Any]):
        """Use ``Tracker.open``."""
        self.folder, self._uri, self._info = folder, uri, info
        self.journal = Journal(folder)
        self._client: Any = None  # set once the server has the run
        self._tries = 0
        self._refused: list[str] = []
        self._problem = ""
        self._courier = Courier(self.journal, self._deliver, self._report)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        tracking_uri: str,
        experiment: str,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> "Tracker":
        """Continue the run that ``folder/run.json`` names, or begin one.

        A run that is gone, or another server, means a new run, which then gets the whole journal.
        Parameters are fixed when a run begins; later ones are ignored.
        """
        uri = resolve_uri(tracking_uri)
        info = load_info(folder, uri, experiment)
        if info["run_id"] is None:
            info |= {"name": name, "params": {key: str(value) for key, value in params.items()}}
        folder.mkdir(parents=True, exist_ok=True)
        tracker = cls(folder, uri, info)
        tracker._save()
        for key, value in {**tags, "status": "running"}.items():
            tracker.journal.tag(key, str(value))
        tracker.journal.note("status", value="RUNNING")
        tracker._start()
        return tracker

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until a server has heard of it."""
        return str(self._info["run_id"]) if self._info["run_id"] else None

    @property
    def problem(self) -> str:
        """Why nothing can be sent at the moment, without passwords; empty if all is well."""
        return self._problem if self._courier.failures else ""

    def handle(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the loop; kinds that say nothing to MLflow are ignored."""
        kind = event["kind"]
        if kind == "metrics":
            self.journal.append(int(event["step"]), event["values"])
        elif kind == "tag":
            self.journal.tag(str(event["key"]), str(event["value"]))
        elif kind == "warning":
            known = self.journal.tags.get("warnings", "").splitlines()
            self.journal.tag("warnings", "\n".join(dict.fromkeys([*known, str(event["text"])])))
        elif kind == "artifacts":
            folder = Path(event["folder"])
            self._note_artifacts(folder, [path for path in RESULTS if (folder / path).exists()])
        self._courier.wake()

    def upload(self, folder: Path, paths: Sequence[str], *, timeout: float = 60.0) -> list[str]:
        """Log files and folders under their path in ``folder``; return those that MLflow lacks.

        What exists and could not be sent in ``timeout`` seconds stays in the journal, and follows.
        """
        missing = [path for path in paths if not (folder / path).exists()]
        self._note_artifacts(folder, [path for path in paths if path not in missing])
        self._courier.wake()
        deadline = time.monotonic() + timeout
        while not self.journal.drained and not self.problem and time.monotonic() < deadline:
            time.sleep(0.02)
        late = {row.get("path") for row, _ in self.journal.unsent(limit=1_000_000)}
        lost = {*missing, *late, *self._refused}
        return [path for path in paths if path in lost]

    def log_model(
        self, exported_module: "nn.Module", example_BCHW: "np.ndarray", name: str = "model"
    ) -> str | None:
        """Log a model that torch.export can trace; return its URI, or None if that failed.

        Args:
            exported_module: Maps images to one tensor, in eval mode.
            example_BCHW: At least two images, float32: torch.export fixes a batch of one.

        Raises:
            ValueError: The example has fewer than two images.
        """
        if len(example_BCHW) < 2:
            raise ValueError(f"example_BCHW needs at least 2 images, got {len(example_BCHW)}")
        if self.run_id is None or self.problem:
            LOG.warning("no model logged: MLflow at %s is away", self._info["tracking_uri"])
            return None
        try:
            return log_torch_model(self._uri, self.run_id, exported_module, example_BCHW, name)
        except Exception as error:  # a model that cannot be logged must not fail a trained run
            LOG.warning("no model logged: %s", self._say(error))
            return None

    def close(self, status: str, *, timeout: float = 20.0) -> bool:
        """End the run with one of ``STATUSES``; tell whether MLflow has everything.

        What is left stays in the journal, for the next ``open`` or ``send_rest``.
        """
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
        self.journal.tag("status", status)
        self.journal.note("status", value=STATUSES[status])
        return self._finish(timeout)

    def ui_hint(self) -> str:
        """Say in one line how to see the run in MLflow's pages."""
        shown = str(self._info["tracking_uri"])
        if shown.startswith("http"):
            page = f"/#/experiments/{self._info.get('experiment_id')}/runs/{self.run_id}"
            return shown + (page if self.run_id else "")
        if shown.startswith(SQLITE):
            path = Path(shown.removeprefix(SQLITE))
            here = path.is_relative_to(Path.cwd())
            shown = f"{SQLITE}{path.relative_to(Path.cwd()) if here else path}"
        return f"mlflow ui --backend-store-uri {shlex.quote(shown)}"

    def _start(self) -> None:
        """Begin to send; wait for the run's id, but not for a server that is away."""
        mlflow_client()  # imported here, not at the same time in the thread
        self._courier.start()
        local = self._uri.startswith(SQLITE)  # its first use builds the tables, for seconds
        patience, deadline = (3, 60.0) if local else (1, 15.0)
        deadline += time.monotonic()
        while self._client is None and time.monotonic() < deadline:
            if self._courier.failures >= patience:
                break
            time.sleep(0.02)

    def _finish(self, timeout: float) -> bool:
        done = self._courier.finish(timeout)
        if not done:
            LOG.warning("MLflow lacks the end of this run: it waits in %s", self.journal.path)
        return done

    def _note_artifacts(self, folder: Path, paths: Sequence[str]) -> None:
        where = os.path.relpath(folder, self.folder)  # survives a move of the storage
        for path in paths:
            self.journal.note("artifact", folder=where, path=path)

    def _deliver(self, rows: list[Row]) -> int:
        """Send some leading rows, in the courier's thread; return how many."""
        if self._client is None:
            self._client = self._connect()
            return 0
        count = max(1, batch_length(rows))
        try:
            self._send(rows[:count])
        except Exception as error:
            self._tries += 1
            if not self._is_refused(error, rows[0]):
                raise
            run_id, self._client = self.run_id, None
            self._client = self._connect()
            if run_id != self.run_id:  # it was deleted on the server
                return 0
            if count > 1:
                return self._deliver(rows[: count // 2])  # narrows down to the bad row
            LOG.warning("MLflow refuses %s: %s", rows[0].get("path", rows[0]), self._say(error))
            self._refused += [rows[0]["path"]] if "path" in rows[0] else []
        self._tries = 0
        return count

    def _is_refused(self, error: Exception, row: Row) -> bool:
        """Tell whether waiting cannot help. Artifact stores have too many errors to list."""
        if row["kind"] == "artifact":
            return self._tries >= 3 or isinstance(error, FileNotFoundError)
        code = getattr(error, "error_code", "")
        return code in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}

    def _send(self, rows: list[Row]) -> None:
        """Send one batch of metrics and tags, or one other row."""
        from mlflow.entities import Metric, RunTag

        row = rows[0]
        if row["kind"] == "status":
            if row["value"] == "RUNNING":
                self._client.update_run(self.run_id, status="RUNNING")
            else:
                self._client.set_terminated(self.run_id, row["value"], row["time_ms"])
        elif row["kind"] == "artifact":
            self._send_artifact(self.folder / row["folder"] / row["path"], row["path"])
        else:
            metrics = [
                Metric(key, value, row["time_ms"], row["step"])
                for row in rows
                if row["kind"] == "metrics"
                for key, value in row["values"].items()
            ]
            tags = {row["key"]: row["value"] for row in rows if row["kind"] == "tag"}
            labels = [RunTag(key, value) for key, value in tags.items()]
            for start in range(0, max(len(metrics), 1), 900):  # 1000 with the tags
                part = metrics[start : start + 900]
                self._client.log_batch(self.run_id, part, tags=labels if start == 0 else ())

    def _send_artifact(self, local: Path, path: str) -> None:
        if local.is_dir():
            self._client.log_artifacts(self.run_id, str(local), path)
        else:
            parent = Path(path).parent.as_posix()
            self._client.log_artifact(self.run_id, str(local), None if parent == "." else parent)

    def _connect(self) -> Any:
        """Find the run on the server, or make it; return a client that may write to it."""
        from mlflow.entities import Param

        with alone(self._uri):
            client = mlflow_client()(self._uri)
            client.search_experiments(max_results=1)
        if (run := active_run(client, self.run_id)) is None:
            experiment = experiment_id(client, self._uri, self._info["experiment"])
            mine = f"tags.run_key = '{self._info['key']}'"  # an answer may have been lost
            found = client.search_runs([experiment], mine, max_results=1)
            run = (
                found[0]
                if found
                else client.create_run(
                    experiment,
                    start_time=self._info["start_ms"],
                    tags={"run_key": self._info["key"]},
                    run_name=self._info["name"],
                )
            )
            if self._courier.over:  # this answer came too late: the next open owns the folder
                raise TimeoutError("closed before the server answered")
            self.journal.acknowledge(0)
            self._info |= {"run_id": run.info.run_id, "experiment_id": experiment}
            self._save()
        named = {name_for_server(key): value for key, value in self._info["params"].items()}
        missing = [Param(key, named[key][:6000]) for key in named if key not in run.data.params]
        for start in range(0, len(missing), 100):
            client.log_batch(run.info.run_id, params=missing[start : start + 100])
        return client

    def _save(self) -> None:
        replace_file(self.folder / "run.json", json.dumps(self._info, indent=2))

    def _report(self, error: Exception) -> None:
        self._problem = self._say(error)
        if self._courier.failures == 1:
            where, journal = self._info["tracking_uri"], self.journal.path
            LOG.warning("MLflow at %s: %s; metrics wait in %s", where, self._problem, journal)

    def _say(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        text = text.rpartition("Caused by ")[2]  # how requests wraps what really happened
        text = text.replace(self._uri, self._info["tracking_uri"])
        for secret in filter(None, (urlsplit(self._uri).password,)):
            text = text.replace(secret, "...")
        return text.splitlines()[0].rstrip('")')[:200]


def send_rest(
    folder: Path, tracking_uri: str, *, tags: Mapping[str, str] | None = None, timeout: float = 20.0
) -> bool:
    """Send what a closed run still has in its journal; tell whether MLflow has everything.

    Args:
        tags: Those of them that the run does not have are added, whatever their values.
    """
    tracker = reopen(folder, tracking_uri)
    if tracker is None:
        return True
    for key, value in (tags or {}).items():
        if key not in tracker.journal.tags:
            tracker.journal.tag(key, value)
    if tracker.journal.drained and tracker.run_id:
        return True
    tracker._start()
    return tracker._finish(timeout)


def end_abandoned(folder: Path, tracking_uri: str, status: str, *, timeout: float = 20.0) -> bool:
    """End the run of a process that is gone, unless it did so itself; tell if MLflow has it all."""
    tracker = reopen(folder, tracking_uri)
    if tracker is None or tracker.journal.tags.get("status") != "running":
        return send_rest(folder, tracking_uri, timeout=timeout)
    tracker._start()
    return tracker.close(status, timeout=timeout)


def reopen(folder: Path, tracking_uri: str) -> Tracker | None:
    """Take up a run that another process told, without a word to MLflow; None: never tracked."""
    uri = resolve_uri(tracking_uri)
    try:
        experiment = json.loads((folder / "run.json").read_text(encoding="utf-8"))["experiment"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return Tracker(folder, uri, load_info(folder, uri, experiment))


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
        client = mlflow_client()(uri)
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
        raise ConnectionError(
            f"MLflow at {without_password(uri)}: {type(error).__name__}"
        ) from error


def resolve_run(tracking_uri: str, run: str, experiment: str) -> str:
    """Return the id of a run: itself, or for "latest" that of the training run that ended last.

    Raises:
        ValueError: There is no such database, experiment or run.
        ConnectionError: The server does not answer.
    """
    uri = resolve_uri(tracking_uri)
    shown = without_password(uri)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        raise ValueError(f"no tracking database {shown}")
    try:
        return find_run(mlflow_client()(uri), run, experiment, shown)
    except ValueError:
        raise
    except Exception as error:
        raise ConnectionError(f"MLflow at {shown}: {type(error).__name__}") from error


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
        if uri.startswith(SQLITE):
            folder = Path(uri.removeprefix(SQLITE)).parent / "mlartifacts"
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
    import fcntl

    with ExitStack() as stack:
        if uri.startswith(SQLITE):
            folder = Path(uri.removeprefix(SQLITE)).parent
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)  # a lock on the folder leaves no file behind
            stack.callback(os.close, handle)
            with suppress(OSError):  # some network file systems lock no folders
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def batch_length(rows: list[Row]) -> int:
    """Count the leading rows that one ``log_batch`` takes: 900 metrics and 100 tags at most."""
    metrics = tags = 0
    for count, row in enumerate(rows):
        if row["kind"] not in {"metrics", "tag"}:
            return count
        metrics, tags = metrics + len(row.get("values", ())), tags + (row["kind"] == "tag")
        if metrics > 900 or tags > 100:
            return count
    return len(rows)


def load_info(folder: Path, uri: str, experiment: str) -> dict[str, Any]:
    """Read ``run.json``; without its run id if it belongs to another server or experiment."""
    where = {"tracking_uri": without_password(uri), "experiment": experiment}
    new: dict[str, Any] = {"run_id": None, "name": folder.name, "params": {}}
    new |= {"key": uuid.uuid4().hex, "start_ms": time.time_ns() // 1_000_000}
    try:
        info: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return new | where
    if any(info.get(key) != value for key, value in where.items()):
        info["run_id"] = None
    return new | info | where


def log_torch_model(
    uri: str, run_id: str, module: "nn.Module", example_BCHW: "np.ndarray", name: str
) -> str:
    """Log a module as a traced graph that takes any batch size; return the model's URI.

    MLflow's own functions read the tracking URI from the process, and without an open fluent run
    (which would end the run) the model itself must be made first, to be in its experiment.
    """
    client_class = mlflow_client()
    import mlflow.pytorch
    import numpy as np
    import torch

    client = client_class(uri)
    run = client.get_run(run_id)
    with torch.no_grad():
        logits_BK = module(torch.from_numpy(example_BCHW)).numpy()
    versions = {"torch": torch.__version__, "mlflow": mlflow.__version__, "numpy": np.__version__}
    model = client.create_logged_model(
        run.info.experiment_id, name, source_run_id=run_id, params=run.data.params
    )
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        with (
            warnings.catch_warnings()
        ):  # torch's archive writer warns of weights that share storage
            warnings.simplefilter("ignore", UserWarning)
            logged = mlflow.pytorch.log_model(
                module,
                name=name,
                model_id=model.model_id,
                run_id=run_id,
                serialization_format="pt2",
                input_example=example_BCHW,
                signature=mlflow.models.infer_signature(example_BCHW, logits_BK),
                pip_requirements=[
                    f"{key}=={value.split('+')[0]}" for key, value in versions.items()
                ],
            )
    finally:
        mlflow.set_tracking_uri(before)
    return str(logged.model_uri)


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
