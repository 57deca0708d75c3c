"""The bench command at a tiny size, and the plain update against the fast one. Never the time."""

import copy
import functools
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe.network import Network
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.trades import Trades
from pipeline.attacks.pgd import PGD
from pipeline.bench import BENCHMARKS, LONG
from pipeline.bench.__main__ import run
from pipeline.bench.autoattack import median_radius
from pipeline.bench.compiled import CompiledDispatch
from pipeline.bench.masked import masked
from pipeline.bench.plain import plain_adv_moe, plain_attack, plain_trades
from pipeline.bench.race import Benchmark, RaceResult, Variant, race
from pipeline.bench.settings import Settings, read_settings
from pipeline.bench.step import disagreement, restart, training_state
from pipeline.bench.whole_pipeline import run_config
from pipeline.cli.arguments import main
from pipeline.optimization.state import TrainState
from tests.conftest import LAYERED

TINY = ["backbone=small", "ratio=0.125", "batch=8", "image_size=8", "rounds=1", "threads=1"]
ATTACK = PGD(step_size=5 / 255, steps=2, start="gaussian")
IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.arange(12) % 4


def exact(found: Any, want: Any) -> None:
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)


def pair(model: Network) -> tuple[TrainState, TrainState]:
    """Two states of the same network, masked the second, with the same noise ahead."""
    states = training_state(copy.deepcopy(model)), training_state(masked(model))
    for state in states:
        restart(state)()
    return states


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in LONG])
def test_benchmark_prints_conditions_and_ratios(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, *TINY]) == 0
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in shown
    assert "num_experts=2 ratio=0.125" in shown
    assert re.search(r"memory +(kept|returned to the system) when freed", shown)
    assert len(re.findall(r"\d\.\d\d x faster", shown)) == {"token_routing": 10}.get(name, 4)
    assert {"token_routing": "and its masked definition differ"}.get(
        name, "load of the experts: 0."
    ) in shown


