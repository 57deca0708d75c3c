"""The workers of a run, as the driver has them: started, asked to stop, lost, and more of them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.overrides import flatten
from pipeline.config.worker_range import Elastic
from pipeline.context import Signal
from pipeline.distributed.preflight import capacity
from pipeline.storage.sync import home_of

POLL = 0.1  # seconds between two looks at the workers
GRACE = 20.0  # seconds that workers have for a last checkpoint
LINGER = 10.0  # seconds that workers have to end after one of them said that all is in vain
LOOK = 2.0  # seconds between two looks whether there is room for more workers
SETTLE = 3.0  # seconds in which a cluster says whether there is room for so many workers
PATIENCE = 600.0  # seconds to wait for room for the fewest workers
FAILURES = 3  # failures, of an elastic run in a row without a checkpoint, that are made good

SIGNALS = (signal.SIGTERM, signal.SIGINT)

Say = Callable[[str], None]


class RoomTimeoutError(RuntimeError):
    """There was no room for the workers for too long."""


class Stop:
    """What the user asked of the driver: nothing, to stop, or to stop at once."""

    def __init__(self, say: Say) -> None:
        self.say, self.since, self.at_once = say, 0.0, False

    def hear(self, number: int, _: object = None) -> None:
        """Take a signal. SIGTERM may come more than once: ``ray job stop`` tells all processes."""
        if not self.since:
            self.since = time.monotonic()
            self.say("stopping at the next update, with a checkpoint")
        elif number == signal.SIGINT:
            self.at_once = True

    @property
    def overdue(self) -> bool:
        """Whether nobody should wait for the workers any longer."""
        return self.at_once or (bool(self.since) and time.monotonic() - self.since > GRACE)


@contextmanager
def listening(say: Say) -> Iterator[Stop]:
    """Hear SIGTERM and Ctrl-C for the block, in the main thread."""
    stop = Stop(say)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.hear) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class WorkerGroup:
    """The workers of one run.

    Attributes:
        config, folder: Of the run.
        queue: Their line to this process.
        stop: What the user asked for.
        ending: Filled elsewhere by the workers' last event, by ``updates`` as they go on, and by
            ``judging`` once training is over.
        tell: Takes events of this process, such as the number of workers.
    """

    config: Config
    folder: Path
    queue: Any
    stop: Stop
    ending: Mapping[str, Any]
    tell: Callable[[Mapping[str, Any]], None]

    def work(self) -> None:
        """Train to the end, with as many workers as the config says.

        Raises:
            KeyboardInterrupt: The user asked to stop.
            ray.train.TrainingFailedError: The workers failed too often.
            RoomTimeoutError: There is no room for the fewest workers.
        """
        if isinstance(self.config.workers, Elastic):
            outcome = self.work_elastic()
        else:
            outcome = self.attend(self.trainer(self.config.workers, FAILURES).fit)
        if outcome == "stopped":
            raise KeyboardInterrupt

    def work_elastic(self) -> str:
        """Train with as many workers as there is room for, again whenever that changes."""
        from ray.train import TrainingFailedError

        counts, failures, saved = self.config.worker_counts, 0, self.newest()
        while not self.stop.since:
            count = self.gather(counts)
            self.tell({"kind": "tag", "key": "workers_now", "value": str(count)})
            self.tell({"kind": "group", "count": count, "of": str(self.config.workers)})
            more = next((n for n in counts if n > count), count) - count
            try:
                outcome = self.attend(self.trainer(count, 0).fit, more)
                if outcome != "stopped":
                    return outcome
            except TrainingFailedError as error:
                failures = failures + 1 if saved == self.newest() else 1
                saved = self.newest()
                if failures > FAILURES:
                    raise
                self.tell({"kind": "warning", "text": f"workers were lost: {cause(error)}"})
        return "stopped"

    def attend(self, fit: Callable[[], Any], more: int = 0) -> str:
        """Run ``fit`` in a thread, and pass on to the workers what they are signalled to do.

        Args:
            more: Workers to wait for, once these are at work: they must not take their room.

        Returns:
            How the workers ended: ``finished``, ``stopped`` or ``failed``.
        """
        import ray

        box: dict[str, Any] = {}

        def run() -> None:
            try:
                box["result"] = fit()
            except BaseException as error:
                box["error"] = error

        ray.get(self.queue.signal.remote(Signal.NONE))
        thread = threading.Thread(target=run, daemon=True)
        signalled, failed, looked = False, 0.0, time.monotonic()
        room, updates = None, self.ending.get("updates", 0)
        with ExitStack() as stack:
            thread.start()
            while thread.is_alive():
                thread.join(POLL)
                if more and room is None and self.ending.get("updates", 0) > updates:
                    room = stack.enter_context(waiting_room(self.bundle(), more))
                joined = False
                if room is not None and not signalled and time.monotonic() - looked > LOOK:
                    joined, looked = room(), time.monotonic()
                if (self.stop.since or joined) and not signalled:
                    signalled = True
                    self.queue.signal.remote(Signal.STOP)
                if self.stop.overdue or (self.stop.since and self.ending.get("judging")):
                    raise KeyboardInterrupt
                if self.ending.get("kind") == "failed":
                    failed = failed or time.monotonic()
                    if time.monotonic() - failed > LINGER:
                        return "failed"  # the others wait for one that has ended
        if "error" in box:
            raise box["error"]
        return str(box["result"].return_value)

    def trainer(self, count: int, failures: int) -> Any:
        """Make Ray's trainer of so many workers."""
        gpus = "GPU" in self.bundle()
        return make_trainer(self.config, self.folder, self.queue, count, failures, gpus=gpus)

    def bundle(self) -> dict[str, float]:
        """What one worker needs, in Ray's words."""
        return {"GPU" if capacity().get("GPU", 0) >= self.config.worker_counts[0] else "CPU": 1.0}

    def gather(self, counts: list[int]) -> int:
        """Wait until there is room for the fewest workers; return for how many there is.

        Ray is asked to reserve the room, since what it lists as free includes nodes that are about
        to be taken away, and an autoscaler hears of what is wanted in no other way.

        Raises:
            RoomTimeoutError: There is none in ``PATIENCE`` seconds.
        """
        import ray

        bundle = self.bundle()
        (key,) = bundle
        there = ray.cluster_resources().get(key, 0)
        for count in reversed(counts):
            patience = PATIENCE if count == counts[0] else SETTLE
            if count > max(there, counts[0]):
                continue
            with waiting_room(bundle, count) as room:
                until = time.monotonic() + patience
                while not self.stop.since and time.monotonic() < until:
                    if room():
                        return count
                    time.sleep(POLL)
        if self.stop.since:
            raise KeyboardInterrupt
        raise RoomTimeoutError(f"no room for {counts[0]} worker(s) in {PATIENCE:.0f} s")

    def newest(self) -> str:
        """Name the newest checkpoint."""
        found = (path.name for path in (self.folder / "checkpoints").glob("step_*"))
        return max(found, default="")


