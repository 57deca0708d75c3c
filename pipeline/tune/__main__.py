"""Search a space: ``python -m pipeline.tune SPACE [PRESET] [key=value ...]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rich.console import Console

from pipeline.cli.arguments import PREEMPTED, fail, main, read_arguments
from pipeline.cli.console import Follower, aligned
from pipeline.config import Config
from pipeline.distributed.cluster import ray_cluster, stoppable
from pipeline.distributed.preflight import capacity, preflight
from pipeline.distributed.worker_group import cause
from pipeline.nearest_names import unknown
from pipeline.storage.run_folder import check_lasting, owned, set_aside, shown
from pipeline.tune.finalists import judge_finalists
from pipeline.tune.search import next_point
from pipeline.tune.sweep_request import SweepRequest, prospect, read_request
from pipeline.tune.trial_log import TrialLog, TrialRecord
from pipeline.tune.tuner import drive, reached, words
from tune_spaces import SPACES

USAGE = """
usage: python -m pipeline.tune SPACE [PRESET] [key=value ...] [--dry-run] [--fresh] [--list]
       python -m pipeline.tune promote ...

Train trials with settings drawn from a search space, stop those that fall behind, and draw the
front of accuracy, robustness and cost. Trials are compared on validation images alone, by attacks
that include a forced route; only members of the front see the test split. One parent run in MLflow,
the trials below it. The same command goes on where it was stopped, with more trials if num_samples
is larger than before.

  SPACE PRESET            what is searched, and the run that is varied (default: the space's own)
  num_samples=N           trials (default: the space's; of a grid: all its points)
  concurrent=N            trials at a time (default: CPUs, or GPUs, over workers)
  search=random|optuna    optuna: multi-objective TPE, random for its first ten (needs the extra
                          search). No population based training: under Ray Train V2 it does nothing
  scheduler=asha|none     early stopping by validation RA (default: asha; none for a grid)
  max_gmac=0.3            nets that cost more are not trained
  finalists=N             members of the front that are judged on the test split (default: 1)
  key=value               any setting, as in pipeline.train; a key of the space is then not searched
  --dry-run  print the points and what they cost, start nothing
  --fresh    start over; what an earlier sweep left is kept under another name
  --list     the spaces; with SPACE: its keys
"""
Say = Callable[[str], None]


def run(argv: list[str]) -> int:
    """Read the command line, search; returns the exit code."""
    if argv[:1] == ["promote"]:
        from pipeline.sweep import promote

        return promote.main(argv[1:])
    flags = ("--dry-run", "--fresh", "--list")
    given = read_arguments(argv, usage=USAGE, flags=flags, most_names=2)
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    if "--list" in given.flags:
        return show_spaces(given.names, say)
    request = read_request(given.names, given.settings)
    if "--dry-run" in given.flags:
        return show_points(request, say)
    check_lasting(request.base)
    with owned(request.folder, say) as free:
        if not free:
            return fail(f"another process runs this sweep in {shown(request.folder)}", 1)
        if "--fresh" in given.flags and (old := set_aside(request.folder)):
            say(f"the earlier sweep is kept in {shown(old)}")
        return carry_out(request, Follower(console))


def show_spaces(names: tuple[str, ...], say: Say) -> int:
    """Print the spaces, or the keys of one."""
    for name in names[:1] or SPACES:
        if name not in SPACES:
            raise unknown("space", name, SPACES)
        space = SPACES[name]
        size = f"grid of {space.points}" if space.points else f"{space.num_samples} samples"
        say(f"{name}: {space.title} ({space.preset}, {size})")
        if names:
            for key, sampler in space.keys.items():
                drawn = sampler["grid_search"] if key in space.grid else sampler.domain_str
                say(f"    {key}  {drawn}")
            say(f"    objectives  {', '.join(f'{n} {m}' for n, m in space.objectives)}")
    return 0


def show_points(request: SweepRequest, say: Say) -> int:
    """Print the trials with what an image costs them; Optuna's as if nothing were known yet."""
    for index in range(request.samples):
        point = next_point(request, index, [])
        found = prospect(request, f"{index:03d}", point)
        text = f"infeasible: {found.reason}" if found.reason else ""
        if found.costs and not text:
            text = f"{found.costs['cost/gmac']:.4g} GMAC, {found.costs['cost/params'] / 1e6:.3g} M"
        say(f"[{index:03d}] {words(point)}  {text}")
    return 0


def carry_out(request: SweepRequest, follower: Follower) -> int:
    """Run the trials that are left, judge the finalists, draw the answer; returns the exit code."""
    log, status, say = TrialLog(request), "failed", follower.say
    say(
        f"{request.folder.name}: {request.samples} trials of {request.name} on {request.preset}, "
        f"{request.samples - log.left} done before; {shown(request.folder)}"
    )
    try:
        if log.left:
            run_trials(log, say)
        else:
            log.begin()
        with stoppable():  # Ray has handlers of its own, whose last one is gone with it
            judge_finalists(log, follower)
            answer(log, say)
        status = "failed" if failed(log) else "finished"
    except (KeyboardInterrupt, SystemExit):
        status = "preempted"
    except ValueError:  # bad input, said by whoever found it
        raise
    except Exception as error:
        return fail(cause(error), 1)
    finally:
        follower.close()
        sent = log.close(status)
    if log.entries:
        say(outcome(log))
        say(f"run {log.tracker.run_id}; see it with: {log.tracker.ui_hint()}")
    if not sent:
        say("warning: MLflow does not have everything yet; the same command sends it")
    return conclude(log, status)


def run_trials(log: TrialLog, say: Say) -> None:
    """Run trials in one Ray: that of ``RAY_ADDRESS``, or one that ends with them."""
    request = log.request
    check = partial(room, request=request)
    with ray_cluster(request.base, check, dashboard=True), stoppable():
        slots, gpus = places(request)
        unit = f"{slots * request.base.workers} {'GPU' if gpus else 'CPU'}(s)"
        say(f"{log.left} to run, {slots} at a time on {unit}")
        log.begin()
        drive(log, slots, gpus=gpus, say=say)


def room(config: Config, request: SweepRequest) -> None:
    """Check that a trial, and as many at a time as are wanted, have room in the cluster.

    Raises:
        ValueError: They have not; to wait for it would be to wait forever.
    """
    preflight(config)
    slots, gpus = places(replace(request, concurrent=None))
    if (wanted := request.concurrent or 1) > slots:
        has = capacity()["GPU" if gpus else "CPU"]
        raise ValueError(
            f"concurrent must be at most {slots}: trials of {config.workers} worker(s) on the "
            f"cluster's {has:.0f} {'GPU' if gpus else 'CPU'}s; got {wanted}"
        )


def places(request: SweepRequest) -> tuple[int, bool]:
    """Count how many trials run at a time, and whether their workers have GPUs."""
    has, workers = capacity(), request.base.workers
    gpus = has.get("GPU", 0) >= workers  # as pipeline.train chooses
    most = int(has["GPU" if gpus else "CPU"] // workers)
    return min(most, request.concurrent or most), gpus


def answer(log: TrialLog, say: Say) -> None:
    """Draw the front and the rest of the answer from what MLflow has, and log it there."""
    from pipeline.sweep import write_answer

    if not (run := log.tracker.run_id) or log.tracker.problem:
        say("warning: MLflow is away, so no answer is drawn; the same command draws it")
        return
    try:
        written = write_answer(run, log.folder / "answer", log.request.base.tracking_uri or None)
    except ConnectionError as error:
        say(f"warning: no answer is drawn: {error}; the same command draws it")
        return
    log.tracker.upload(log.folder, [str(path.relative_to(log.folder)) for path in written])
    for path in written:
        say(f"answer: {shown(path)}")


def outcome(log: TrialLog) -> str:
    """Lay out how the trials ended."""
    rows = [("trial", "ended", "validation images", "point")]
    for entry in log.entries:
        text = reached(entry.metrics) if "val/sa" in entry.metrics else entry.reason
        rows.append((entry.trial, entry.status, text, words(entry.point)))
    return aligned(rows, left=4)


def failed(log: TrialLog) -> list[TrialRecord]:
    """List the trials that failed."""
    return log.having("failed")


def conclude(log: TrialLog, status: str) -> int:
    """Say what is missing; returns the exit code."""
    for entry in failed(log):
        print(f"failed: [{entry.trial}] {entry.reason}", file=sys.stderr)
    if status == "preempted":
        left = f"{log.left} trial(s)" if log.left else "finalists and answer"
        return fail(f"stopped; {left} left, which the same command continues", PREEMPTED)
    if broken := failed(log):
        return fail(
            f"{len(broken)} of {len(log.entries)} trials failed; the same command tries again", 1
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
