"""The end of a trial: validation images alone, attacks with a forced route among them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from pipeline.checkpoint import load_model
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.context import Session
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images, Splits
from pipeline.data.synthetic import Synthetic
from pipeline.end_of_run import tryout
from pipeline.loop import fit
from pipeline.presets import PRESETS

SETTINGS = {
    "epochs": 1,
    "workers": 1,
    "batch_size": 32,
    "backbone.ratio": 0.125,
    "evaluation.steps": 2,
    "evaluation.validation_steps": 1,
    "algorithm.attack.steps": 1,
}


class Sealed:
    """A test split that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the test split was asked for {name}")

    def __len__(self) -> int:
        raise AssertionError("the test split was counted")


@dataclass(frozen=True, kw_only=True)
class Half(Synthetic):
    """Synthetic images whose test split is sealed."""

    validations: ClassVar[list[Images]] = []

    def load(self, seed: int) -> Splits:
        splits = super().load(seed)
        self.validations.append(splits.validation)
        return replace(splits, test=Sealed())  # type: ignore[arg-type]


@pytest.fixture
def config() -> Config:
    data = Half(size=8, train_images=160, test_images=16, validation=0.2)
    return replace(override(PRESETS["quickstart"](), SETTINGS), dataset=data)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data import DATASETS

    monkeypatch.setitem(DATASETS, "half", Half)


@pytest.mark.usefixtures("registered")
def test_a_trial_never_touches_the_test_split(config: Config, tmp_path: Path) -> None:
    events: list[Any] = []
    metrics = fit(config, tmp_path / "trial", Session(emit=events.append), tryout)
    assert not [name for name in metrics if name.startswith("test/")]
    with pytest.raises(AssertionError, match="the test split was"):
        fit(config, tmp_path / "run")  # as a run of its own does, at its end

    told = [event for event in events if event["kind"] == "metrics"]
    assert told[-1]["values"] == metrics
    assert told[-1]["step"] == told[-2]["step"] + 1

    images = Half.validations[-1]
    model = load_model(tmp_path / "trial" / "checkpoints" / "best").eval()
    with torch.no_grad():
        hits_N = model(to_float(images.pixels_NCHW)).logits.argmax(1) == images.labels_N
    assert metrics["val/images"] == len(images)
    assert metrics["val/sa"] == pytest.approx(float(hits_N.float().mean()))
    worst = metrics["val/ra_worst"]
    assert worst <= min(metrics["val/ra"], metrics["val/ra_forced"]) <= metrics["val/sa"]
    assert metrics["val/ra_worst_low"] <= worst <= metrics["val/ra_worst_high"]


@pytest.mark.usefixtures("registered")
def test_a_dense_net_has_no_route_to_force(config: Config, tmp_path: Path) -> None:
    changes = {"algorithm": "trades", "backbone.num_experts": 1}
    metrics = fit(override(config, changes), tmp_path, ending=tryout)
    assert "val/ra_forced" not in metrics
    assert metrics["val/ra_worst"] <= metrics["val/ra"]