PAGES = """
import resource
from pipeline.bench.__main__ import keep_heap
faults, kept = [], {kept} and keep_heap()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (150, 70, 110):
        b"1" * (size * 2**20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, faults[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_heap_spares_large_blocks_their_page_faults() -> None:
    found = []
    for kept in (False, True):
        script = [sys.executable, "-c", PAGES.format(kept=kept)]
        found.append(subprocess.check_output(script, text=True).split())
    assert [kept for kept, _ in found] == ["False", "True"]
    by_default, when_kept = (int(faults) for _, faults in found)
    assert when_kept < by_default / 100


def test_autoattack_breaks_the_same_images_and_prints_both_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyautoattack")
    assert run(["autoattack", *TINY, "attacked=12", "attack_share=0.02"]) == 0
    shown = capsys.readouterr().out
    found = re.search(r"(\d+) of 12 robust on ours, (\d+) on the masked twin", shown)
    assert found is not None
    assert 0 < int(found[1]) < 12, "some for every attack to work on, some broken"
    assert "the same outcome: 12 of 12" in shown
    assert "on the other network: 24 of 24 alike" in shown
    ratios = r"masked over ours: AutoAttack \d+\.\d\d, inference on 8 images \d+\.\d\d"
    gmac = re.search(ratios + r", multiply-accumulates (\d\.\d\d)", shown)
    assert gmac is not None
    assert float(gmac[1]) > 1


def test_median_radius_is_where_a_linear_network_loses_every_second_image() -> None:
    weight_KD = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))

    def linear(x_BCHW: torch.Tensor) -> Any:
        return SimpleNamespace(logits=x_BCHW.flatten(1) @ weight_KD.float().T)

    x_BCHW = 0.5 + 0.02 * torch.randn(101, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    logits_BK = linear(x_BCHW).logits
    y_B, second_B = logits_BK.topk(2).indices.unbind(1)
    eps = median_radius(linear, x_BCHW, y_B)  # type: ignore[arg-type]
    slope_BD = weight_KD[second_B] - weight_KD[y_B]
    x_adv = x_BCHW + eps * slope_BD.sign().view_as(x_BCHW)
    after_BK = linear(x_adv).logits.gather(1, torch.stack([y_B, second_B], 1))
    assert int((after_BK[:, 1] - after_BK[:, 0] > 1e-5).sum()) == 50


def test_pipeline_times_the_same_epochs_with_ray_and_without(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["pipeline", *TINY, "updates=1", "epochs=2"]) == 0
    shown = capsys.readouterr().out
    assert "an epoch of 1 updates on 8 images" in shown
    ratio = re.search(r"an epoch costs (\d+\.\d{3}) of the bare loop's", shown)
    assert ratio is not None
    assert float(ratio[1]) > 0
    assert "GMAC" not in shown
    assert not list(tmp_path.iterdir()), "nothing is left where the command ran"


def test_images_of_the_pipeline_make_the_updates_wanted() -> None:
    for updates in (1, 4, 7):
        config = run_config(Settings(batch=24, updates=updates, backbone="small"))
        assert len(config.dataset.load(config.seed).train) == 24 * updates


def test_all_benchmarks_run_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TINY, "router_scope=per_layer", "router_loss=pseudo_label"]) == 0
    shown = capsys.readouterr().out
    assert "inference on 8 images" in shown
    assert "one update on 8 images: router_loss=pseudo_label" in shown
    assert "AutoAttack" not in shown
    assert "an epoch" not in shown


def test_threads_are_set_for_the_race_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []

    def work() -> None:
        seen.append(torch.get_num_threads())
        torch.ones(2, 2) @ torch.ones(2, 2)

    race = Benchmark("", {"a": Variant(work)}, notes=list)
    monkeypatch.setitem(BENCHMARKS, "inference", lambda _: race)
    assert run(["inference", *TINY[:-1], f"threads={before + 1}"]) == 0
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


def test_list_and_help_name_the_benchmarks_and_the_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(BENCHMARKS)
    with pytest.raises(SystemExit) as leaving:
        run(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    for word in (*BENCHMARKS, "batch=128", "num_experts=2", "router_loss=trades"):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training"], "no benchmark 'training'; nearest: "),
        (["inference", "step"], "at most 1 name"),
        (["batchsize=3"], "no key 'batchsize'; nearest: batch"),
        (["batch=many"], "batch must be a whole number, got 'many'"),
        (["batch=0"], "batch must be at least 1, got 0"),
        (["rounds=0"], "rounds must be at least 1, got 0"),
        (["attack_share=2"], "attack_share must be above 0 and at most 1, got 2"),
        (["num_experts=1"], "num_experts must be at least 2, got 1"),
        (["ratio=0"], "ratio must be above 0 and at most 1, got 0"),
        (["backbone=resnet"], "no backbone 'resnet'; nearest: resnet18"),
        (["router_loss=x"], "router_loss must be one of trades, pseudo_label, got 'x'"),
    ],
)
def test_bad_words_end_with_code_2_and_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as leaving:
        main(run)
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_settings_are_read_by_the_type_of_their_field() -> None:
    found = read_settings({"backbone": "small", "ratio": "1/4", "batch": "16"})
    assert found == Settings(backbone="small", ratio=0.25, batch=16)


@pytest.mark.parametrize("router_loss", ["trades", "pseudo_label"])
@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@pytest.mark.parametrize("num_experts", [2, 3])
def test_plain_update_and_ours_end_in_the_same_network(
    build: Any, num_experts: int, scope: str, router_loss: Any
) -> None:
    model = build(ratio=0.125, num_experts=num_experts, router_scope=scope).double()
    update_both(model, AdvMoE(attack=ATTACK, router_loss=router_loss), 2)


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@pytest.mark.parametrize("name", [name for name in LAYERED if name != "small"])
def test_plain_update_and_ours_end_in_the_same_network_of_every_backbone(
    build: Any, name: str, scope: str
) -> None:
    ratio = 0.25 if name == "densenet" else 0.125  # 3 channels a layer, not one
    model = build(backbone=name, ratio=ratio, router_scope=scope, activation="silu").double()
    update_both(model, AdvMoE(attack=ATTACK, router_loss="pseudo_label"), 1)


def update_both(model: Network, algorithm: AdvMoE, updates: int) -> None:
    """Compare updates of a network: both halves, weights and statistics."""
    ours, plain = pair(model)
    for _ in range(updates):  # the second update starts from moved statistics and with momentum
        algorithm.step(ours, IMAGES, LABELS)
        plain_adv_moe(algorithm, plain.model, plain.optimizers, IMAGES, LABELS, plain.noise)
    after, want = ours.model.state_dict(), plain.model.state_dict()
    assert list(after) == list(want)
    for key, value in want.items():
        exact(after[key], value)
    start = model.state_dict()
    assert all((after[key] != start[key]).any() for key, _ in model.named_parameters())
    assert [m.training for m in ours.model.modules()] == [m.training for m in plain.model.modules()]


def test_disagreement_of_the_two_updates_is_one_of_rounding(build: Any) -> None:
    model = build(ratio=0.125)
    assert disagreement(AdvMoE(attack=ATTACK), model, IMAGES.float(), LABELS) < 1e-9
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_plain_dense_update_is_that_of_trades(build: Any) -> None:
    model = build(ratio=0.125, num_experts=1).double()
    ours, plain = pair(model)
    algorithm = Trades(attack=ATTACK)
    algorithm.step(ours, IMAGES, LABELS)
    (optimizer,) = plain.optimizers.values()
    plain_trades(algorithm, plain.model, optimizer, IMAGES, LABELS, plain.noise)
    for key, value in plain.model.state_dict().items():
        exact(ours.model.state_dict()[key], value)


def test_plain_attack_stays_in_the_ball_and_moves(build: Any) -> None:
    state = training_state(masked(build(ratio=0.125).double()))
    restart(state)()
    x_adv = plain_attack(ATTACK, state.model, IMAGES, state.noise)
    assert float((x_adv - IMAGES).abs().max()) <= ATTACK.eps + 1e-12
    assert float((x_adv - IMAGES).abs().mean()) > ATTACK.eps / 2
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_masked_copy_shares_no_weight_with_its_original(build: Any) -> None:
    model = build(ratio=0.125)
    twin = masked(model)
    twin.body.blocks[0].conv1.conv.weight_FCRR.data.zero_()
    assert model.body.blocks[0].conv1.conv.weight_FCRR.any()


def test_race_takes_turns_prepares_every_call_and_counts_operations() -> None:
    events: list[str] = []
    one, other = torch.rand(2, 3), torch.rand(3, 5)

    def variant(name: str) -> Variant:
        def work() -> None:
            events.append(name)
            one @ other

        return Variant(work, lambda: events.append(f"before {name}"))

    benchmark = Benchmark("", {"a": variant("a"), "b": variant("b")}, notes=list, turns=2)
    outcome = race(benchmark, 3, lambda _: None)
    assert events == ["before a", "a", "before b", "b"] * (1 + 3 * 2)
    assert outcome.gmac == {"a": 30 / 1e9, "b": 30 / 1e9}
    assert [len(times) for times in outcome.seconds.values()] == [6, 6]


def test_work_that_takes_its_own_times_is_tried_first_and_timed_by_them() -> None:
    events: list[str] = []

    def timed() -> list[float]:
        events.append("timed")
        return [1.0, 2.0]

    variant = Variant(timed, trial=lambda: events.append("trial"), timed=timed)
    outcome = race(Benchmark("", {"a": variant}, notes=list), 2, lambda _: None)
    assert events == ["trial", "timed", "timed"]
    assert outcome.seconds["a"] == [1.0, 2.0, 1.0, 2.0]
    assert outcome.gmac["a"] == 0


def test_race_counts_gradients_of_images_alone(build: Any) -> None:
    """A convolution's input gradient costs as much as the convolution."""
    weight = torch.rand(4, 3, 3, 3)

    def attack() -> None:
        x_BCHW = torch.rand(1, 3, 5, 5, requires_grad=True)
        y_BDPQ = torch.nn.functional.conv2d(x_BCHW, weight, padding=1)
        torch.autograd.grad(y_BDPQ.square().sum(), x_BCHW)

    outcome = race(Benchmark("", {"attack": Variant(attack)}, notes=list), 1, lambda _: None)
    assert outcome.gmac["attack"] == 2 * 4 * 3 * 9 * 25 / 1e9


