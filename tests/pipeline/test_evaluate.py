"""The evaluate command on a checkpoint that the loop made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from moe.fold_batchnorm import fold
from pipeline import evaluate, loop
from pipeline.attacks.pgd import PGD
from pipeline.checkpoint import load_config, load_model
from pipeline.config.overrides import override
from pipeline.data.augmentation import to_float
from pipeline.evaluation import plan
from pipeline.measures import Transfer
from pipeline.measures.sanity.verdict import Status
from pipeline.measures.substitute import train_substitute
from pipeline.presets import PRESETS
from pipeline.seeding import ImageNoise

ROOT = Path(__file__).parents[2]


def trained(folder: Path, **changes: Any) -> Path:
    """Train a small model in seconds; return its best checkpoint."""
    settings = {
        "dataset": "synthetic",
        "dataset.size": 8,
        "dataset.train_images": 64,
        "dataset.test_images": 24,
        "batch_size": 32,
        "workers": 1,
        "epochs": 1,
        "evaluation.steps": 2,
        "evaluation.validation_steps": 1,
    }
    loop.fit(override(PRESETS["quickstart"](), settings | changes), folder)
    return folder / "checkpoints" / "best"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture that gets most images right."""
    return trained(tmp_path_factory.mktemp("taught"), algorithm="standard", epochs=8)


