"""What a run is includes what it was trained on."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.context import Session
from pipeline.data.class_names import ClassNamesError
from pipeline.data.identity import OtherDataError, check_same_data, data_sha256
from pipeline.data.synthetic import Synthetic
from pipeline.loop import fit
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
