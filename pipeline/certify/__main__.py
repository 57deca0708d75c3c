"""Certify a trained model: ``python -m pipeline.certify RUN [key=value ...]``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moe.certification.lipschitz_bounds import NoBoundError
from moe.certification.radii import Constants
from moe.certification.smoothing import Smoothing
from moe.network import Network
from pipeline import checkpoint
from pipeline.certify.certificates import (
    DETERMINISTIC,
    KINDS,
    CertificateResult,
    prove,
    sampled,
    smooth,
    summary,
    table,
    write,
)
from pipeline.cli.arguments import fail, main, read_arguments
from pipeline.cli.console import Follower, aligned
from pipeline.config import Config
from pipeline.config.overrides import flatten, override, parse
from pipeline.context import best_device
from pipeline.data.class_names import check_same_classes
from pipeline.data.splits import Images, even_subset
from pipeline.evaluation.find_model import find
from pipeline.evaluation.outcome_cache import digest
from pipeline.seeding import seed_of
from pipeline.storage.sync import storage_root
from pipeline.tracking.open_run import open_run

USAGE = f"""
usage: python -m pipeline.certify RUN [key=value ...] [--help]

Prove, image by image, how far no attack of any kind can change a trained model's answer. RUN is an
MLflow run id, latest (the newest finished run), or a checkpoint folder. Prints certified accuracy
over eps, with what the radii are worth; keeps a table, plots and metrics in a child of the run.

  kind=a,b,...      of {", ".join(KINDS)} (default: theorem,floor,route):
                    theorem    theorem 5.4 of arXiv:2502.06832, L-inf, constants of differences
                    per_class  the same with constants of the classes and the factor of two
                    floor      the same constants, used at each eps again: never less than theorem
                    route      how far the same experts take part, exact for an affine router:
                               says nothing of the answer, which may change on the way
                    smoothing  randomized smoothing (arXiv:1902.02918), L2, of the smoothed model
  images=N          test images, as even over the classes as they are (default: 200)
  sigma=0.25        noise of smoothing; samples=1000 choose=100 alpha=0.001 batch=500
  sampled=false     leave out the search for a lower bound of the constants
  backbone.alpha    of a dual model: weight of the robust half, above 0.5
  evaluation.eps, dataset.path, experiment, storage, tracking_uri as in pipeline.train

