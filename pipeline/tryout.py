"""The end of a trial: the best model, judged on the validation split; the test split stays shut."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.config import Config, flatten
from pipeline.data.loading import Splits
from pipeline.examine import main_job
from pipeline.measures.judging import judge, summarize
from pipeline.measures.tiers import TIERS, measures_of
from pipeline.seeding import seed_of
from pipeline.session import Session

TIER = TIERS["smoke"]


def tryout(
    config: Config,
    folder: Path,
    session: Session,
    splits: Splits,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Judge the best checkpoint by the smoke tier's attacks, a forced route among them.

    Takes the place of ``final.finish`` for models that are to be compared: whoever chooses by test
    images has none left to report. What it finds is the last point of ``val/sa`` and ``val/ra``
    (PGD with the tier's steps in place of the epochs' shorter attack), and ``val/ra_forced`` and
    ``val/ra_worst``.
    """
    best = folder / "checkpoints" / "best"
    model = checkpoint.load_model(best).to(session.device)
    steps = min(TIER.steps or config.evaluation.steps, config.evaluation.steps)
    threat, experts = replace(config.evaluation, steps=steps), config.backbone.num_experts
    measures = measures_of(TIER.measures, threat, num_experts=experts)
    job, began = main_job(config, splits.validation, TIER, measures), time.monotonic()

    def tell(done: int, of: int, measure: str) -> None:
        session.tell("judging", done=done, of=of, seconds=time.monotonic() - began)

    verdicts = judge(
        model,
        job.images,
        job.measures,
        seed=seed_of(config.seed, "validation"),
        device=session.device,
        rank=session.rank,
        world=session.world,
        total=session.total,
        tell=tell,
        ids_N=job.ids_N,
    )
    found = summarize(verdicts, experts, "val")
    metrics = {name.replace(f"val/ra_pgd{steps}", "val/ra"): v for name, v in found.items()}
    metrics["val/images"] = float(len(job.images))
    if session.rank == 0:
        (folder / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
        session.tell("metrics", step=int(history[-1]["step"]) + 1, values=metrics)
        session.tell("artifacts", folder=str(folder))
    session.wait()
    return metrics
