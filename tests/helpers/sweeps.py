"""Sweeps for tests, written straight into an MLflow database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.overrides import flatten, override
from pipeline.measures.confidence import wilson
from pipeline.presets import PRESETS

IMAGES = 400
AXES = (("val/sa", "max"), ("val/ra_worst", "max"), ("cost/gmac", "min"))
PARENT = "mlflow.parentRunId"


class Store:
    """An MLflow database, and the sweeps that a test puts into it."""

    def __init__(self, folder: Path):
        from mlflow import MlflowClient

        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self.experiment = str(
            self.client.create_experiment("robust-moe", (folder / "mlartifacts").as_uri())
        )

    def sweep(
        self,
        space: str = "adv_moe",
        keys: Sequence[str] = ("backbone.ratio", "algorithm.beta"),
        objectives: Sequence[tuple[str, str]] = AXES,
        preset: str = "adv_moe_cifar10_small",
        name: str = "",
        **told: Any,
    ) -> str:
        """Begin a parent run."""
        tags = {"robust_moe.kind": "sweep", "space": space, "commit": "c" * 40}
        run_id = self.client.create_run(
            self.experiment, run_name=name or f"tune-{space}", tags=tags
        ).info.run_id
        given = {"space": space, "preset": preset, "objectives": objectives, "keys": list(keys)}
        self.client.log_dict(run_id, {**given, "split": "validation", **told}, "sweep.json")
        return str(run_id)

    def trial(
        self,
        parent: str,
        number: int | str,
        shares: Mapping[str, float] | None = None,
        *,
        gmac: float | None = 0.1,
        status: str = "finished",
        reason: str = "",
        settings: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        preset: str = "adv_moe_cifar10_small",
        name: str = "",
    ) -> str:
        """Log a trial as the driver does: shares of 400 validation images with their intervals."""
        from mlflow.entities import Metric, Param

        config = override(PRESETS[preset](), {"epochs": 4, **(settings or {})})
        own = {PARENT: parent, "status": status, "trial": str(number), "commit": "c" * 40}
        own |= {"reason": reason} if reason else {}
        run_id = self.client.create_run(
            self.experiment, run_name=name or f"trial-{number}", tags={**own, **(tags or {})}
        ).info.run_id
        values = {"val/images": float(IMAGES)} if shares else {}
        for key, share in (shares or {}).items():
            hits = round(share * IMAGES)
            split = "" if "/" in key else "val/"
            low, high = wilson(hits, IMAGES)
            values |= {f"{split}{key}": hits / IMAGES}
            values |= {f"{split}{key}_low": low, f"{split}{key}_high": high}
        if gmac is not None:
            values |= {"cost/gmac": gmac, "cost/params": 3e7 * gmac, "cost/ratio_to_dense": gmac}
        values |= metrics or {}
        self.client.log_batch(
            run_id,
            metrics=[Metric(key, value, 0, 0) for key, value in values.items()],
            params=[Param(key, str(value)) for key, value in flatten(config).items()],
        )
        if status != "running":
            ended = {"failed": "FAILED", "infeasible": "KILLED"}.get(status, "FINISHED")
            self.client.set_terminated(run_id, ended)
        return str(run_id)


def shares(sa: float, worst: float) -> dict[str, float]:
    """Shares of a trial in their usual order: PGD, then the forced route, then the worst."""
    return {"sa": sa, "ra": worst + 0.04, "ra_forced": worst + 0.01, "ra_worst": worst}