def test_speedup_is_the_median_of_the_turns_own_ratios() -> None:
    outcome = RaceResult(seconds={"ours": [1.0, 1.0, 9.0], "slow": [2.0, 3.0, 36.0]})
    assert outcome.speedup("ours", "slow") == 3.0
    assert outcome.median("slow") == 3.0


def test_compiled_dispatch_answers_as_the_network(build: Callable[..., Network]) -> None:
    """The ``eager`` backend traces the graph as any other does, and generates no code."""
    model = build(num_experts=3, ratio=0.25)
    x_BCHW = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = model(x_BCHW)
    assert wanted.route.unique().numel() == 3
    eager = functools.partial(torch.compile, backend="eager")
    for compiler in (None, eager):
        found = CompiledDispatch(model, torch.float32, compiler)
        for batch in (1, 9):
            with torch.no_grad():
                logits_BK = found.logits(x_BCHW[:batch])
            torch.testing.assert_close(logits_BK, wanted.logits[:batch], rtol=1e-4, atol=1e-5)
    found.tree = {**found.tree, "experts": found.tree["experts"][::-1]}
    assert not torch.allclose(found.logits(x_BCHW), wanted.logits, rtol=1e-2, atol=1e-2)


def test_inference_prints_compiled_rows_and_ratios(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    one = ["batch=1" if word.startswith("batch") else word for word in TINY]
    assert run(["inference", *one, "compiled=true"]) == 0
    shown = capsys.readouterr().out
    assert "inference on 1 images" in shown
    for name in ("mixture, compiled", "dense, compiled", "mixture, ours", "dense, plain"):
        assert re.search(rf"{name}: \d+\.\d\d of the plain dense net's time", shown)


def test_compiled_rows_need_pathways() -> None:
    with pytest.raises(ValueError, match="every layer routes for itself"):
        run(["inference", *TINY, "router_scope=per_layer", "compiled=true"])
