"""Answer a question about trained models: ``python -m pipeline.study QUESTION [RUN ...]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moe.fold_batchnorm import fold
from pipeline import checkpoint
from pipeline.cli.arguments import main, read_arguments
from pipeline.cli.console import Follower
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.distributed.driver import train
from pipeline.evaluation.find_model import find
from pipeline.evaluation.outcome_cache import digest
from pipeline.nearest_names import unknown
from pipeline.presets import PRESETS
from pipeline.storage.run_folder import run_folder
from pipeline.storage.sync import storage_root
from pipeline.study import QUESTIONS
from pipeline.study.compute_and_experts import compute_variants, experts_variants
from pipeline.study.findings import StudyResult
from pipeline.study.subjects import StudySettings, Subject, shortened
from pipeline.tracking import EVALUATED
from pipeline.tracking.open_run import open_run

USAGE = """
usage: python -m pipeline.study QUESTION [RUN ...] [key=value ...] [--list]

Answer a question about sparse models under attack; writes a table (CSV, Markdown) and a plot, and
tracks them in one MLflow run. A run is an MLflow run id, latest, or a checkpoint folder.

  compute    accuracy over eps of a mixture and of dense nets of equal MACs and equal parameters
  experts    the same over the number of experts and of experts per token
  routing    how routes change under attack, layer by layer; boundary mass; load of the experts
  replace    experts replaced by the next ranks, by random ones, by those of other images, or alone
  lipschitz  constants of a mixture, its experts and its twin; jumps at routing boundaries
  theory     linear experts against closed forms; takes no runs

compute and experts train what is missing where no run is given: variants of preset=, with the
settings of pipeline.train (epochs=1, dataset.train_images=2000, ...).

  images=500          test images              eps=1,2,4,8   radii in 255ths
  steps=40            of each attack           seeds=1       trainings of each variant
  attack=clipped      or released: that of the reference, which leaves [0, 1]
  num_experts=1,2,4   of experts and theory    top_k=1,2     of experts
  preset=NAME         what is trained (default: vmoe_cifar10_small)
  dataset.path, storage, tracking_uri, experiment as in pipeline.train
"""
OWN = tuple(field.name for field in fields(StudySettings))
MANY: dict[str, type] = {"eps": float, "num_experts": int, "top_k": int}


def run(argv: list[str]) -> int:
    """Read the command line, load or train, study, write and track; returns the exit code."""
    given = read_arguments(argv, usage=USAGE, flags=("--list",), most_names=64)
    if "--list" in given.flags:
        print("\n".join(QUESTIONS))
        return 0
    if not given.names:
        raise ValueError(f"which question? one of {', '.join(QUESTIONS)}")
    question, *runs = given.names
    if question not in QUESTIONS:
        raise unknown("question", question, QUESTIONS)
    settings = read_settings({k: v for k, v in given.settings.items() if k in OWN})
    others = {k: v for k, v in given.settings.items() if k not in OWN}
    if settings.preset not in PRESETS:
        raise unknown("preset", settings.preset, PRESETS)
    base, follower = override(PRESETS[settings.preset](), others), Follower()
    if question == "theory":
        subjects: list[Subject] = []
    elif runs:
        subjects = [load(name, base, others, settings) for name in runs]
    elif question in ("compute", "experts"):
        subjects = trained(question, base, settings, follower)
    else:
        raise ValueError(f"{question} needs one or more runs")
    found = QUESTIONS[question](subjects, settings)
    keep(question, found, base, [subject.name for subject in subjects], settings, follower)
    return 0


def read_settings(given: dict[str, str]) -> StudySettings:
    """Read the study's own settings.

    Raises:
        ValueError: A value is not of its type, or out of its range.
    """
    values: dict[str, Any] = {}
    for key, text in given.items():
        kind = MANY.get(key) or type(getattr(StudySettings(), key))
        try:
            parts = [kind(part) for part in str(text).split(",")]
        except ValueError:
            raise ValueError(f"{key} must be of type {kind.__name__}, got {text!r}") from None
        values[key] = tuple(parts) if key in MANY else parts[0]
    return StudySettings(**values)


def load(
    name: str, where: Config, changes: dict[str, str], settings: StudySettings, variant: str = ""
) -> Subject:
    """Load a run's model and test images.

    Raises:
        ValueError: There is no such run, or its images are not there.
    """
    with TemporaryDirectory() as scratch:
        folder, of = find(name, where, Path(scratch))
        model, config = checkpoint.load_model(folder), checkpoint.load_config(folder)
    data = {k: v for k, v in changes.items() if k.startswith("dataset.")}
    images = override(config, data).dataset.load(config.seed).test
    label = variant or f"{config.name} ({Path(of[EVALUATED]).name[:8]})"
    return Subject(label, fold(model), config, shortened(images, settings.images), variant)


def trained(
    question: str, base: Config, settings: StudySettings, follower: Follower
) -> list[Subject]:
    """Train the variants that a question compares, or continue or reuse what is there.

    Raises:
        RuntimeError: A training failed.
    """
    if question == "compute":
        wanted = compute_variants(base, settings.seeds)
    else:
        wanted = experts_variants(base, settings)
    subjects = []
    for variant, configs in wanted.items():
        for config in configs:
            best = run_folder(config) / "checkpoints" / "best"
            if code := train(config, follower=follower, tags={"study": question}):
                raise RuntimeError(f"training {config.name} ended with code {code}")
            subjects.append(load(str(best), config, {}, settings, variant))
    return subjects


def keep(
    question: str,
    found: StudyResult,
    base: Config,
    runs: Sequence[str],
    settings: StudySettings,
    follower: Follower,
) -> None:
    """Write table and plot, print the table, and track all in one MLflow run."""
    asked = digest(json.dumps([question, list(runs), str(settings), base.fingerprint]))[:8]
    folder = storage_root(base.storage) / base.experiment / f"study {question}-{asked}"
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    found.write_csv(folder / f"{question}.csv")
    (folder / f"{question}.md").write_text(found.markdown(), "utf-8")
    found.plot(folder / "plots" / f"{question}.png")
    tags = {"study": question, "study_runs": " ".join(runs), "study_settings": str(settings)}
    tracker = open_run(replace(base, name=f"study {question}"), folder, tags)
    tracker.upload(folder, [f"{question}.csv", f"{question}.md", "plots"])
    if not tracker.close("finished"):
        follower.say("warning: MLflow does not have everything yet; the same command sends it")
    follower.say(found.markdown())
    follower.say(f"run {tracker.run_id}; table and plot in {folder}")
    follower.say(f"see it with: {tracker.ui_hint()}")


if __name__ == "__main__":
    sys.exit(main(run))
