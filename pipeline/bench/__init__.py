"""Speed of the sparse networks against their masked and dense twins: ``python -m pipeline.bench``.

Every variant of a benchmark does the same mathematics on the same images, and all of them run in
turn in one process, so that a busy machine slows all of them: read the ratios, not the seconds.
"""

from collections.abc import Callable

from pipeline.bench.autoattack import autoattack
from pipeline.bench.inference import inference
from pipeline.bench.race import Benchmark
from pipeline.bench.settings import Settings
from pipeline.bench.sorted_mlp import token_routing
from pipeline.bench.step import step
from pipeline.bench.whole_networks import mixture
from pipeline.bench.whole_pipeline import pipeline

BENCHMARKS: dict[str, Callable[[Settings], Benchmark]] = {
    "inference": inference,
    "step": step,
    "mixture": mixture,
    "token_routing": token_routing,
    "autoattack": autoattack,
    "pipeline": pipeline,
}
LONG = ("autoattack", "pipeline")  # run by their name alone