def make_trainer(
    config: Config,
    folder: Path,
    queue: Any,
    count: int,
    failures: int = FAILURES,
    *,
    gpus: bool,
    callbacks: Sequence[Any] = (),
    **more: Any,
) -> Any:
    """Make Ray's trainer of a run.

    Args:
        count: Workers.
        failures: Of workers and of Ray's controller, that are made good.
        gpus: Whether each worker gets a GPU.
        callbacks: Ray Train's.
        more: What ``worker.work`` is told beside.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.distributed.worker import work

    told = {"config": flatten(config), "folder": str(folder), "queue": queue, **more}
    return TorchTrainer(
        work,
        train_loop_config=told,
        scaling_config=ScalingConfig(num_workers=count, use_gpu=gpus),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=600),
        run_config=RunConfig(
            # a name of its own each time: our checkpoints decide where the run goes on
            name=f"{folder.name}-{time.time_ns() // 10**6}",
            storage_path=str((home_of(folder) or folder) / "ray"),
            failure_config=FailureConfig(
                max_failures=failures,
                controller_failure_limit=failures,
                max_preemption_failures=-1 if failures else 0,
            ),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=list(callbacks),
        ),
    )


@contextmanager
def waiting_room(bundle: Mapping[str, float], count: int) -> Iterator[Callable[[], bool]]:
    """Ask Ray to keep room for so many more during the block; yields what tells whether it does."""
    from ray.util.placement_group import (
        placement_group,
        placement_group_table,
        remove_placement_group,
    )

    group = placement_group([dict(bundle)] * count)
    try:
        yield lambda: placement_group_table(group).get("state") == "CREATED"
    finally:
        remove_placement_group(group)


FEW = 8  # lines of a message that is passed on as a whole


def cause(error: BaseException) -> str:
    """Say in one line why Ray Train gave up."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while (inner := error.__cause__ or getattr(error, "cause", None)) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    whole = len(lines) <= FEW and not isinstance(error, RuntimeError)  # of a traceback the last
    text = " ".join(lines if whole else lines[-1:])
    return f"{type(error).__name__}: {text}"


def crowded_out(error: BaseException) -> bool:
    """Tell whether nothing failed but to find room for the workers, say after a node was lost."""
    inner = getattr(error, "controller_failure", error)
    return isinstance(inner, RoomTimeoutError) or "StartupTimeout" in type(inner).__name__
