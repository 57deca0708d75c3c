"""Registers the best trials of a sweep as models: ``python -m pipeline.tune promote PARENT``."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.cli.arguments import fail, read_arguments
from pipeline.nearest_names import unknown
from pipeline.sweep.trial_tables import number
from pipeline.sweep.trials import Objective, Sweep, Trial, competing, is_share, read_sweep
from pipeline.tracking import download, log_torch_model, open_client, resolve_uri

USAGE = """
usage: python -m pipeline.tune promote PARENT|latest [key=value ...]

Register the best trial of a sweep for each of its objectives as a version of a model in MLflow,
under an alias (best-sa, best-ra, best-gmac, ...). Promoted again, it is the same version.

  objective=sa|ra|gmac|...  for this objective alone
  trial=N       this trial, whatever it reached
  name=NAME     of the registered model (default: robust-moe-SPACE)
  alias=ALIAS   of the version (default: best-OBJECTIVE, trial-N); for one objective or trial
  experiment    in which latest is looked for (default: robust-moe)
  tracking_uri  MLflow (default: MLFLOW_TRACKING_URI, else mlflow.db in the working directory)
"""
KEYS = ("objective", "trial", "name", "alias", "experiment", "tracking_uri")


@dataclass(frozen=True)
class Choice:
    """A trial to promote, under which alias, and why."""

    trial: Trial
    alias: str
    why: str


def main(argv: list[str]) -> int:
    """Read the command line, register, print; returns the exit code.

    Raises:
        ValueError: An argument is not valid, or there is no such sweep.
    """
    given = read_arguments(argv, usage=USAGE)
    if not given.names:
        raise ValueError("which sweep? give the run id of its parent run, or latest")
    settings = dict(given.settings)
    if wrong := [key for key in settings if key not in KEYS]:
        raise unknown("key", wrong[0], KEYS)
    uri = resolve_uri(settings.get("tracking_uri"))
    try:
        sweep = read_sweep(uri, given.names[0], settings.get("experiment", "robust-moe"))
        name = settings.get("name", f"robust-moe-{sweep.space or 'sweep'}")
        check_name("name", name)
        for choice in choices(sweep, settings):
            version = register(uri, sweep, choice, name)
            print(
                f"{name} version {version} @{choice.alias}: trial {choice.trial.number}, "
                f"{choice.why}; load it: models:/{name}@{choice.alias}"
            )
    except (UnfitError, ConnectionError) as error:
        return fail(str(error), 1)
    return 0


class UnfitError(RuntimeError):
    """A trial cannot be promoted."""


def choices(sweep: Sweep, settings: dict[str, str]) -> list[Choice]:
    """Choose the trials to promote.

    Raises:
        ValueError: There is no such objective or trial, or an alias is given for several.
        UnfitError: The trial is not finished, or none is.
    """
    if "trial" in settings and "objective" in settings:
        raise ValueError("give objective or trial, not both")
    alias = settings.get("alias")
    if alias is not None:
        check_alias(alias)
    if "trial" in settings:
        known = {trial.number: trial for trial in sweep.trials}
        if (trial := known.get(settings["trial"])) is None:
            raise ValueError(f"trial must be one of {', '.join(known)}, got {settings['trial']!r}")
        if trial.status != "finished":
            raise UnfitError(
                f"trial {trial.number} is {trial.status}: only a finished one is promoted"
            )
        return [Choice(trial, alias or f"trial-{trial.number}", "as asked for")]
    axes = {axis.key: axis for axis in sweep.axes}
    if (wanted := settings.get("objective")) is not None:
        if wanted not in axes:
            raise ValueError(f"objective must be one of {', '.join(axes)}, got {wanted!r}")
        axes = {wanted: axes[wanted]}
    elif alias is not None and len(axes) > 1:
        raise ValueError(f"alias={alias} needs an objective, one of {', '.join(axes)}")
    able, notes = competing(sweep)
    if not able:
        counts = ", ".join(f"{n} {status}" for status, n in sweep.counts.items()) or "no trials"
        raise UnfitError(" ".join([f"no finished trial to promote: {counts}.", *notes]))
    return [best(sweep, able, axis, alias or f"best-{key}") for key, axis in axes.items()]


def best(sweep: Sweep, able: list[Trial], aim: Objective, alias: str) -> Choice:
    """Choose the best trial for an objective; ties go by the other axes, then to the earlier."""
    axes = [aim, *(axis for axis in sweep.axes if axis != aim)]

    def score(trial: Trial) -> list[float]:
        values = [(axis, trial.value(axis.metric)) for axis in axes]
        return [axis.score(value) for axis, value in values if value is not None]

    trial = max(able, key=score)
    side = "highest" if aim.mode == "max" else "lowest"
    why = f"{side} {aim.title} of {len(able)} trials: {number(trial, aim.metric)}"
    split = f" of the {sweep.split} split" if is_share(aim.metric) else ""
    return Choice(trial, alias, why + split)


def check_alias(alias: str) -> None:
    """Refuse what MLflow does not take for an alias."""
    taken = alias.lower() == "latest" or re.fullmatch(r"v\d+", alias.lower())
    if taken or not re.fullmatch(r"[\w-]{1,255}", alias, re.ASCII):
        raise ValueError(
            "alias must be letters, digits, - and _, not latest nor a version like v1, "
            f"got {alias!r}"
        )


def check_name(key: str, name: str) -> None:
    """Refuse what cannot be a model's name in a models:/ URI."""
    if not name or any(sign in name for sign in "/:@") or not name.isprintable():
        raise ValueError(f"{key} must be printable and without / : @, got {name!r}")


