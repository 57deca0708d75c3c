"""What a run is includes what it was trained on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.context import Session
from pipeline.data.cifar import Cifar10
from pipeline.data.class_names import ClassNamesError
from pipeline.data.identity import OtherDataError, check_data_of, check_same_data, data_sha256
from pipeline.data.synthetic import Synthetic
from pipeline.grid.cell_log import result_of
from pipeline.loop import fit
from pipeline.storage.run_folder import run_folder
from pipeline.tune.sweep_request import read_request
from pipeline.tune.trial_log import TrialLog
from tests.pipeline.test_loop import TINY, StopError, stop_at


def test_other_data_are_refused_and_unknown_ones_pass() -> None:
    check_same_data("run a", None, "1" * 64)
    check_same_data("run a", "", "1" * 64)
    check_same_data("run a", "1" * 64, "1" * 64)
    with pytest.raises(OtherDataError, match=r"run a saw other data \(sha256 2222"):
        check_same_data("run a", "2" * 64, "1" * 64)


def test_hash_is_that_of_the_data_whatever_the_seed() -> None:
    data = Synthetic(classes=4, size=8, train_images=64)
    assert data_sha256(data) == data.load(0).sha256
    assert data_sha256(data) != data_sha256(replace(data, classes=3))


def test_checkpoint_keeps_its_data_and_does_not_go_on_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StopError):
        fit(TINY, tmp_path, Session(emit=stop_at("epoch", 1)))
    found, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    splits = TINY.dataset.load(TINY.seed)
    kept = checkpoint.data_of(found)
    assert kept == {"sha256": splits.sha256, "class_names": list(splits.class_names)}
    checkpoint.check_classes(found, "here", splits.class_names)
    if len(splits.class_names) > 1 and splits.class_names[0] != "0":
        with pytest.raises(ClassNamesError, match="in another order"):
            checkpoint.check_classes(found, "here", splits.class_names[::-1])
    other = replace(splits, sha256="f" * 64)
    monkeypatch.setattr(type(TINY.dataset), "load", lambda self, seed: other)
    with pytest.raises(OtherDataError, match="saw other data"):
        fit(TINY, tmp_path)


def test_record_without_a_hash_or_data_that_are_away_are_said_and_others_refused() -> None:
    data, said = Synthetic(classes=4, size=8, train_images=64), list[str]()
    now = data_sha256(data)
    assert check_data_of("run a", now, data, said.append) == now
    assert said == []
    assert check_data_of("run a", None, data, said.append) == now
    assert "run a does not say what data it saw" in said.pop()
    with pytest.raises(OtherDataError, match="run a saw other data"):
        check_data_of("run a", "2" * 64, data, said.append)
    away = Cifar10(path="/nowhere")
    assert check_data_of("run a", "2" * 64, away, said.append) == "2" * 64
    assert "whether run a saw these data cannot be seen: " in said.pop()
    with pytest.raises(ValueError, match="nowhere"):
        check_data_of("run a", None, away, said.append)


def test_cell_and_sweep_do_not_take_numbers_of_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, storage=str(tmp_path), tracking_uri=f"sqlite:///{tmp_path}/m.db")
    folder = run_folder(config)
    folder.mkdir(parents=True)
    result = {"metrics": {}, "run_id": "a", "ui": "", "dataset_sha256": "2" * 64}
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(OtherDataError, match=r"cell .*, seed 0, saw other data"):
        result_of(config)
    words = {"storage": str(tmp_path), "tracking_uri": config.tracking_uri}
    request = read_request(("adv_moe", "quickstart"), words)
    request.folder.mkdir(parents=True)
    kept = {"dataset_sha256": "2" * 64, "trials": [], "reports": []}
    (request.folder / "trials.json").write_text(json.dumps(kept))
    with pytest.raises(OtherDataError, match=r"sweep .* saw other data"):
        TrialLog(request)
    kept["dataset_sha256"] = data_sha256(request.base.dataset)
    (request.folder / "trials.json").write_text(json.dumps(kept))
    assert TrialLog(request).sha256 == kept["dataset_sha256"]
