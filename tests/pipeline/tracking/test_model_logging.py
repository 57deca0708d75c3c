"""The model that a run leaves in MLflow, taken out again and used."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe.network import Network
from moe.sorted_graph import loggable
from pipeline.tracking import Tracker
from pipeline.tracking.model_logging import write_model
from tests.helpers.http_load import post
from tests.helpers.servers import answers, closed_port, wait_until

LABELS = ["ant", "bee", "cat", "dog"]


def pixels(count: int) -> np.ndarray[Any, Any]:
    shape = (count, 3, 8, 8)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def to_unit(pixels_BCHW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return pixels_BCHW.astype(np.float32) / np.float32(255)


def png(image_CHW: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_CHW.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


def written(folder: Path, model: Network) -> Path:
    logits, classifier = loggable(model)
    example_BCHW = np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32)
    write_model(folder, logits, example_BCHW, classifier=classifier, labels=LABELS)
    return folder


def check(rows: list[dict[str, Any]], model: Network, images: np.ndarray[Any, Any]) -> None:
    with torch.no_grad():
        wanted = model(torch.from_numpy(to_unit(images)))
    probabilities_BK = torch.tensor([row["probabilities"] for row in rows])
    torch.testing.assert_close(
        probabilities_BK, wanted.logits.softmax(1), rtol=1e-5, atol=1e-5, check_dtype=False
    )
    assert [row["label"] for row in rows] == wanted.logits.argmax(1).tolist()
    assert [row["class"] for row in rows] == [LABELS[k] for k in wanted.logits.argmax(1)]
    assert [row["route"] for row in rows] == wanted.route.view(len(images), -1).tolist()


def test_logged_mixture_answers_by_both_flavours(
    small: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker.open(
        tmp_path / "run", tracking_uri=uri, experiment="e", name="n", params={}, tags={}
    )
    example_BCHW = np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32)
    logits, classifier = loggable(small)
    assert tracker.log_model(logits, example_BCHW, classifier=classifier, labels=LABELS)
    assert tracker.close("finished")
    (output,) = mlflow.MlflowClient(uri).get_run(tracker.run_id).outputs.model_outputs
    model_uri = mlflow.MlflowClient(uri).get_logged_model(output.model_id).model_uri
    images = pixels(9)
    x_BCHW = torch.from_numpy(to_unit(images))
    with torch.no_grad():
        wanted = small(x_BCHW)
    assert wanted.route.unique().numel() == 2
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        graph = mlflow.pytorch.load_model(model_uri)
        loaded = mlflow.pyfunc.load_model(model_uri)
    finally:
        mlflow.set_tracking_uri(before)
    for batch in (1, 9):
        with torch.no_grad():
            found = graph(x_BCHW[:batch])
        torch.testing.assert_close(found, wanted.logits[:batch], rtol=1e-5, atol=1e-5)
        arrays = pd.DataFrame({"pixels": x_BCHW[:batch].tolist()})
        encoded = pd.DataFrame({"image": [png(image) for image in images[:batch]]})
        for table in (arrays, encoded):
            check(loaded.predict(table).to_dict("records"), small, images[:batch])


def test_wrong_images_are_refused_with_a_line(small: Network, tmp_path: Path) -> None:
    import mlflow
    import pandas as pd
    from mlflow.exceptions import MlflowException

    loaded = mlflow.pyfunc.load_model(str(written(tmp_path / "model", small)))
    good = to_unit(pixels(1))[0].tolist()
    bright, empty, small_image = [[[2.0] * 8] * 8] * 3, [[[float("nan")] * 8] * 8] * 3, [[[0.5]]]
    for row, text in (
        ({"pixels": bright}, "pixels must be from 0 to 1"),
        ({"pixels": empty}, "pixels must be from 0 to 1"),
        ({"pixels": small_image}, r"shape \(3, 8, 8\), got \(1, 1, 1\)"),
        ({"pixels": [[["a"]]]}, "schema"),
        ({"pixels": [0.5]}, "schema"),
        ({"image": b"text"}, "no PNG or JPEG"),
        ({"image": png(np.zeros((3, 9, 8), np.uint8))}, r"\(8, 8\) pixels, got \(8, 9\)"),
        ({"image": png(pixels(1)[0]), "pixels": good}, "one of image, pixels, got 2"),
    ):
        with pytest.raises(MlflowException, match=text):
            loaded.predict(pd.DataFrame([row]))
    with pytest.raises(MlflowException, match="at most 1024 images per request, got 10000"):
        loaded.predict(pd.DataFrame({"image": [b""] * 10_000}))


@pytest.mark.slow
def test_model_answers_under_mlflow_models_serve(small: Network, tmp_path: Path) -> None:
    folder, port = written(tmp_path / "model", small), closed_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder)]
    command += ["--env-manager", "local", "--port", str(port), "--host", "127.0.0.1"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True
        )
    url, images = f"http://127.0.0.1:{port}", pixels(5)
    texts = [base64.b64encode(png(image)).decode() for image in images]

    def ask(column: str, values: list[Any]) -> tuple[int, Any]:
        body = json.dumps({"dataframe_records": [{column: value} for value in values]}).encode()
        status, text = post(f"{url}/invocations", body, "application/json")
        return status, json.loads(text)

    try:
        wait_until(lambda: answers(f"{url}/ping") or process.poll() is not None, 120)
        assert process.poll() is None, (tmp_path / "log").read_text()
        for column, values in (("pixels", to_unit(images).tolist()), ("image", texts)):
            status, found = ask(column, values)
            assert status == 200, found
            check(found["predictions"], small, images)
        for column, values in (
            ("image", ["text"]),
            ("image", [base64.b64encode(b"text").decode()]),
            ("pixels", [[[[2.0] * 8] * 8] * 3]),
            ("pixels", [[[[float("nan")] * 8] * 8] * 3]),
            ("pixels", [[[[0.5] * 9] * 9] * 3]),
            ("image", texts * 2_000),
        ):
            status, found = ask(column, values)
            assert 400 <= status < 500, (column, status, found)
        status, found = ask("image", texts)
        assert status == 200
        check(found["predictions"], small, images)
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
