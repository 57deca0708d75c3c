"""Promotion: the best trial of each objective becomes a model version, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.sweep.promote import main
from pipeline.tracking import log_torch_model
from tests.helpers.sweeps import Store, shares


class Logits(torch.nn.Module):
    """The least that MLflow takes for a model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 8 * 8, 10)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x_BCHW.flatten(1))
        return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def log_model(store: Store, run_id: str) -> None:
    """Log a model as the driver of a run does."""
    example_BCHW = np.zeros((2, 3, 8, 8), dtype=np.float32)
    log_torch_model(store.uri, run_id, Logits().eval(), example_BCHW, "model")


@pytest.fixture(scope="module")
def sweep(store: Store) -> dict[str, str]:
    """Four trials: 0 is the most robust, 1 the most accurate and the cheapest."""
    parent = store.sweep("adv_moe")
    runs = {
        "parent": parent,
        "0": store.trial(parent, 0, shares(0.5, 0.31), gmac=0.2),
        "1": store.trial(parent, 1, shares(0.6, 0.2), gmac=0.1),
        "2": store.trial(parent, 2, shares(0.7, 0.4), status="stopped"),
        "3": store.trial(parent, 3, shares(0.4, 0.1), gmac=0.3),
    }
    for number in "01":
        log_model(store, runs[number])
    return runs


def test_best_of_each_objective_is_registered_once(
    store: Store, sweep: dict[str, str], capsys: Any
) -> None:
    argv = [sweep["parent"], f"tracking_uri={store.uri}"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "robust-moe-adv_moe version 2 @best-ra: trial 0, highest RA worst of 3 trials" in said
    name = "robust-moe-adv_moe"

    def aliased(alias: str) -> tuple[str, str]:
        version = store.client.get_model_version_by_alias(name, alias)
        return str(version.version), str(version.run_id)

    first = {alias: aliased(f"best-{alias}") for alias in ("sa", "ra", "gmac")}
    assert first["sa"] == first["gmac"] == ("1", sweep["1"])
    assert first["ra"] == ("2", sweep["0"])
    assert main(argv) == 0
    assert {alias: aliased(f"best-{alias}") for alias in first} == first
    assert len(store.client.search_model_versions(f"name = '{name}'")) == 2
    assert main([*argv, "objective=ra", "alias=champion", "name=mine"]) == 0
    assert store.client.get_model_version_by_alias("mine", "champion").run_id == sweep["0"]


def test_promoted_model_loads_by_its_alias(store: Store, sweep: dict[str, str]) -> None:
    import mlflow

    argv = [sweep["parent"], f"tracking_uri={store.uri}", "objective=ra", "name=loads"]
    assert main(argv) == 0
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.uri)
    try:
        model = mlflow.pyfunc.load_model("models:/loads@best-ra")
        logits_BK = model.predict(np.zeros((3, 3, 8, 8), dtype=np.float32))
    finally:
        mlflow.set_tracking_uri(before)
    assert logits_BK.shape == (3, 10)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["trial=2"], "error: trial 2 is stopped: only a finished one is promoted"),
        (["trial=3"], "error: trial 3 left no model to promote: run "),
    ],
)
def test_trial_that_cannot_be_promoted_is_refused_with_a_line(
    store: Store, sweep: dict[str, str], capsys: Any, settings: list[str], text: str
) -> None:
    assert main([sweep["parent"], f"tracking_uri={store.uri}", *settings]) == 1
    assert capsys.readouterr().err.startswith(text)


def test_sweep_without_a_finished_trial_is_refused_with_a_line(store: Store, capsys: Any) -> None:
    parent = store.sweep()
    store.trial(parent, 0, {"sa": 0.3}, status="stopped")
    assert main([parent, f"tracking_uri={store.uri}"]) == 1
    assert "error: no finished trial to promote: 1 stopped." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["objective=speed"], "objective must be one of sa, ra, gmac, got 'speed'"),
        (["trial=9"], "trial must be one of 0, 1, 2, 3, got '9'"),
        (["trial=1", "objective=sa"], "give objective or trial, not both"),
        (["alias=best"], "alias=best needs an objective, one of sa, ra, gmac"),
        (["objective=sa", "alias=v1"], "alias must be letters, digits, - and _"),
        (["name=a/b"], "name must be printable and without / : @, got 'a/b'"),
        (["colour=red"], "no key 'colour'; nearest: "),
    ],
)
def test_wrong_arguments_are_named(
    store: Store, sweep: dict[str, str], settings: list[str], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        main([sweep["parent"], f"tracking_uri={store.uri}", *settings])


def test_trial_without_a_logged_model_gets_one_from_its_best_checkpoint(
    store: Store, tmp_path: Path
) -> None:
    """The artifact that every run uploads is enough."""
    from pipeline import checkpoint
    from pipeline.config import Config
    from pipeline.config.overrides import override
    from pipeline.data.synthetic import Synthetic

    parent = store.sweep("kept")
    run_id = store.trial(parent, 0, shares(0.5, 0.3))
    config = override(Config(dataset=Synthetic(size=8)), {"backbone.ratio": 0.25})
    model = checkpoint.build_model(config)
    checkpoint.save(tmp_path / "checkpoints" / "best", config, model, {}, {})
    store.client.log_artifacts(run_id, str(tmp_path / "checkpoints"), "checkpoints")
    assert main([parent, f"tracking_uri={store.uri}", "objective=ra"]) == 0
    version = store.client.get_model_version_by_alias("robust-moe-kept", "best-ra")
    assert version.run_id == run_id
    assert version.tags["trial"] == "0"
