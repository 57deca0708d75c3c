"""Attacks on the images of several jobs, in this process or split over Ray workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from moe.network import Network
from pipeline.cli.console import Follower
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.context import best_device
from pipeline.distributed.cluster import ray_cluster
from pipeline.distributed.events import delivering
from pipeline.evaluation.evaluator import Findings, Job, examine
from pipeline.evaluation.outcome_cache import OutcomeCache
from pipeline.evaluation.plan import Plan
from pipeline.measures.base import cost_of
from pipeline.measures.runner import Effort, Verdicts, join, judge
from pipeline.seeding import seed_of

EARLY = 0.02  # of the work: too little to tell from it how long the rest takes
MIN_IMAGES = 64  # for a process of their own
Say = Callable[[Mapping[str, Any]], object]


def evaluate_model(
    config: Config,
    model: Network,
    plan: Plan,
    jobs: Mapping[str, Job],
    store: OutcomeCache | None,
    follower: Follower,
) -> Findings:
    """Make the attacks of a plan's jobs on a model, in shards over workers, and weigh them.

    Args:
        jobs: As ``plan_jobs`` makes them: ``main``, and those that only the checks need.
        store: Where outcomes are looked up and kept; None: nowhere.
    """
    world = plan.workers or workers_for(len(jobs["main"].images))
    spread = override(config, {"workers": world, "batch_size": 2 * world})
    results = shards(spread, model, jobs, store, plan.batch, follower)
    sides = {name: found for name, found in results.items() if name != "main"}
    return examine(config, model, plan.name, jobs["main"], results["main"], sides, best_device())


def cost_of_job(job: Job, part: float = 1.0) -> float:
    """Estimate gradients of a job's first attacks on its images, in order, up to a part of all."""
    turns = part * len(job.measures)
    costs = map(cost_of, job.measures.values())
    return len(job.images) * sum(c * min(max(turns - n, 0), 1) for n, c in enumerate(costs))


def workers_for(images: int) -> int:
    """Choose how many processes share images: one for each GPU or core, with 64 each at least."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(torch.cuda.device_count() or usable or 1, images // MIN_IMAGES))


def shards(
    config: Config,
    model: Network,
    jobs: Mapping[str, Job],
    store: OutcomeCache | None,
    batch: int,
    follower: Follower,
) -> dict[str, Verdicts]:
    """Make every attack, in this process or in shards on Ray; the outcomes are the same."""
    seed, world = seed_of(config.seed, "test"), config.workers

    def share(rank: int, net: Network, work: Mapping[str, Job], say: Say) -> dict[str, Verdicts]:
        device = best_device()
        net, found, began = net.to(device), {}, time.monotonic()
        ahead = max(sum(map(cost_of_job, work.values())), 1e-9)
        past = 0.0
        for name, job in work.items():

            def tell(
                done: int, of: int, on: str, own: str = name, job: Job = job, past: float = past
            ) -> None:
                spent = time.monotonic() - began
                share = (past + cost_of_job(job, done / max(of, 1))) / ahead
                left = spent / share - spent if share > EARLY else None
                if rank == 0:
                    what = on if own == "main" else f"checks: {on}"
                    where = {"what": what, "done": done, "of": of}
                    say({"kind": "judging", **where, "seconds": spent, "left": left})

            def ended(on: str, effort: Effort, job: str = name) -> None:
                if rank == 0 and job == "main":
                    say({"kind": "judged", "name": on, "world": world, **asdict(effort)})

            found[name] = judge(
                net,
                job.images,
                job.measures,
                seed=seed,
                device=device,
                rank=rank,
                world=world,
                tell=tell,
                ended=ended,
                ids_N=job.ids_N,
                store=store,
                cascade=job.cascade,
                batch=batch,
            )
            past += cost_of_job(job)
        return found

    if world == 1:
        done = share(0, model, jobs, follower.handle)
        follower.close()
        return done
    import ray

    from pipeline.distributed.events import open_event_queue

    def shard(rank: int, net: Network, work: Mapping[str, Job], queue: Any) -> Any:
        torch.set_num_threads(1)  # two that share a busy core wait for each other
        return share(rank, net, work, queue.put.remote)

    with ray_cluster(config):
        queue = open_event_queue()
        task = ray.remote(num_cpus=1, num_gpus=int(torch.cuda.is_available()))(shard)
        net, work = ray.put(model), ray.put(dict(jobs))
        with delivering(queue, follower.handle):
            parts = ray.get([task.remote(rank, net, work, queue) for rank in range(world)])
        follower.close()
    return {name: join([part[name] for part in parts]) for name in jobs}
