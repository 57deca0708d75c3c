"""Export a trained model: ``python -m pipeline.export RUN [to=FOLDER] [form=a,b]``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe.network import Network
from pipeline import checkpoint
from pipeline.checkpoint import drafted
from pipeline.cli.arguments import fail, main, read_arguments
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.data.splits import even_subset
from pipeline.evaluation.find_model import find
from pipeline.evaluation.plan import WHERE
from pipeline.export.agreement import (
    ATTACKED,
    Agreement,
    DisagreementError,
    check_agreement,
    check_outputs,
)
from pipeline.export.folder import (
    DEFAULT_FORMS,
    FORMS,
    load_forms,
    write_card,
    write_programs,
)
from pipeline.nearest_names import unknown

USAGE = f"""
usage: python -m pipeline.export RUN [key=value ...] [--help]

Write a trained model as a folder that stands alone, attack what was written, and refuse it unless
outputs, routes and accuracy under PGD-50 and forced routes agree with the network's. RUN is an
MLflow run id, latest (the newest finished run), or a checkpoint folder.

  to=FOLDER        where to (default: exports/NAME); replaced if it is there
  form=a,b,...     of {", ".join(FORMS)} (default: {",".join(DEFAULT_FORMS)})
                   sorted: torch.export programs of router and experts, for batches
                   gathered: one torch.export program, for single images
                   compiled: as sorted, compiled for this machine by AOTInductor
                   onnx: as sorted, checked with onnxruntime
  dataset.path, experiment, tracking_uri as in pipeline.train
"""


def run(argv: list[str]) -> int:
    """Read the command line, export, check; returns the exit code."""
    given = read_arguments(argv, usage=USAGE)
    if not given.names:
        raise ValueError("which run? give an MLflow run id, latest, or a checkpoint folder")
    settings = dict(given.settings)
    to, forms = settings.pop("to", ""), settings.pop("form", ",".join(DEFAULT_FORMS)).split(",")
    for form in forms:
        if form not in FORMS:
            raise unknown("form", form, FORMS)
    known = ("to", "form", "dataset.path", *WHERE)
    for key in settings:
        if key not in known:
            raise unknown("key", key, known)
    here = {key: value for key, value in settings.items() if key in WHERE}
    with tempfile.TemporaryDirectory() as scratch:
        source, _ = find(given.names[0], override(Config(), here), Path(scratch))
        try:
            meta, model = checkpoint.verify(source), checkpoint.load_model(source)
        except checkpoint.CheckpointError as error:
            return fail(str(error), 1)
        config = checkpoint.load_config(source)
        own = {key: value for key, value in settings.items() if key == "dataset.path"}
        config = override(config, own)
        folder = Path(to or f"exports/{config.name}").resolve()
        if folder.exists() and not (folder / "load.py").exists():
            raise ValueError(f"to must be a new folder or an earlier export, got {to!r}")
        try:
            found = export(config, model, folder, forms, stage=meta.get("stage", -1))
        except (DisagreementError, DataError, checkpoint.CheckpointError) as error:
            return fail(f"no export: {error}", 1)
    accuracy = ", ".join(f"{name} {value:.4f}" for name, value in found.exported.items())
    _say(f"exported to {folder}: {accuracy}; logits within {found.gap:.1e} of the network's")
    return 0


class DataError(Exception):
    """The images to attack cannot be read."""


def export(
    config: Config, model: Network, folder: Path, forms: Sequence[str], *, stage: int
) -> Agreement:
    """Write a folder and attack what was written; it appears whole and checked, or not at all.

    Raises:
        DisagreementError: The exported model differs from the network.
        DataError: The images to attack cannot be read.
        ValueError: No form that can be attacked was asked for, or could be written.
    """
    if not {"sorted", "gathered"} & set(forms):
        raise ValueError("form must name sorted or gathered too: these are attacked")
    try:
        splits = config.dataset.load(config.seed)
    except ValueError as error:
        raise DataError(str(error)) from error
    images, found, gaps = splits.test, None, list[float]()
    if len(images) > ATTACKED:
        images = images.pick(even_subset(images.labels_N, ATTACKED, config.seed))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with drafted(folder) as draft:
        draft.mkdir()
        labels = splits.class_names
        write_programs(draft, config, model, forms, labels=labels, stage=stage, say=_say)
        for exported in load_forms(draft):
            if exported.form == "compiled":  # has no gradient
                gaps.append(check_outputs(model, exported, images))
                continue
            _say(f"attacking form {exported.form} on {len(images)} test images")
            result = check_agreement(model, exported, images, config.evaluation, seed=config.seed)
            found = found or result
            gaps.append(result.gap)
        if found is None:
            raise ValueError("neither sorted nor gathered could be written: these are attacked")
        found = replace(found, gap=max(gaps))  # of all forms
        write_card(draft, config, found)
    return found


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(run))
