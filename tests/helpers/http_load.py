"""Bounded load on a prediction server: a few clients, each with one request at a time.

As a process of its own: ``python -m tests.helpers.http_load URL FILE [key=value ...]``, where FILE
holds one request's body; prints p50, p99, images/s and the statuses.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 30  # seconds for one answer
ROUNDING = 1e-4  # of a probability


@dataclass
class LoadReport:
    """What the clients saw.

    Attributes:
        statuses: Answers by HTTP status; 0 where there was none.
        seconds: From request to answer, of those with status 200.
        wrong: Answers with status 200 that the check refused.
        took: Seconds of the whole load.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    took: float = 0.0

    def quantile(self, share: float) -> float:
        """Return the nearest-rank quantile of the seconds."""
        ranked = sorted(self.seconds)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def post(url: str, body: bytes, kind: str) -> tuple[int, bytes]:
    """Send one request; return status and body, status 0 where the connection failed."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


def load(
    url: str,
    body: bytes,
    kind: str,
    *,
    clients: int,
    seconds: float,
    check: Callable[[bytes], bool] = lambda _: True,
) -> LoadReport:
    """Send the same request again and again from several threads, for some seconds."""
    report, lock, began = LoadReport(), threading.Lock(), time.monotonic()

    def work() -> None:
        while time.monotonic() - began < seconds:
            sent = time.perf_counter()
            status, answer = post(url, body, kind)
            took = time.perf_counter() - sent
            right = status != 200 or check(answer)
            with lock:
                report.statuses[status] += 1
                report.wrong += not right
                if status == 200:
                    report.seconds.append(took)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.took = time.monotonic() - began
    return report


def same(found: bytes, wanted: bytes) -> bool:
    """Compare two answers: labels and routes exactly, probabilities up to rounding.

    The sums of a convolution take another order in another batch.
    """
    pairs = list(zip(*(json.loads(text)["predictions"] for text in (found, wanted)), strict=True))
    return all(
        one["label"] == other["label"]
        and one["route"] == other["route"]
        and all(
            abs(p - q) <= ROUNDING
            for p, q in zip(one["probabilities"], other["probabilities"], strict=True)
        )
        for one, other in pairs
    )


def main(words: list[str]) -> None:
    """Read the command line, load, print."""
    url, file, *rest = words
    given = dict(word.split("=", 1) for word in rest)
    kind, body = given.get("kind", "application/json"), Path(file).read_bytes()
    clients, seconds = int(given.get("clients", 4)), float(given.get("seconds", 30))
    first = post(url, body, kind)
    assert first[0] == 200, first
    report = load(
        url, body, kind, clients=clients, seconds=seconds, check=lambda text: same(text, first[1])
    )
    images = int(given.get("images", 1)) * len(report.seconds)
    p50, p99 = (1e3 * report.quantile(share) for share in (0.5, 0.99))
    print(
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {images / report.took:.1f} images/s, "
        f"statuses {dict(report.statuses)}, {report.wrong} unlike the first answer"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
