"""The dual command on checkpoints that the loop made."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from moe.dual_model import Dual
from pipeline import checkpoint, evaluate, loop
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.dual import __main__ as command_of_dual
from pipeline.measures.sanity.verdict import Status
from pipeline.presets import PRESETS

TINY = {
    "dataset": "synthetic",
    "dataset.size": 8,
    "dataset.train_images": 64,
    "dataset.test_images": 24,
    "batch_size": 32,
    "epochs": 1,
    "precision": "fp32",
    "evaluation.steps": 2,
    "evaluation.validation_steps": 1,
    "algorithm.attack.steps": 1,
}
FORMS: dict[str, dict[str, Any]] = {
    "robust": {"backbone.num_experts": 2, "backbone.ratio": 0.0625},
    "standard": {"backbone": "small", "backbone.num_experts": 2, "backbone.ratio": 0.125},
    "joint": {
        f"backbone.{half}.{key}": value
        for half in ("standard", "robust")
        for key, value in (("num_experts", 2), ("ratio", 0.0625))
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a robust, a standard and a jointly trained run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, form in FORMS.items():
        preset = PRESETS["jtdmoe_cifar10_small" if name == "joint" else "rt_er_cifar10_small"]()
        metrics = loop.fit(override(preset, TINY | form | {"name": name}), folder / name)
        assert 0 <= metrics["test/ra_worst"] <= metrics["test/sa"] <= 1
    return {name: folder / name / "checkpoints" / "best" for name in FORMS}


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(out: str) -> list[dict[str, str]]:
    """The rows that a command wrote."""
    found = re.search(r"table and plot in (.+)", out)
    assert found is not None
    with (Path(found[1]) / "alpha.csv").open() as file:
        assert (Path(found[1]) / "plots" / "alpha.png").stat().st_size > 10_000
        assert "| post hoc, robust model alone | 1 |" in (Path(found[1]) / "alpha.md").read_text()
        return list(csv.DictReader(file))


def test_two_runs_and_a_joint_one_are_swept_and_tracked(
    runs: dict[str, Path], at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(runs["standard"]), str(runs["robust"]), f"joint={runs['joint']}"]
    assert command_of_dual.run([*command, "alpha=0,0.6,1"]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert [(row["curve"], float(row["alpha"])) for row in rows] == [
        (curve, alpha) for curve in ("post hoc", "joint") for alpha in (0, 0.6, 1)
    ]
    for row in rows:
        ends = ("_worst", "_low", "_high")
        attacks = [
            float(value)
            for name, value in row.items()
            if name.startswith("test/ra_") and not name.endswith(ends) and value
        ]
        assert float(row["test/ra_worst"]) <= min(attacks) <= float(row["test/sa"])
        assert bool(row["test/ra_transfer_robust"]) == (row["alpha"] == "0.6")
        assert row["verdict"].startswith(get_args(Status))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{at_home}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("robust-moe").experiment_id])
    history = client.get_metric_history(run.info.run_id, "test/sa")
    assert [(p.step, p.value) for p in history] == [
        (round(1000 * float(r["alpha"])), float(r["test/sa"])) for r in rows[:3]
    ]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"alpha.csv", "alpha.md", "plots"} <= files
    assert command_of_dual.run([*command, "alpha=0,0.6,1"]) == 0
    assert table(capsys.readouterr().out) == rows


def test_ends_of_a_sweep_are_the_single_models(
    runs: dict[str, Path], at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = "measure=sa,ra_pgd,ra_forced"
    assert (
        command_of_dual.run([str(runs["standard"]), str(runs["robust"]), "alpha=0,1", measure]) == 0
    )
    rows = table(capsys.readouterr().out)
    for row, name in zip(rows, ("standard", "robust"), strict=True):
        assert evaluate.run([str(runs[name]), measure, "dataset.test_images=24"]) == 0
        out = capsys.readouterr().out
        for metric in ("test/sa", "test/ra_pgd2", "test/ra_forced", "test/ra_worst"):
            shown = re.search(rf"{metric} .*?│ +([\d.]+)%", out)
            assert shown is not None
            assert float(shown[1]) == pytest.approx(100 * float(row[metric]), abs=0.051)


def test_single_models_stand_beside_the_pairs(
    runs: dict[str, Path], at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(runs["standard"]), str(runs["robust"]), "alpha=0,1", "measure=sa,ra_pgd"]
    assert command_of_dual.run([*command, f"beside={runs['standard']},{runs['robust']}"]) == 0
    rows = table(capsys.readouterr().out)
    assert [(row["model"], row["alpha"]) for row in rows[2:]] == [
        ("standard, single model", ""),
        ("robust, single model", ""),
    ]
    own = ("curve", "model", "alpha")
    for alone, end in zip(rows[2:], rows[:2], strict=True):
        assert {k: v for k, v in alone.items() if k not in own} == {
            k: v for k, v in end.items() if k not in own
        }
    with pytest.raises(ValueError, match="beside must be runs of different names"):
        command_of_dual.run([*command, f"beside={runs['robust']},{runs['robust']}"])


def test_evaluate_judges_a_jointly_trained_run_as_deployed(
    runs: dict[str, Path], at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint.load_model(runs["joint"])
    assert isinstance(model, Dual)
    assert model.alpha == 0.7
    assert evaluate.run([str(runs["joint"]), "measure=sa,ra_pgd,ra_expert,ra_floor"]) == 0
    out = capsys.readouterr().out
    assert "verdict: " in out
    assert "test/ra_floor" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which runs"),
        (["{robust}", "{robust}", "alpha=1.5"], r"alpha must be from 0 to 1, got 1\.5"),
        (["{robust}", "{robust}", "alpha=a"], "alpha must be a number"),
        (
            ["{robust}", "{robust}", "mix=both"],
            "mix must be one of probabilities, logits",
        ),
        (["{robust}", "{robust}", "lr=1"], "no key 'lr'"),
        (["{robust}"], "joint must be a run with backbone=dual, got 'mixture'"),
        (["{joint}", "joint={joint}"], "goes with a standard and a robust run"),
        (["{joint}", "{robust}", "alpha=0.5"], "standard must be a single network"),
    ],
)
def test_bad_input_says_what_is_valid(
    runs: dict[str, Path], at_home: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        command_of_dual.run([word.format(**runs) for word in arguments])


def test_models_of_other_images_are_not_mixed(runs: dict[str, Path], at_home: Path) -> None:
    config = override(checkpoint.load_config(runs["robust"]), {"dataset.size": 16})
    torch.manual_seed(0)
    model = checkpoint.build_model(config)
    checkpoint.save(at_home / "other", config, model, {}, {})
    with pytest.raises(ValueError, match=r"dataset\.image_size must be 8 for every model, got 16"):
        command_of_dual.run([str(at_home / "other"), str(runs["robust"])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "mixture"}, "backbone must be dual for algorithm=jtdmoe, got 'mixture'"),
        ({"backbone.alpha": 1}, r"backbone\.alpha must be below 1 for algorithm=jtdmoe"),
        ({"backbone.alpha": -0.1}, r"backbone\.alpha must be from 0 to 1, got -0\.1"),
        ({"backbone.mix": "both"}, r"backbone\.mix must be one of probabilities, logits"),
        ({"backbone.robust": "dual"}, r"backbone\.robust must be a single network"),
        (
            {"backbone.robust": "small", "backbone.robust.router_scope": "per_layer"},
            r"backbone\.robust\.router_scope must be shared in a dual model",
        ),
        (
            {"backbone.robust.num_experts": 1},
            r"backbone\.robust\.num_experts must be at least 2 for algorithm=jtdmoe",
        ),
        ({"algorithm.robustify": "some"}, "robustify must be one of second, all, none"),
    ],
)
def test_settings_that_make_no_dual_model_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        override(PRESETS["jtdmoe_cifar10_small"](), changes)


def test_rt_er_wants_a_second_expert() -> None:
    changes = {"algorithm": "rt_er", "backbone.num_experts": 1}
    with pytest.raises(ValueError, match="num_experts must be at least 2 for algorithm=rt_er"):
        override(Config(), changes)
    assert override(Config(), changes | {"algorithm.robustify": "none"}).algorithm
