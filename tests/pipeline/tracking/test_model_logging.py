"""The model that a run leaves in MLflow, taken out again and used."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe.export import exportable
from moe.network import Network
from pipeline.tracking import Tracker


def test_logged_mixture_gives_equal_logits_for_another_batch_size(
    small: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker.open(
        tmp_path / "run", tracking_uri=uri, experiment="e", name="n", params={}, tags={}
    )
    example_BCHW = np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32)
    assert tracker.log_model(exportable(small), example_BCHW)
    assert tracker.close("finished")
    (output,) = mlflow.MlflowClient(uri).get_run(tracker.run_id).outputs.model_outputs
    model_uri = mlflow.MlflowClient(uri).get_logged_model(output.model_id).model_uri

    x_BCHW = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = small(x_BCHW)
    assert wanted.route.unique().numel() == 2
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        loaded = mlflow.pyfunc.load_model(model_uri)
        for batch in (1, 9):
            found = torch.from_numpy(loaded.predict(x_BCHW[:batch].numpy()))
            torch.testing.assert_close(found, wanted.logits[:batch], rtol=1e-5, atol=1e-5)
    finally:
        mlflow.set_tracking_uri(before)
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, 3, 8, 8)
    assert loaded.metadata.signature.outputs.inputs[0].shape == (-1, 4)