@pytest.fixture(scope="module")
def dense_twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = {"backbone.num_experts": 1, "backbone.ratio": 1}
    return trained(tmp_path_factory.mktemp("dense"), algorithm="standard", epochs=8, **dense)


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prints_every_measure_and_tracks_it(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.run([str(checkpoint), "evaluation.steps=3"]) == 0
    out = capsys.readouterr().out
    for name in ("sa", "ra_pgd3", "ra_pgd3_margin", "ra_forced", "ra_worst"):
        assert f"test/{name} " in out
    assert (at_home / "mlflow.db").exists()


def test_a_measure_can_be_asked_for_alone(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.run([str(checkpoint), "measure=sa,ra_forced", "dataset.test_images=8"]) == 0
    out = capsys.readouterr().out
    assert "8 test images" in out
    assert "ra_pgd" not in out


def test_refuses_a_checkpoint_with_a_flipped_byte(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    damaged = at_home / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert evaluate.run([str(damaged)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which run"),
        (["latest"], "no tracking database"),
        (["x", "tier=extreme"], "tier must be one of smoke, standard, full, got 'extreme'"),
        (["x", "measure=luck"], "measure must be of sa, .*, got 'luck'"),
        (["x", "lr=1"], "no key 'lr'"),
        (["x", "batch=0"], "batch must be at least 1, got 0"),
        (["x", "cascade=perhaps"], "cascade must be true or false, got 'perhaps'"),
    ],
)
def test_bad_input_says_what_is_valid(at_home: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.run(arguments)


FAST = ("measure=sa,ra_pgd,ra_forced", "checks=true")


def table(out: str) -> list[str]:
    """The rows of the printed table that are numbers of the model."""
    return [line for line in out.splitlines() if line.startswith((" test/", " route/"))]


def test_two_shards_give_the_numbers_of_one(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, cards = [], []
    for workers in (1, 2):
        command = [str(checkpoint), *FAST, f"workers={workers}", "reuse=false"]
        assert evaluate.run(command) == 0
        out = capsys.readouterr().out
        tables.append(table(out))
        home = next(line for line in out.splitlines() if "card and plots in" in line)
        card = (Path(home.split(" plots in ")[1]) / "card.md").read_text()
        cards.append(card[: card.index("## Conditions")])
        assert "reused 0 of" in out
    assert tables[0] == tables[1]
    assert cards[0] == cards[1], "the checks are of the same outcomes"
    assert any("ra_worst" in line for line in tables[0])


def test_repeated_evaluation_attacks_nothing_and_says_the_same(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = []
    for _ in range(2):
        assert evaluate.run([str(checkpoint), *FAST, "corruptions=true"]) == 0
        outs.append(capsys.readouterr().out)
    first, second = (re.search(r"reused ([\d,]+) of ([\d,]+) outcomes", out) for out in outs)
    assert first is not None
    assert second is not None
    assert int(first[1]) < int(first[2]), "the checks share an attack with the table"
    assert second[1] == second[2] == first[2]
    assert table(outs[0]) == table(outs[1])
    assert "verdict: " in outs[1]
    assert "corruption/mean" in outs[1]
    assert re.search(r"^ra_pgd2: 24 images in \d+ s, [\d.e+]+ images/s$", outs[0], re.MULTILINE)
    assert re.search(r"^ra_pgd2: all 24 outcomes are known from before$", outs[1], re.MULTILINE)
    assert re.search(r"ra_pgd2 +│ +24 │ +0 │ +[\d.]+ │ +[\d.]+", outs[0]), "seconds and images/s"
    (run,) = children(at_home)
    assert run.data.tags["verdict"] in get_args(Status)
    assert "verdict_why" in run.data.tags
    assert {"check/logits", "time/ra_pgd2", "pace/ra_pgd2"} <= run.data.metrics.keys()
    files = {file.path for file in client(at_home).list_artifacts(run.info.run_id)}
    assert {"card.md", "claim.json", "plots", "config.json"} <= files


def client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{home}/mlflow.db")


def children(home: Path) -> list[Any]:
    experiment = client(home).get_experiment_by_name("robust-moe")
    return list(client(home).search_runs([experiment.experiment_id]))


def test_evaluation_killed_half_way_costs_only_the_other_half(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real process, SIGKILL, and the same command again."""
    command = [
        str(checkpoint),
        "measure=sa,ra_pgd,ra_forced_apgd",
        "batch=2",
        "evaluation.steps=60",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.evaluate", *command],
        cwd=at_home,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    outcomes = at_home / "runs" / "robust-moe" / "outcomes"
    deadline = time.monotonic() + 300
    while len(list(outcomes.rglob("*.parquet"))) < 14 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert evaluate.run(command) == 0
    out = capsys.readouterr().out
    found = re.search(r"reused ([\d,]+) of ([\d,]+) outcomes", out)
    assert found is not None
    assert 2 * 14 <= int(found[1]) < int(found[2]) == 3 * 24
    assert evaluate.run([*command, "reuse=false"]) == 0
    assert table(capsys.readouterr().out) == table(out)


def test_cascade_gives_the_worst_case_alone(
    checkpoint: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = []
    for cascade in ("false", "true"):
        command = [str(checkpoint), "measure=sa,ra_pgd,ra_forced,ra_noise", "reuse=false"]
        assert evaluate.run([*command, f"cascade={cascade}"]) == 0
        outs.append(table(capsys.readouterr().out))
    rows = [{line.split()[0]: line for line in out} for out in outs]
    assert rows[0]["test/ra_worst"] == rows[1]["test/ra_worst"]
    assert "test/ra_noise" not in rows[1]


def test_images_made_on_another_run_count_into_the_worst_case(
    taught: Path, dense_twin: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for source in (dense_twin, dense_twin, taught):
        command = [str(taught), "measure=sa", f"transfer={source}", "evaluation.eps=0.1"]
        assert evaluate.run(command) == 0
        out = capsys.readouterr().out
        shares = {line.split()[0]: re.findall(r"([\d.]+)%", line)[0] for line in table(out)[:3]}
        found = re.search(r"reused ([\d,]+) of ([\d,]+) outcomes", out)
        assert found is not None
        rows.append((shares, found[1]))
    (first, none), (again, all_), (white, some) = rows
    assert (none, all_, some) == ("0", "48", "24"), "another source is another attack"
    assert first == again
    assert first["test/ra_worst"] == first["test/ra_transfer"]
    left = [float(shares["test/ra_transfer"]) for shares in (white, first)]
    assert left[0] <= left[1] < float(first["test/sa"]), "from itself: a white-box attack"
    runs = {run.data.tags["transfer"]: run for run in children(at_home)}
    assert runs.keys() == {str(dense_twin.resolve()), str(taught.resolve())}


def test_substitute_is_trained_attacked_from_and_told(
    taught: Path,
    at_home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = partial(train_substitute, updates=20)
    monkeypatch.setattr(evaluate, "train_substitute", short)
    command = [str(taught), "measure=sa", "substitute=true", "evaluation.eps=0.1"]
    outs = []
    for _ in range(2):
        assert evaluate.run(command) == 0
        outs.append(capsys.readouterr().out)
    for out, reused in zip(outs, ("0", "48"), strict=True):
        rows = {line.split()[0] for line in table(out)}
        assert {"test/ra_substitute", "test/ra_worst"} <= rows
        found = re.search(r"reused ([\d,]+) of 48 outcomes", out)
        assert found is not None
        assert found[1] == reused, "the same answers teach the same network"
    (run,) = children(at_home)
    home = Path(re.findall(r"card and plots in (.*)", outs[0])[0])
    card = " ".join(" ".join(p.read_text() for p in home.glob("*.md")).split())
    assert re.search(r"gives its label to \d+\.\d% of the test images", card)
    assert run.data.metrics["test/ra_substitute"] <= run.data.metrics["test/sa"]


def test_transferred_images_are_judged_on_the_model_at_hand(taught: Path, dense_twin: Path) -> None:
    """Against attack, network and judgement written out by hand."""
    model, source = load_model(taught), load_model(dense_twin)
    config = load_config(taught)
    test = config.dataset.load(config.seed).test
    x_NCHW, y_N = to_float(test.pixels_NCHW), test.labels_N
    attack = PGD(eps=0.1, step_size=0.05, steps=4)
    noise = ImageNoise(0, torch.arange(len(y_N)))
    found = Transfer(source=fold(source), attack=attack)(fold(model), x_NCHW, y_N, noise)
    x_adv = attack.begin(x_NCHW, ImageNoise(0, torch.arange(len(y_N))))
    for _ in range(attack.steps):
        x_adv.requires_grad_()
        z_NK = source(x_adv).logits
        true_N = z_NK.gather(1, y_N[:, None]).squeeze(1)
        other_N = z_NK.scatter(1, y_N[:, None], float("-inf")).amax(1)
        (gradient,) = torch.autograd.grad((other_N - true_N).sum(), x_adv)
        moved = x_adv.detach() + attack.step_size * gradient.sign()
        x_adv = moved.clamp(x_NCHW - attack.eps, x_NCHW + attack.eps).clamp(0, 1)
    with torch.no_grad():
        stand_N = (model(x_NCHW).logits.argmax(1) == y_N) & (model(x_adv).logits.argmax(1) == y_N)
    assert torch.equal(found.correct_B, stand_N)
    clean_N = model(x_NCHW).logits.argmax(1) == y_N
    assert 0 < int(stand_N.sum()) < int(clean_N.sum())


def test_source_of_other_classes_is_refused(
    checkpoint: Path, at_home: Path, tmp_path: Path
) -> None:
    other = trained(tmp_path / "other", **{"dataset.classes": 4})
    with pytest.raises(ValueError, match=r"transfer must be a run with num_classes 10, got .* 4"):
        evaluate.run([str(checkpoint), "measure=sa", f"transfer={other}"])


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    for options in ({"tier": "full"}, {"measure": "ra_square"}):
        with pytest.raises(ValueError, match="needs the package pyautoattack: pip install"):
            plan.read_plan(options)
    standard = plan.read_plan({"tier": "standard"}).tier.measures
    assert "ra_square" not in standard
    assert "ra_apgd_t" in standard
