"""The evaluate command on a checkpoint that the loop made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import evaluate, loop
from pipeline.config import override
from pipeline.presets import PRESETS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "dataset": "synthetic",
        "dataset.size": 8,
        "dataset.train_images": 64,
        "dataset.test_images": 24,
        "batch_size": 32,
        "workers": 1,
        "epochs": 1,
        "evaluation.steps": 2,
        "evaluation.validation_steps": 1,
    }
    loop.fit(override(PRESETS["quickstart"](), settings), folder)
    return folder / "checkpoints" / "best"


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prints_every_measure_and_tracks_it(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.run([str(checkpoint), "evaluation.steps=3"]) == 0
    out = capsys.readouterr().out
    for name in ("sa", "ra_pgd3", "ra_pgd3_margin", "ra_forced", "ra_worst"):
        assert f"test/{name} " in out
    assert (at_home / "mlflow.db").exists()


def test_a_measure_can_be_asked_for_alone(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.run([str(checkpoint), "measure=sa,ra_forced", "dataset.test_images=8"]) == 0
    out = capsys.readouterr().out
    assert "8 test images" in out
    assert "ra_pgd" not in out


def test_refuses_a_checkpoint_with_a_flipped_byte(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    damaged = at_home / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert evaluate.run([str(damaged)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which run"),
        (["latest"], "no tracking database"),
        (["x", "tier=extreme"], "tier must be one of smoke, standard, full, got 'extreme'"),
        (["x", "measure=luck"], "measure must be of sa, .*, got 'luck'"),
        (["x", "lr=1"], "no key 'lr'"),
    ],
)
def test_bad_input_says_what_is_valid(at_home: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.run(arguments)


def test_two_shards_give_the_numbers_of_one(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for workers in (1, 2):
        assert evaluate.run([str(checkpoint), f"workers={workers}"]) == 0
        out = capsys.readouterr().out
        tables.append([line for line in out.splitlines() if "/" in line and "ui" not in line])
    assert tables[0] == tables[1]
    assert any("ra_worst" in line for line in tables[0])
