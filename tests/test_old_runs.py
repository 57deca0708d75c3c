"""Runs and checkpoints made at commit c3fcf80, before the rooms were rearranged, are still good.

``tests/fixtures/old_runs`` holds a finished run, one that was stopped in the middle of its last
epoch, and a dump of their MLflow database:

    python -m pipeline.train name=old epochs=2 SETTINGS
    python -m pipeline.train name=unfinished epochs=3 SETTINGS
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint, train
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.data.augmentation import to_float
from pipeline.loop import fit
from pipeline.presets import PRESETS
from pipeline.report.__main__ import run as report
from pipeline.report.runs import find
from pipeline.storage.run_folder import run_folder
from pipeline.tracking import download

FIXTURE = Path(__file__).parent / "fixtures" / "old_runs"
MADE_IN = "/home/user/project"
OLD, UNFINISHED = "old-b704f77a", "unfinished-579ca130"
SETTINGS = (
    "workers=1 dataset.train_images=160 dataset.test_images=40 backbone.ratio=0.0625 "
    "evaluation.steps=4"
).split()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which these runs might have been made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    dump = (FIXTURE / "mlflow.sql").read_text(encoding="utf-8").replace(MADE_IN, str(tmp_path))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.executescript(dump)
    database.close()
    for name in (OLD, UNFINISHED):
        folder = tmp_path / "runs" / "robust-moe" / name
        shutil.copytree(FIXTURE / name, folder)
        text = (folder / "run.json").read_text(encoding="utf-8").replace(MADE_IN, str(tmp_path))
        (folder / "run.json").write_text(text, encoding="utf-8")
    return tmp_path


def config(name: str, epochs: int) -> Config:
    settings = dict(setting.split("=") for setting in SETTINGS)
    return override(PRESETS["quickstart"](), settings | {"name": name, "epochs": epochs})


def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURE / OLD / "result.json").read_text("utf-8"))
    return found


def test_same_settings_find_the_same_folders(home: Path) -> None:
    assert run_folder(config("old", 2)) == home / "runs" / "robust-moe" / OLD
    assert run_folder(config("unfinished", 3)) == home / "runs" / "robust-moe" / UNFINISHED


def test_checkpoint_loads_and_classifies_as_it_did() -> None:
    folder = FIXTURE / OLD / "checkpoints" / "best"
    own = checkpoint.load_config(folder)
    assert own == config("old", 2)
    test = own.dataset.load(own.seed).test
    with torch.no_grad():
        logits_BK = checkpoint.load_model(folder)(to_float(test.pixels_NCHW)).logits
    accuracy = (logits_BK.argmax(1) == test.labels_N).float().mean().item()
    assert accuracy == pytest.approx(result()["metrics"]["test/sa"])


def test_finished_run_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.run(["name=old", "epochs=2", *SETTINGS]) == 0
    assert f"{result()['metrics']['test/sa']:.1%}" in capsys.readouterr().out
    assert json.loads((home / "runs/robust-moe" / OLD / "result.json").read_text()) == result()


def test_report_reads_the_runs_under_today_s_names(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = find("", "robust-moe", {}).runs
    losses = {name for name in run.metrics if name.startswith("train/loss_router")}
    assert losses == {"train/loss_router_pseudo_label", "train/loss_router_consistency"}
    assert report(["robust-moe"]) == 0
    said = capsys.readouterr().out
    (line,) = [line.split() for line in said.splitlines() if line.startswith("AdvMoE")]
    metrics = result()["metrics"]
    assert line[1:4] == ["1", *(f"{100 * metrics[f'test/{n}']:.1f}" for n in ("sa", "ra_pgd4"))]
    assert "Left out: 1 failed or unfinished." in said


def test_artifact_of_the_newest_run_is_found(home: Path) -> None:
    shutil.copytree(
        FIXTURE / OLD / "checkpoints" / "best",
        home / "mlartifacts/robust-moe" / result()["run_id"] / "artifacts/checkpoints/best",
    )
    folder = download("", "latest", "checkpoints/best", home / "there", "robust-moe")
    assert checkpoint.load_config(folder).name == "old"


def test_unfinished_run_goes_on_in_the_middle_of_its_epoch(home: Path) -> None:
    """Its last epoch ends as that of a run that was never stopped, but for the processor.

    The checkpoint was written on another one, whose sums are rounded otherwise: on an EPYC the
    router's loss ends 0.036 from that of the whole run, all other values within 0.01.
    """
    folder = run_folder(config("unfinished", 3))
    fit(config("unfinished", 3), folder)
    fit(config("unfinished", 3), home / "whole")
    ends = []
    for place in (folder, home / "whole"):
        last = max((place / "checkpoints").glob("step_*"))
        values = checkpoint.verify(last)["history"][-1]["values"]
        ends.append({k: v for k, v in values.items() if k.startswith(("train/loss_", "val/"))})
    assert "train/loss_router_pseudo_label" in ends[0]
    assert ends[0] == pytest.approx(ends[1], rel=0.1, abs=0.03)
