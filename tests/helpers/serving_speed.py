"""Speed of both servers against the bare model.

``python -m tests.helpers.serving_speed CHECKPOINT [seconds=30] [clients=4]``. Each server is a
process, and each load another, with one request per client at a time; the bare model classifies
the same images in this process with one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from moe.fold_batchnorm import fold
from moe.sorted_graph import loggable
from pipeline import checkpoint
from pipeline.tracking.model_logging import write_model
from tests.helpers.http_load import LoadReport
from tests.helpers.servers import answers, closed_port, wait_until

BATCHES = (1, 32)
SERVE = "mlflow models serve --env-manager local".split()


@contextmanager
def running(command: list[str], url: str, log: Path) -> Iterator[None]:
    """Run a server until the block ends."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(lambda: answers(url) or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def bare(model: torch.nn.Module, x_BCHW: torch.Tensor, seconds: float) -> str:
    """Time the folded model in this process."""
    report, began = LoadReport(), time.monotonic()
    with torch.inference_mode():
        model(x_BCHW)
        while time.monotonic() - began < seconds:
            sent = time.perf_counter()
            model(x_BCHW)
            report.seconds.append(time.perf_counter() - sent)
    p50, p99 = (1e3 * report.quantile(share) for share in (0.5, 0.99))
    rate = len(report.seconds) * len(x_BCHW) / (time.monotonic() - began)
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {rate:.1f} images/s"


def main(words: list[str]) -> None:
    """Measure the bare model and both servers, print a line each."""
    source, given = Path(words[0]), dict(word.split("=", 1) for word in words[1:])
    seconds, clients = float(given.get("seconds", 30)), given.get("clients", "4")
    torch.set_num_threads(1)
    model, side = checkpoint.load_model(source), checkpoint.load_config(source).dataset.image_size
    example_BCHW = np.random.default_rng(0).random((max(BATCHES), 3, side, side), np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        logits, classifier = loggable(model)
        names = checkpoint.class_names_of(source)
        write_model(root / "model", logits, example_BCHW[:4], classifier=classifier, labels=names)
        ports = closed_port(), closed_port()
        ray, mlflow = (f"http://127.0.0.1:{port}" for port in ports)
        here = [sys.executable, "-m"]
        servers = {
            "Ray Serve": (
                [*here, "pipeline.serve", str(source), f"port={ports[0]}"],
                f"{ray}/health",
                f"{ray}/predict",
            ),
            "mlflow models serve": (
                [*here, *SERVE, "-m", str(root / "model"), "--port", str(ports[1])],
                f"{mlflow}/ping",
                f"{mlflow}/invocations",
            ),
        }
        for batch in BATCHES:
            x_BCHW = torch.from_numpy(example_BCHW[:batch])
            found = bare(fold(model).eval(), x_BCHW, seconds / 3)
            print(f"bare model, {batch} images a call: {found}", flush=True)
        for name, (command, ready, url) in servers.items():
            with running(command, ready, root / "log"):
                for batch in BATCHES:
                    images = example_BCHW[:batch].tolist()
                    rows = [{"pixels": image} for image in images]
                    body = {"images": images} if "Ray" in name else {"dataframe_records": rows}
                    (root / "body").write_text(json.dumps(body))
                    words = [url, str(root / "body"), f"images={batch}", f"clients={clients}"]
                    load = [*here, "tests.helpers.http_load", *words, f"seconds={seconds}"]
                    done = subprocess.run(load, capture_output=True, text=True, check=True)
                    print(f"{name}, {batch} images a request: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