A dual model is certified by its robust half. Deep nets with BatchNorm have constants so large that
their radii are true and worth nothing (vacuous): train with norm_bound and backbone=lipschitz, or
smooth a model that was trained with algorithm=gaussian.
"""
WHERE = ("experiment", "storage", "tracking_uri")
KEPT = ("evaluation.eps", "dataset.path", "backbone.alpha", *WHERE)
SMOOTHING = ("sigma", "samples", "choose", "alpha", "batch")


@dataclass(frozen=True, kw_only=True)
class CertificatePlan:
    """What is certified, and how; as in the usage."""

    kinds: tuple[str, ...] = ("theorem", "floor", "route")
    images: int = 200
    sampled: bool = True
    smoothing: Smoothing = Smoothing()


def read_plan(options: Mapping[str, str]) -> CertificatePlan:
    """Read the options that are no settings of a config.

    Raises:
        ValueError: One is out of its range.
    """
    kinds = tuple(options.get("kind", ",".join(CertificatePlan().kinds)).split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kind must be of {', '.join(KINDS)}, got {unknown[0]!r}")
    images = parse("images", options.get("images", 200), int)
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    given = {key: options[key] for key in SMOOTHING if key in options}
    return CertificatePlan(
        kinds=kinds,
        images=images,
        sampled=parse("sampled", options.get("sampled", True), bool),
        smoothing=override(Smoothing(), given),
    )


def run(argv: list[str]) -> int:
    """Read the command line, certify, print; returns the exit code."""
    given = read_arguments(argv, usage=USAGE)
    if not given.names:
        raise ValueError("which run? give an MLflow run id, latest, or a checkpoint folder")
    settings, options = dict(given.settings), ("kind", "images", "sampled", *SMOOTHING)
    plan = read_plan({key: settings.pop(key) for key in options if key in settings})
    if unknown := [key for key in settings if key not in KEPT]:
        raise ValueError(f"no key {unknown[0]!r}, only {', '.join((*options, *KEPT))}")
    where = override(Config(), {k: v for k, v in settings.items() if k in WHERE})
    with tempfile.TemporaryDirectory() as scratch:
        folder, of = find(given.names[0], where, Path(scratch))
        try:
            model = checkpoint.load_model(folder)
        except checkpoint.CheckpointError as error:
            return fail(str(error), 1)
        trained = checkpoint.load_config(folder)
        config = override(trained, {"workers": 1, **settings})
        config = replace(config, name=f"certify {trained.name}")
        if "backbone.alpha" in settings:
            model.alpha = config.backbone.alpha  # type: ignore[attr-defined]
        of = {**of, "weights_sha256": checkpoint.sha256(folder / "model.safetensors")}
        return certify(config, model, plan, of, checkpoint.data_of(folder).get("class_names", ()))


def certify(
    config: Config,
    model: Network,
    plan: CertificatePlan,
    of: Mapping[str, str],
    class_names: Sequence[str] = (),
) -> int:
    """Certify test images of a config, print the tables, and track them; returns the exit code.

    Args:
        class_names: Of the data that the model was trained on; empty: not known.
    """
    try:
        splits = config.dataset.load(config.seed)
    except ValueError as error:
        return fail(str(error), 1)
    check_same_classes("the checkpoint", class_names, "the dataset", splits.class_names)
    test = splits.test
    if plan.images < len(test):
        test = test.pick(even_subset(test.labels_N, plan.images, config.seed))
    follower, began = Follower(), time.monotonic()
    found, metrics, excuse = make(config, model, plan, test, follower)
    if not found:
        return fail(f"nothing to certify: {excuse}", 1)
    took = time.monotonic() - began
    metrics |= summary(found, config.evaluation.eps)
    follower.say(f"\n{config.name}: {len(test)} test images, {took:.0f} s")
    follower.say(
        f"certified accuracy in percent, 95% intervals over images\n{aligned(table(found))}"
    )
    follower.say(aligned(status_rows(found)))
    track(config, plan, found, metrics, test, follower, of)
    return 0


def make(
    config: Config, model: Network, plan: CertificatePlan, test: Images, follower: Follower
) -> tuple[dict[str, CertificateResult], dict[str, float], str]:
    """Make the certificates; a kind that does not apply is left out, and said."""
    found: dict[str, CertificateResult] = {}
    metrics: dict[str, float] = {}
    excuse = ""
    if kinds := [kind for kind in plan.kinds if kind in DETERMINISTIC]:
        try:
            proven, found = prove(model, test, kinds)
            metrics = tell_constants(proven, model, plan, test, follower)
        except NoBoundError as error:
            excuse = str(error)
            follower.say(f"not applicable: {', '.join(kinds)}: {excuse}")
    if "smoothing" in plan.kinds:
        began = time.monotonic()

        def tell(done: int, of: int) -> None:
            spent = time.monotonic() - began
            follower.handle(
                {"kind": "judging", "what": "smoothing", "done": done, "of": of, "seconds": spent}
            )

        seed = seed_of(config.seed, "test")
        settings = {"seed": seed, "device": best_device(), "tell": tell}
        found["smoothing"] = smooth(model.float(), test, plan.smoothing, **settings)  # type: ignore[arg-type]
        follower.close()
    return found, metrics, excuse


def tell_constants(
    proven: Constants, model: Network, plan: CertificatePlan, test: Images, follower: Follower
) -> dict[str, float]:
    """Print the constants, and say what a margin could certify at most with them."""
    worst = float(proven.logits_EKK.amax())
    metrics = {"constant/logits": worst, "constant/scores": float(proven.scores_EE.amax())}
    follower.say(f"certified constants (L-inf, differences): logits {worst:.4g}")
    if len(proven.scores_EE) > 1:
        kind = "exact" if proven.router_ED is not None else "bounds"
        follower.say(f"router scores {metrics['constant/scores']:.4g} ({kind})")
    if plan.sampled:
        metrics["constant/logits_sampled"] = least = sampled(model, test, proven)
        follower.say(f"sampled, which certifies nothing: logits at least {least:.4g} near 8 images")
    return metrics


def status_rows(found: Mapping[str, CertificateResult]) -> list[tuple[str, ...]]:
    """Count what the radii are worth, one row a kind."""
    marks = list(dict.fromkeys(str(mark) for one in found.values() for mark in one.status_N))
    rows = [("images that are", *marks)]
    for kind, one in found.items():
        rows.append((kind, *(str([str(m) for m in one.status_N].count(mark)) for mark in marks)))
    return rows


def track(
    config: Config,
    plan: CertificatePlan,
    found: Mapping[str, CertificateResult],
    metrics: Mapping[str, float],
    test: Images,
    follower: Follower,
    tags: Mapping[str, str],
) -> None:
    """Write table and plots, and a run in MLflow that continues where these settings were."""
    key = json.dumps([flatten(config), dict(tags), asdict(plan)], sort_keys=True)
    root = storage_root(config.storage) / config.experiment
    home = root / f"{config.name}-{digest(key)[:8]}"
    tracker = open_run(config, home, tags)
    write(found, test, home)
    settings = {"config": flatten(config), "certificate": asdict(plan)}
    (home / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tracker.handle({"kind": "metrics", "step": 0, "values": dict(metrics)})
    tracker.handle({"kind": "artifacts", "folder": str(home)})
    tracker.upload(home, ["certificates.csv"], timeout=20)
    if not tracker.close("finished"):
        follower.say("warning: MLflow does not have everything yet; the same command sends it")
    follower.say(f"run {tracker.run_id}; table and plots in {home}")
    follower.say(f"see it with: {tracker.ui_hint()}")


if __name__ == "__main__":
    sys.exit(main(run))
