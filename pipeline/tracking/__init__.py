"""MLflow tracking for the driver process: events of a run, kept on disk until MLflow has them.

Only this room, ``report`` and ``sweep`` import mlflow, inside functions: that takes seconds.
"""

from pipeline.tracking.client import mlflow_client, open_client, resolve_uri
from pipeline.tracking.model_logging import log_torch_model
from pipeline.tracking.outage_watch import strictly
from pipeline.tracking.queries import EVALUATED, PARENTS, download, resolve_run
from pipeline.tracking.reasons import without_password
from pipeline.tracking.tracker import OutageError, Tracker, end_abandoned, send_rest

__all__ = [
    "EVALUATED",
    "PARENTS",
    "OutageError",
    "Tracker",
    "download",
    "end_abandoned",
    "log_torch_model",
    "mlflow_client",
    "open_client",
    "resolve_run",
    "resolve_uri",
    "send_rest",
    "strictly",
    "without_password",
]
