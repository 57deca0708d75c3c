"""The serve command as a real process: answers, refusals, load, and its end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.network import Network
from pipeline import checkpoint, serve
from pipeline.config import Config
from pipeline.config.overrides import override
from tests.helpers.http_load import load, post
from tests.helpers.servers import answers, closed_port, wait_until
from tests.pipeline.serving.test_request_images import BAD, encoded, form, pixels

SETTINGS = {
    "dataset": "synthetic",
    "dataset.size": 8,
    "dataset.classes": 4,
    "backbone.ratio": 0.125,
    "name": "tiny",
}


def saved(folder: Path) -> Network:
    """Write a checkpoint of a network whose experts all get a share of random images."""
    config = override(Config(), SETTINGS)
    torch.manual_seed(0)
    model = checkpoint.build_model(config)
    for norm in model.modules():
        if isinstance(norm, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(64, 3, 8, 8))
    checkpoint.save(folder, config, model, {}, {"stage": -1})
    return model.eval()


def test_bad_settings_are_named_before_anything_starts(tmp_path: Path) -> None:
    for words, text in (
        ([], "which run"),
        (["latest", "replica=2"], "replicas"),
        (["latest", "replicas=0"], "replicas must be at least 1, got 0"),
        (["latest", "port=70000"], "port must be from 1 to 65535, got 70000"),
        (["latest", "max_bytes=0"], "max_bytes must be at least 1, got 0"),
        (["latest", "wait=nan"], "wait"),
    ):
        with pytest.raises(ValueError, match=text):
            serve.run(words)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Network]]:
    pytest.importorskip(
        "ray.serve", reason="the extra serve is not installed", exc_type=ImportError
    )
    root, port = tmp_path_factory.mktemp("served"), closed_port()
    model = saved(root / "best")
    limits = ["max_images=64", "max_bytes=200000", "max_queued_requests=4"]
    limits += ["max_ongoing_requests=2"]
    command = [sys.executable, "-m", "pipeline.serve", str(root / "best"), f"port={port}", *limits]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            cwd=Path(__file__).parents[3],
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(f"{url}/health") or process.poll() is not None, 120)
        assert process.poll() is None, (root / "log").read_text()
        yield url, model
        assert process.poll() is None, (root / "log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def matches(found: dict[str, Any], model: Network, pixels_BCHW: Any) -> bool:
    x_BCHW = torch.from_numpy(pixels_BCHW.astype(np.float32) / np.float32(255))
    with torch.no_grad():
        wanted = model(x_BCHW)
    rows = found["predictions"]
    probabilities_BK = torch.tensor([row["probabilities"] for row in rows])
    return (
        torch.allclose(probabilities_BK, wanted.logits.softmax(1), atol=1e-5)
        and [row["label"] for row in rows] == wanted.logits.argmax(1).tolist()
        and [row["route"] for row in rows] == wanted.route.tolist()
        and all(row["class"] == str(row["label"]) for row in rows)
    )


@pytest.mark.slow
def test_answers_are_the_networks(server: tuple[str, Network]) -> None:
    url, model = server
    images = pixels(9)
    arrays = json.dumps({"images": (images.astype(np.float32) / np.float32(255)).tolist()}).encode()
    pngs = form([encoded(image) for image in images])
    for body, kind in (
        (arrays, "application/json"),
        (pngs, "multipart/form-data; boundary=xyz"),
    ):
        status, text = post(f"{url}/predict", body, kind)
        assert status == 200
        assert matches(json.loads(text), model, images)
    wrong = np.ascontiguousarray(images[::-1])
    assert not matches(json.loads(text), model, wrong)


@pytest.mark.slow
def test_malformed_requests_are_refused_and_the_server_lives(server: tuple[str, Network]) -> None:
    url, model = server
    for name, (body, kind, status, _) in BAD.items():
        if name in ("bytes", "five parts"):  # this server allows more
            continue
        found, text = post(f"{url}/predict", body, kind)
        assert found == status, (name, text)
        assert "\n" not in json.loads(text)["error"]
    many = json.dumps([0] * 10_000, separators=",:").encode()
    assert post(f"{url}/predict", many, "application/json")[0] == 413
    assert post(f"{url}/predict", b"0" * 200_001, "image/png")[0] in (0, 413)
    assert post(f"{url}/nothing", b"", "image/png")[0] == 404
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", "/predict")
    assert connection.getresponse().status == 405
    image = pixels(1)
    status, text = post(f"{url}/predict", encoded(image[0]), "image/png")
    assert status == 200
    assert matches(json.loads(text), model, image)


@pytest.mark.slow
def test_load_is_answered_or_refused_with_503_and_counted(server: tuple[str, Network]) -> None:
    url, model = server
    images = pixels(1)
    report = load(
        f"{url}/predict",
        encoded(images[0]),
        "image/png",
        clients=24,
        seconds=6,
        check=lambda text: matches(json.loads(text), model, images),
    )
    assert report.wrong == 0
    assert set(report.statuses) <= {200, 503}
    assert report.statuses[200] > 0
    assert report.statuses[503] > 0  # 24 clients, 2 ongoing and 4 queued
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    refused = next(line for line in lines if 'requests_total{status="503"}' in line)
    assert float(refused.split()[-1]) == report.statuses[503]
    assert answers(f"{url}/health")
