"""Questions about sparse models under attack (arXiv:2210.10253), each one command: QUESTIONS."""

from collections.abc import Callable, Sequence

from pipeline.study.compute_and_experts import compute, experts
from pipeline.study.findings import StudyResult
from pipeline.study.linear_experts import theory
from pipeline.study.routing_under_attack import replace_experts, routing
from pipeline.study.sampled_lipschitz import lipschitz
from pipeline.study.subjects import StudySettings, Subject

Question = Callable[[Sequence[Subject], StudySettings], StudyResult]
QUESTIONS: dict[str, Question] = {
    "compute": compute,
    "experts": experts,
    "routing": routing,
    "replace": replace_experts,
    "lipschitz": lipschitz,
    "theory": theory,
}
