"""The certify command on checkpoints."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe.backbones.lipschitz import Lipschitz
from moe.backbones.mixture import NetworkMixture
from moe.backbones.small import Small
from moe.certification.radii import Status
from moe.certification.smoothing import Smoothing
from moe.network import Network
from pipeline import checkpoint
from pipeline.algorithms.standard import Standard
from pipeline.certify import __main__ as command_of_certify
from pipeline.certify.certificates import ROUTE_HOLDS, CertificateResult, prove, smooth, table
from pipeline.config import Config
from pipeline.data.synthetic import Synthetic
from pipeline.optimization.norm_bound import bound_norms


def kept_at(folder: Path, backbone: Any, bound: float = 0.0) -> Path:
    """Write the checkpoint of a network as it begins, with norms that are bounded."""
    data = Synthetic(size=8, train_images=64, test_images=24)
    config = Config(dataset=data, backbone=backbone, algorithm=Standard())
    torch.manual_seed(0)
    model = checkpoint.build_model(config)
    if bound:
        bound_norms(model.parameters(), bound)
    checkpoint.save(folder / "best", config, model, {}, {"epoch": 1})
    return folder / "best"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    expert = Lipschitz(width=32, depth=1)
    backbone = NetworkMixture(num_experts=2, expert=expert)
    return kept_at(tmp_path_factory.mktemp("mixture"), backbone, bound=1.0)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kept_at(tmp_path_factory.mktemp("deep"), Small(ratio=0.125))


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kept(home: Path) -> list[dict[str, str]]:
    (file,) = (home / "runs" / "robust-moe").rglob("certificates.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_mixture_is_certified_and_tracked(
    mixture: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(mixture), "kind=theorem,per_class,floor,route", "images=20"]
    assert command_of_certify.run([*command, "evaluation.eps=0.001"]) == 0
    out = capsys.readouterr().out
    assert "20 test images" in out
    assert "router scores" in out
    assert "(exact)" in out
    assert "sampled, which certifies nothing" in out
    rows = kept(at_home)
    assert len(rows) == 4 * 20
    radii: dict[str, list[float]] = {}
    for row in rows:
        radii.setdefault(row["kind"], []).append(float(row["radius"]))
    for lesser, greater in (("per_class", "theorem"), ("theorem", "floor")):
        pairs = zip(radii[lesser], radii[greater], strict=True)
        assert all(less <= more + 1e-9 for less, more in pairs)
    assert {row["status"] for row in rows} <= {*map(str, Status), ROUTE_HOLDS}
    (run,) = runs(at_home)
    assert {"certified/floor", "certified/floor_low", "constant/logits"} <= run.data.metrics.keys()
    assert run.data.metrics["constant/logits_sampled"] <= run.data.metrics["constant/logits"]
    files = {file.path for file in client(at_home).list_artifacts(run.info.run_id)}
    assert {"certificates.csv", "config.json", "plots"} <= files


def client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{home}/mlflow.db")


def runs(home: Path) -> list[Any]:
    experiment = client(home).get_experiment_by_name("robust-moe")
    return list(client(home).search_runs([experiment.experiment_id]))


def test_deep_net_is_vacuous_and_smoothing_is_offered_with_it(
    deep: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(deep), "kind=floor,smoothing", "images=8", "sigma=0.1", "samples=40", "choose=8"]
    assert command_of_certify.run([*command, "alpha=0.05", "sampled=false"]) == 0
    out = capsys.readouterr().out
    assert "(bounds)" in out
    rows = kept(at_home)
    marks = {row["status"] for row in rows if row["kind"] == "floor"}
    assert marks <= {"vacuous", "not applicable", "wrong"}
    best = 0.1 * 1.8  # sigma times the quantile of the bound after 40 hits of 40
    radii = [float(row["radius"]) for row in rows if row["kind"] == "smoothing"]
    assert all(0 <= radius < best for radius in radii)


def test_what_cannot_be_certified_says_why(
    tmp_path_factory: pytest.TempPathFactory, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = Small(ratio=0.125, router_scope="per_layer")
    folder = kept_at(tmp_path_factory.mktemp("layers"), backbone)
    assert command_of_certify.run([str(folder), "images=4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "router_scope=per_layer" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which run"),
        (["x", "kind=luck"], "kind must be of theorem, .*, got 'luck'"),
        (["x", "images=0"], "images must be at least 1, got 0"),
        (["x", "sigma=-1"], "sigma must be above 0, got -1"),
        (["x", "lr=1"], "no key 'lr'"),
    ],
)
def test_bad_input_says_what_is_valid(at_home: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_of_certify.run(arguments)


class TwoHalves(Network):
    """What the certificate reads of a dual model, whose standard half always says class 0."""

    def __init__(self, robust: Network, alpha: float, mix: str = "probabilities"):
        torch.nn.Module.__init__(self)
        self.robust, self.alpha, self.mix = robust, alpha, mix

    def forward(self, x_BCHW: torch.Tensor) -> Any:
        p_BK = self.alpha * self.robust(x_BCHW).logits.softmax(1)
        p_BK[:, 0] += 1 - self.alpha
        return SimpleNamespace(logits=p_BK.log())


def test_dual_model_is_certified_by_its_robust_half(mixture: Path) -> None:
    from pipeline.checkpoint import load_config, load_model

    robust = load_model(mixture)
    robust.router.linear.weight.data.mul_(0.1)  # type: ignore[union-attr, operator]
    for expert in robust.experts:  # type: ignore[operator, union-attr]
        expert.body.head.bias.data = torch.randn(10).mul(3)
    test = load_config(mixture).dataset.load(0).test
    y_B = robust.double()(test.pixels_NCHW.double() / 255).logits.argmax(1)
    test = type(test)(test.pixels_NCHW, y_B)
    _, alone = prove(robust, test, ["floor"])
    _, dual = prove(TwoHalves(robust, 0.99), test, ["floor", "theorem"])
    assert (alone["floor"].radius_N > 0).all()
    assert (dual["floor"].radius_N <= alone["floor"].radius_N).all()
    assert (dual["floor"].radius_N > 0).any()
    with pytest.raises(ValueError, match="alpha must be above"):
        prove(TwoHalves(robust, 0.5), test, ["floor"])
    with pytest.raises(ValueError, match="mix=probabilities"):
        prove(TwoHalves(robust, 0.9, "logits"), test, ["floor"])


def test_smoothing_of_one_image_does_not_depend_on_the_others_behind_it(deep: Path) -> None:
    from pipeline.checkpoint import load_config, load_model

    model, test = load_model(deep), load_config(deep).dataset.load(0).test
    settings = {"seed": 3, "device": torch.device("cpu")}
    smoothing = Smoothing(sigma=0.05, samples=30, choose=5, alpha=0.05)
    few = smooth(model, test.pick(torch.arange(3)), smoothing, **settings)  # type: ignore[arg-type]
    more = smooth(model, test.pick(torch.arange(6)), smoothing, **settings)  # type: ignore[arg-type]
    assert torch.equal(few.radius_N, more.radius_N[:3])
    assert few.status_N == more.status_N[:3]


def test_certified_accuracy_counts_what_is_right_and_far_enough() -> None:
    radius_N = torch.tensor([0.0, 0.01, 0.02, 0.0, math.inf]).double()
    status = (Status.WRONG, *[Status.CERTIFIED] * 2, Status.NOT_APPLICABLE, Status.CERTIFIED)
    found = CertificateResult("linf", radius_N, status)
    assert found.stands(0) == 4
    assert found.stands(0.01) == 2
    assert found.stands(1) == 1
    assert found.curve[0] == (0.0, 4, 5)
    (head, row) = table({"floor": found})
    assert head[1] == "0"
    assert row[1].startswith("80.0 (37.6-")
