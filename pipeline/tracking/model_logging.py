"""A trained model for MLflow: written down as a folder first, and sent when the server is there."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking.client import mlflow_client

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


def write_model(
    folder: Path,
    module: "nn.Module",
    example_BCHW: "np.ndarray",
    *,
    classifier: "nn.Module | None" = None,
    labels: Sequence[str] = (),
) -> None:
    """Write a module as a traced graph that takes any batch size, whole or not at all.

    Args:
        classifier: Maps images to logits and route. With it the ``pyfunc`` flavour takes pixels or
            encoded images and answers label, class, probabilities and route; without it arrays,
            and it answers the module's output.
        labels: Names of the classes that the classifier tells apart.

    Raises:
        Exception: torch.export cannot trace it.
    """
    mlflow_client()
    import mlflow.pytorch
    import numpy as np
    import torch

    with torch.no_grad():
        logits_BK = module(torch.from_numpy(example_BCHW)).numpy()
    versions = {"torch": torch.__version__, "mlflow": mlflow.__version__, "numpy": np.__version__}
    if classifier is not None:
        versions |= {name: version(name) for name in ("pandas", "pillow")}
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with warnings.catch_warnings():  # torch's archive writer warns of shared storage
            warnings.simplefilter("ignore", UserWarning)
            mlflow.pytorch.save_model(
                module,
                path=draft,
                serialization_format="pt2",
                input_example=example_BCHW,
                signature=mlflow.models.infer_signature(example_BCHW, logits_BK),
                pip_requirements=[f"{k}=={v.split('+')[0]}" for k, v in versions.items()],
            )
            if classifier is not None:
                _add_image_flavour(draft, classifier, example_BCHW, labels)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _add_image_flavour(
    folder: Path, classifier: "nn.Module", example_BCHW: "np.ndarray", labels: Sequence[str]
) -> None:
    """Give a written model the ``pyfunc`` flavour of ``image_pyfunc``, with its signature."""
    import torch
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    home, code = folder / "classifier", folder / "code"
    home.mkdir()
    code.mkdir()
    auto = torch.export.Dim.AUTO
    example = (torch.from_numpy(example_BCHW),)
    with torch.no_grad():
        program = torch.export.export(classifier, example, dynamic_shapes=[{0: auto}])
    torch.export.save(program, home / "classifier.pt2")
    facts = {"image_size": example_BCHW.shape[-1], "labels": list(labels)}
    (home / "facts.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("image_pyfunc.py"), code / "image_pyfunc.py")
    model = Model.load(str(folder))
    env = model.flavors.pop("python_function")["env"]
    pyfunc.add_to_model(
        model,
        loader_module="image_pyfunc",
        data=home.name,
        code=code.name,
        conda_env=env["conda"],
        python_env=env["virtualenv"],
    )
    pixels_CHW = Array(Array(Array(DataType.double)))
    model.signature = ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.binary, "image", required=False),
                ColSpec(pixels_CHW, "pixels", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(DataType.long, "label"),
                ColSpec(DataType.string, "class"),
                ColSpec(Array(DataType.double), "probabilities"),
                ColSpec(Array(DataType.long), "route"),
            ]
        ),
    )
    model.saved_input_example_info = None  # it is one of the other flavour
    for file in folder.glob("*input_example*"):
        file.unlink()
    model.save(str(folder / "MLmodel"))


def log_torch_model(
    uri: str,
    run_id: str,
    module: "nn.Module",
    example_BCHW: "np.ndarray",
    name: str,
    *,
    classifier: "nn.Module | None" = None,
    labels: Sequence[str] = (),
) -> str:
    """Log a module at once, as a traced graph that takes any batch size; return the model's URI."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / name
        write_model(home, module, example_BCHW, classifier=classifier, labels=labels)
        return send_model(mlflow_client()(uri), run_id, Path(folder) / name)


def send_model(client: Any, run_id: str | None, folder: Path) -> str:
    """Log a written model under its folder's name, once for a run, however often it is asked.

    Returns its URI.

    The steps of ``mlflow.pytorch.log_model`` without its globals: a record that is pending, the
    files, then the record ready. A record that an earlier attempt left pending is used again.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    written = Model.load(str(folder))
    run = client.get_run(run_id)
    experiment, name = run.info.experiment_id, folder.name
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    records = [record for record in found if record.name == name]
    for record in records:
        if record.status == LoggedModelStatus.READY:
            return str(record.model_uri)
    record = records[0] if records else None
    if record is None:
        record = client.create_logged_model(
            experiment, name, source_run_id=run_id, params=run.data.params
        )
    if record.model_id not in {output.model_id for output in run.outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(record.model_id, step=0)])
    written.model_id, written.run_id = record.model_id, run_id
    written.artifact_path = record.artifact_location
    written.save(str(folder / "MLmodel"))
    client.log_model_artifacts(record.model_id, str(folder))
    return str(client.finalize_logged_model(record.model_id, LoggedModelStatus.READY).model_uri)