def register(uri: str, sweep: Sweep, choice: Choice, name: str) -> str:
    """Make a trial's model a version of a registered model, once; return the version.

    Raises:
        UnfitError: The trial left no model.
        ConnectionError: The server does not answer, or refuses.
    """
    try:
        client = open_client(uri)
        ensure_registered(client, name)
        run_id = choice.trial.run.run_id
        known = client.search_model_versions(f"name = '{name}'")
        own = [version for version in known if version.run_id == run_id]
        if own:
            version = str(max(int(version.version) for version in own))
        else:
            model_id = logged_model(client, uri, choice.trial)
            with process_tracks(uri):
                made = client.create_model_version(
                    name,
                    f"models:/{model_id}",
                    run_id=run_id,
                    model_id=model_id,
                    tags={"sweep": sweep.parent.run_id, "trial": choice.trial.number},
                    description=f"Trial {choice.trial.number} of {sweep.space}: {choice.why}.",
                )
            version = str(made.version)
        client.set_registered_model_alias(name, choice.alias, version)
        return version
    except (UnfitError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(f"MLflow does not register {name}: {error}") from error


@contextmanager
def process_tracks(uri: str) -> Iterator[None]:
    """Make a URI the process' own for a while: by it MLflow resolves models:/ even for a client."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def ensure_registered(client: Any, name: str) -> None:
    """Make the registered model, unless it is there."""
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise


def logged_model(client: Any, uri: str, trial: Trial) -> str:
    """Return the id of the model that a trial logged; else log one from its best checkpoint."""
    record = client.get_run(trial.run.run_id)
    found = client.search_logged_models(
        [record.info.experiment_id], f"source_run_id = '{trial.run.run_id}'"
    )
    ready = [model for model in found if getattr(model.status, "value", model.status) == "READY"]
    if ready:
        return str(max(ready, key=lambda model: model.creation_timestamp).model_id)
    return str(log_from_checkpoint(client, uri, trial)).rpartition("/")[2]


def log_from_checkpoint(client: Any, uri: str, trial: Trial) -> str:
    """Log the model of a trial's best checkpoint, as the end of a run does; return its URI."""
    import torch

    from moe.sorted_graph import loggable

    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = download(uri, trial.run.run_id, "checkpoints/best", Path(scratch), "")
            logits, classifier = loggable(checkpoint.load_model(folder))
            labels = checkpoint.class_names_of(folder)
            config = checkpoint.load_config(folder)
        except (ValueError, checkpoint.CheckpointError) as error:
            raise UnfitError(f"trial {trial.number} left no model to promote: {error}") from error
    size = config.dataset.image_size
    generator = torch.Generator().manual_seed(config.seed)
    example_BCHW = torch.rand(4, 3, size, size, generator=generator).numpy()
    return log_torch_model(
        uri,
        trial.run.run_id,
        logits,
        example_BCHW,
        "model",
        classifier=classifier,
        labels=labels,
    )
