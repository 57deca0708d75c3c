"""Sender of a journal's rows to MLflow: finds or makes the run, separates refusal from outage."""

import json
import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.tracking.client import active_run, alone, experiment_id, open_client
from pipeline.tracking.model_logging import send_model
from pipeline.tracking.outbox import Journal, Row, name_for_server, replace_file
from pipeline.tracking.reasons import one_line, without_password
from pipeline.tracking.state_file import RUN, read_state

LOG = logging.getLogger(__name__)
FILES = {"artifact", "model"}  # rows that name files: these go to a store of their own
TRIES = 3  # of a file, before others go first


class RunSender:
    """Sends rows for one run, in the sender's thread.

    Attributes:
        info: What ``run.json`` holds; kept there as soon as the server has named the run.
        refused: Paths of artifacts that the server or the disk will never give.
    """

    def __init__(self, folder: Path, uri: str, info: dict[str, Any], journal: Journal):
        self.folder, self.info, self.journal = folder, info, journal
        self.refused: list[str] = []
        self.over: Callable[[], bool] = bool  # whether nobody waits for the answer any more
        self._uri, self._tries = uri, 0
        self._client: Any = None  # set once the server has the run

    @property
    def connected(self) -> bool:
        """Whether the server has the run."""
        return self._client is not None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until a server has the run."""
        return str(self.info["run_id"]) if self.info["run_id"] else None

    def deliver(self, rows: list[Row]) -> int:
        """Send some leading rows; return how many.

        Whatever is thrown here is an outage: the thread waits and calls again. What the server
        refuses for good is passed over with a warning. A file that its store does not take, while
        the server itself answers, moves behind the rows that wait for it.
        """
        if self._client is None:
            self._client = self._connect()
            return 0
        count = max(1, batch_length(rows))
        try:
            self._send(rows[:count])
        except Exception as error:
            self._tries += 1
            is_file = rows[0]["kind"] in FILES
            if not is_refused(error) and not (is_file and self._tries >= TRIES and rows[1:]):
                raise
            run_id, self._client = self.run_id, None
            self._client = self._connect()
            if run_id != self.run_id:  # it was deleted on the server
                return 0
            if count > 1:
                return self.deliver(rows[: count // 2])  # narrows down to the bad row
            if is_refused(error):
                LOG.warning("MLflow refuses %s: %s", rows[0].get("path", rows[0]), self.say(error))
                self.refused += [rows[0]["path"]] if is_file else []
            else:
                self.journal.note(**{k: v for k, v in rows[0].items() if k != "time_ms"})
        self._tries = 0
        return count

    def _send(self, rows: list[Row]) -> None:
        """Send one batch of metrics and tags, or one other row."""
        from mlflow.entities import Metric, RunTag

        row = rows[0]
        if row["kind"] == "status":
            if row["value"] == "RUNNING":
                self._client.update_run(self.run_id, status="RUNNING")
            else:
                self._delete_twins()
                self._client.set_terminated(self.run_id, row["value"], row["time_ms"])
        elif row["kind"] == "artifact":
            self._send_artifact(self.folder / row["folder"] / row["path"], row["path"])
        elif row["kind"] == "model":
            send_model(self._client, self.run_id, self.folder / row["path"])
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
            client = open_client(self._uri)
            client.search_experiments(max_results=1)
        if (run := active_run(client, self.run_id)) is None:
            experiment = experiment_id(client, self._uri, self.info["experiment"])
            run = next(iter(self._mine(client, experiment)), None) or client.create_run(
                experiment,
                start_time=self.info["start_ms"],
                tags={"run_key": self.info["key"]},
                run_name=self.info["name"],
            )
            if self.over():  # this answer came too late: the next open owns the folder
                raise TimeoutError("closed before the server answered")
            self.journal.acknowledge(0)
            self.info |= {"run_id": run.info.run_id, "experiment_id": experiment}
            self.save()
        named = {name_for_server(key): value for key, value in self.info["params"].items()}
        missing = [Param(key, named[key][:6000]) for key in named if key not in run.data.params]
        for start in range(0, len(missing), 100):
            client.log_batch(run.info.run_id, params=missing[start : start + 100])
        return client

    def _mine(self, client: Any, experiment: str) -> list[Any]:
        """List the runs that were made for this folder: an answer may have been lost."""
        found = client.search_runs([experiment], f"tags.run_key = '{self.info['key']}'")
        return sorted(found, key=lambda run: str(run.info.run_id))

    def _delete_twins(self) -> None:
        """Delete runs that a server made twice, since its answer came too late the first time."""
        for run in self._mine(self._client, self.info["experiment_id"]):
            if run.info.run_id != self.run_id:
                self._client.delete_run(run.info.run_id)

    def save(self) -> None:
        """Keep ``info`` for the next start."""
        replace_file(self.folder / "run.json", json.dumps(self.info, indent=2))

    def say(self, error: Exception) -> str:
        """Tell an error in one line, without passwords."""
        text = one_line(error, self._uri).replace(self._uri, self.info["tracking_uri"])
        return text.rstrip('")')


def is_refused(error: Exception) -> bool:
    """Tell whether waiting cannot help."""
    if isinstance(error, FileNotFoundError):
        return True
    code = getattr(error, "error_code", "")
    return code in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}


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
    info: dict[str, Any] | None = read_state(folder / "run.json", RUN, LOG.warning)
    if info is None:
        return new | where
    if any(info.get(key) != value for key, value in where.items()):
        info["run_id"] = None
    return new | info | where
