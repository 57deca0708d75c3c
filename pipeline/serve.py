"""Serve a trained model over HTTP: ``python -m pipeline.serve RUN [key=value ...]``."""

from __future__ import annotations

import sys
import tempfile
import threading
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.cli.arguments import fail, main, read_arguments
from pipeline.config import Config
from pipeline.config.overrides import override, parse
from pipeline.distributed.cluster import ray_cluster, stoppable
from pipeline.evaluation.find_model import find
from pipeline.evaluation.plan import WHERE
from pipeline.nearest_names import unknown
from pipeline.serving.request_images import Limits

USAGE = """
usage: python -m pipeline.serve RUN [key=value ...] [--help]

Answer predictions of a trained model over HTTP, by Ray Serve, until Ctrl-C or SIGTERM. RUN is an
MLflow run id, latest (the newest finished run), or a checkpoint folder. Needs the extra serve.

  POST /predict   a PNG or JPEG (Content-Type image/png, image/jpeg), several as parts of
                  multipart/form-data, or JSON {"images": ...}: pixels in [0, 1], (B, 3, H, W), or a
                  list of base64; answers label, class, probabilities and route of each image
  GET /health     200 while a replica runs
  GET /metrics    Prometheus text

  host=127.0.0.1 port=8000
  replicas=1      processes that classify, one core each
  batch=128       images that a replica classifies at a time; wait=0.005 seconds for them
  max_ongoing_requests=64 max_queued_requests=256   per replica, and waiting; beyond them 503
  max_bytes=16777216 max_images=256                 of a request; beyond them 413
  max_pixels=16777216                               of an encoded image; beyond them 413
  resize=false    whether encoded images of other sizes are resized and cropped, or refused (422)
  experiment, storage, tracking_uri as in pipeline.train
"""


def run(argv: list[str]) -> int:
    """Read the command line, serve until a signal; returns the exit code."""
    given = read_arguments(argv, usage=USAGE)
    if not given.names:
        raise ValueError("which run? give an MLflow run id, latest, or a checkpoint folder")
    try:
        from pipeline.serving.server import ServeSettings, start, stop
    except ImportError as error:
        return fail(f"{error.name} is not installed: the extra serve has it", 1)
    kinds: tuple[Any, ...] = (ServeSettings, Limits)
    keys = [field.name for kind in kinds for field in fields(kind) if field.name != "image_size"]
    for key in given.settings:
        if key not in (*keys, *WHERE):
            raise unknown("key", key, (*keys, *WHERE))
    settings = ServeSettings(**parsed(ServeSettings, given.settings))
    chosen = parsed(Limits, given.settings)
    Limits(image_size=1, **chosen)  # refused before anything is loaded
    here = {key: value for key, value in given.settings.items() if key in WHERE}
    with tempfile.TemporaryDirectory() as scratch:
        folder, _ = find(given.names[0], override(Config(), here), Path(scratch))
        try:
            model, config = checkpoint.load_model(folder), checkpoint.load_config(folder)
        except checkpoint.CheckpointError as error:
            return fail(str(error), 1)
        names = checkpoint.class_names_of(folder)
    limits = Limits(image_size=config.dataset.image_size, **chosen)
    with ray_cluster(config, check=lambda _: None):
        try:
            with stoppable():
                start(model, settings, limits, names)
                print(
                    f"serving {config.name} at http://{settings.host}:{settings.port}", flush=True
                )
                threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped", flush=True)
        finally:
            stop()
    return 0


def parsed(kind: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """Read the settings that are fields of a class."""
    hints = typing.get_type_hints(kind)
    return {key: parse(key, text, hints[key]) for key, text in given.items() if key in hints}


if __name__ == "__main__":
    sys.exit(main(run))
