"""How an evaluation is shared out, and how much of it is left."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from pipeline.attacks.pgd import PGD
from pipeline.cli.console import Follower
from pipeline.config.overrides import override
from pipeline.data.splits import Images
from pipeline.distributed import sharded_evaluation
from pipeline.distributed.sharded_evaluation import cost_of_job, shards, workers_for
from pipeline.evaluation.evaluator import Job
from pipeline.measures.base import cost_of
from pipeline.measures.forced_route import ForcedRoute
from pipeline.measures.gradient_attack import WhiteBox
from pipeline.measures.noise_and_transfer import RandomNoise
from pipeline.presets import PRESETS
from tests.helpers import defences

TEN = Images(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64))


def test_cost_counts_gradients_and_what_is_done_of_them() -> None:
    attack = PGD(steps=50, restarts=2)
    pgd, forced = WhiteBox(attack=attack), ForcedRoute(attack=attack)
    assert cost_of(pgd) == 100
    assert cost_of(forced) == 200
    job = Job(TEN, torch.arange(10), {"ra_pgd": pgd, "ra_forced": forced})
    assert cost_of_job(job) == 3000
    assert [cost_of_job(job, part) for part in (0.0, 0.25, 0.5, 0.75)] == [0, 500, 1000, 2000]


def test_time_left_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    follower = Follower()
    follower._last = -1e9
    event = {"kind": "judging", "what": "ra_pgd", "done": 1, "of": 4, "seconds": 20.0}
    follower.handle({**event, "left": 60.0})
    follower._last = -1e9
    follower.handle({**event, "left": None})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("20 s so far, about 60 s left")
    assert second.endswith("20 s so far")


def test_workers_follow_cores_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_evaluation.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [workers_for(n) for n in (0, 1, 127, 128, 359, 1000)] == [1, 1, 1, 2, 5, 8]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers_for(1000) == 2


def test_noise_costs_next_to_nothing() -> None:
    assert cost_of(RandomNoise(attack=PGD(steps=50))) < cost_of(WhiteBox(attack=PGD(steps=50))) / 10


class Listener(Follower):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, object]] = []

    def handle(self, event: Mapping[str, object]) -> None:
        self.told.append(dict(event))


def test_time_left_follows_from_the_costs_of_what_is_to_come() -> None:
    """Half of the gradients are those of PGD, done after as much time as is left."""
    w_K = torch.nn.Parameter(torch.ones(2))
    model = defences.dense(lambda x: x.mean((1, 2, 3))[:, None] * w_K)
    attack = PGD(steps=2)
    twice = {"ra_pgd": WhiteBox(attack=attack), "ra_again": WhiteBox(attack=attack)}
    jobs = {"main": Job(TEN, torch.arange(10), twice)}
    listener = Listener()
    shards(override(PRESETS["quickstart"](), {"workers": 1}), model, jobs, None, 10, listener)
    looks = [event for event in listener.told if event["kind"] == "judging"]
    assert looks[0]["left"] is None, "nothing done yet"
    (half,) = [event for event in looks if (event["done"], event["what"]) == (10, "ra_pgd")]
    assert half["left"] == pytest.approx(half["seconds"])
    assert looks[-1]["left"] == pytest.approx(0.0, abs=1e-9)
