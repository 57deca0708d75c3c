"""Ray Serve application: a front that reads requests, and replicas that classify batches.

Shapes: B images, K classes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.serving.request_images import Limits, RequestError, read_images, too_many_bytes

APPLICATION, REPLICAS = "classifier", "Replica"
PREDICTED = ("label", "class", "probabilities", "route")
FRONT_REQUESTS = 1000  # that the front reads at a time; those that wait for a replica are limited


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        host, port: Where it listens.
        replicas: Processes that classify, one thread each.
        batch: Images that a replica classifies at a time, at most.
        wait: Seconds that it waits for a batch to fill.
        max_ongoing_requests: That are sent to one replica at a time.
        max_queued_requests: That wait for a replica; others are answered 503.

    Raises:
        ValueError: A setting is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    batch: int = 128
    wait: float = 0.005
    max_ongoing_requests: int = 64
    max_queued_requests: int = 256

    def __post_init__(self) -> None:
        for key in ("replicas", "batch", "max_ongoing_requests", "max_queued_requests"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        if not 0 <= self.wait <= 10:
            raise ValueError(f"wait must be from 0 to 10 seconds, got {self.wait}")
        if not 0 < self.port < 65536:
            raise ValueError(f"port must be from 1 to 65535, got {self.port}")


def images_in(requests: Sequence[NDArray[np.float32]]) -> int:
    """Count the images of several requests."""
    return sum(map(len, requests))


class Replica:
    """A folded copy of a model, and a queue of requests that it classifies in batches."""

    def __init__(self, model: ray.ObjectRef[Network], batch: int, wait: float):
        torch.set_num_threads(1)
        self.model = fold(ray.get(model).eval())
        self._classify.set_max_batch_size(batch)  # type: ignore[attr-defined]
        self._classify.set_batch_wait_timeout_s(wait)  # type: ignore[attr-defined]

    async def classify(
        self, x_BCHW: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return probabilities (B, K) and the route of each image."""
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = await self._classify(x_BCHW)
        return found

    @serve.batch(max_batch_size=128, batch_size_fn=images_in)  # type: ignore[untyped-decorator]
    async def _classify(self, requests: list[NDArray[np.float32]]) -> list[Any]:
        return classify_all(self.model, requests)


@torch.inference_mode()
def classify_all(
    model: Network, requests: Sequence[NDArray[np.float32]]
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Classify the images of several requests at once; one pair per request."""
    x_BCHW = torch.from_numpy(np.concatenate(requests))
    routed = model(x_BCHW.contiguous(memory_format=torch.channels_last))
    probabilities_BK = routed.logits.float().softmax(1)
    sizes = [len(request) for request in requests]
    parts = zip(probabilities_BK.split(sizes), routed.route.split(sizes), strict=True)
    return [(p.numpy(), route.numpy()) for p, route in parts]


class Front:
    """Reads requests within limits, passes images on, answers JSON, and counts."""

    def __init__(self, replicas: Any, limits: Limits, class_names: Sequence[str]):
        self.replicas, self.limits, self.class_names = replicas, limits, list(class_names)
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "robust_moe_requests", "Requests by status", ["status"], registry=self.registry
        )
        self.images = Counter("robust_moe_images", "Images classified", registry=self.registry)
        self.seconds = Histogram(
            "robust_moe_seconds", "Seconds from request to answer", registry=self.registry
        )

    async def __call__(self, request: Request) -> Response:
        match request.method, request.url.path:
            case "POST", "/predict":
                return await self.predict(request)
            case "GET", "/health":
                return await self.health()
            case "GET", "/metrics":
                return PlainTextResponse(generate_latest(self.registry))
            case _, "/predict" | "/health" | "/metrics":
                return refusal(405, f"{request.method} is not allowed here")
        return refusal(404, "there is POST /predict, GET /health and GET /metrics")

    async def predict(self, request: Request) -> Response:
        """Answer one request for predictions."""
        began = time.perf_counter()
        try:
            body = await read_body(request, self.limits)
            kind = request.headers.get("content-type", "")
            x_BCHW = await asyncio.to_thread(read_images, body, kind, self.limits)
            found = await self.replicas.classify.remote(x_BCHW)
            answer: Response = JSONResponse({"predictions": self.as_rows(*found)})
            self.images.inc(len(x_BCHW))
        except RequestError as error:
            answer = refusal(error.status, str(error))
        except BackPressureError:
            answer = refusal(503, "all replicas are busy and the queue is full; try again")
            answer.headers["Retry-After"] = "1"
        self.requests.labels(str(answer.status_code)).inc()
        self.seconds.observe(time.perf_counter() - began)
        return answer

    def as_rows(
        self, probabilities_BK: NDArray[np.float32], route: NDArray[np.int64]
    ) -> list[dict[str, Any]]:
        """Write the predictions as JSON values, one per image."""
        labels = probabilities_BK.argmax(1).tolist()
        names = [self.class_names[label] for label in labels]
        rows = zip(labels, names, probabilities_BK.tolist(), route.tolist(), strict=True)
        return [dict(zip(PREDICTED, row, strict=True)) for row in rows]

    async def health(self) -> Response:
        """Say whether the replicas run, without waiting behind their requests."""
        status = await asyncio.to_thread(serve.status)
        found = status.applications[APPLICATION].deployments[REPLICAS]
        running = found.replica_states.get("RUNNING", 0)
        side = self.limits.image_size
        facts = {"replicas": running, "image_size": side, "classes": self.class_names}
        return JSONResponse(facts, status_code=200 if running else 503)


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read a body, and no more of it than is allowed.

    Raises:
        RequestError: It is longer.
    """
    try:
        promised = int(request.headers.get("content-length", 0))
    except ValueError:
        raise RequestError(400, "Content-Length must be a number") from None
    if promised > limits.max_bytes:
        raise too_many_bytes(limits)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.max_bytes:
            raise too_many_bytes(limits)
    return bytes(body)


def refusal(status: int, text: str) -> Response:
    """Answer an error in one line."""
    return JSONResponse({"error": text}, status_code=status)


def start(
    model: Network, settings: ServeSettings, limits: Limits, class_names: Sequence[str]
) -> None:
    """Start the application on the Ray that this process has joined; returns once it answers."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    replicas = serve.deployment(Replica).options(
        name=REPLICAS,
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        ray_actor_options={"num_cpus": 1},
    )
    front = serve.deployment(Front).options(
        name="Front", max_ongoing_requests=FRONT_REQUESTS, ray_actor_options={"num_cpus": 0}
    )
    bound = replicas.bind(ray.put(model), settings.batch, settings.wait)
    serve.run(front.bind(bound, limits, list(class_names)), name=APPLICATION)


def stop() -> None:
    """Take the application off a cluster that others use; a Ray of our own ends with its block."""
    if os.environ.get("RAY_ADDRESS"):
        serve.delete(APPLICATION)
