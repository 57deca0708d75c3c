"""Runs of seconds: what they report, and that stopping them anywhere changes nothing."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.network import Network
from moe.routing import Route
from pipeline import checkpoint, end_of_run, loop
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.context import Session
from pipeline.loop import NonFiniteError, fit
from pipeline.optimization.ema import WeightAverage
from pipeline.seeding import Noise

Events = list[Mapping[str, Any]]

TINY = override(
    Config(),
    {
        "dataset": "synthetic",
        "dataset.size": 8,
        "dataset.classes": 4,
        "dataset.train_images": 90,
        "dataset.test_images": 16,
        "dataset.pad": 1,
        "dataset.flip": True,
        "backbone.ratio": 0.125,
        "algorithm.attack.steps": 1,
        "evaluation.steps": 2,
        "evaluation.validation_steps": 1,
        "epochs": 3,
        "batch_size": 20,  # four updates an epoch
        "lr": 0.02,
        "warmup_epochs": 0.5,
    },
)
STEPS = 4


class StopError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def cheap_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots, and the timing, which one run draws for all."""
    monkeypatch.setattr(end_of_run, "images_per_second", lambda models, *_: [1.0] * len(models))
    monkeypatch.setattr(end_of_run, "draw", lambda *_: None)


def run(config: Config, folder: Path, emit: Callable[[Any], None] | None = None) -> Events:
    events: Events = []

    def take(event: Mapping[str, Any]) -> None:
        events.append(copy.deepcopy(event))
        if emit is not None:
            emit(event)

    fit(config, folder, Session(emit=take))
    return events


def stop_at(kind: str, count: int) -> Callable[[Mapping[str, Any]], None]:
    """Raise at the count-th event of a kind."""
    seen = 0

    def emit(event: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += event["kind"] == kind
        if seen == count:
            raise StopError

    return emit


def newest(folder: Path) -> Path:
    found, passed = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    assert passed == []
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    """Weights, buffers and optimizer states of the newest checkpoint, and of the best one."""
    flat: dict[str, Tensor] = {}
    for name, at in (("newest", newest(folder)), ("best", folder / "checkpoints" / "best")):
        model, saved = checkpoint.load_model(at), checkpoint.load_state(at)
        flat |= {f"{name} {key}": value for key, value in model.state_dict().items()}
        flat |= {f"{name} trained {key}": value for key, value in saved.get("weights", {}).items()}
        for group, state in saved["optimizers"].items():
            for index, slot in state["state"].items():
                flat |= {f"{name} {group} {index} {k}": v for k, v in slot.items()}
    return flat


def history(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = checkpoint.verify(newest(folder))["history"]
    return rows


def ending(events: Events) -> dict[str, float]:
    """The last metrics of a run, but for those that a clock measured."""
    last = [event["values"] for event in events if event["kind"] == "metrics"][-1]
    return {name: value for name, value in last.items() if "per_second" not in name}


def assert_equal_runs(one: Path, other: Path) -> None:
    wanted, found = tensors(one), tensors(other)
    assert wanted.keys() == found.keys()
    differing = [key for key in wanted if not torch.equal(wanted[key], found[key])]
    assert differing == []
    for at in ("best", newest(one).name):
        metas = [checkpoint.verify(folder / "checkpoints" / at) for folder in (one, other)]
        for key in ("epoch", "step", "update", "best"):
            assert metas[0][key] == metas[1][key]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Events]:
    """A run of three epochs that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(TINY, folder)


def test_run_returns_the_metrics_of_the_contract(straight: tuple[Path, Events]) -> None:
    folder, events = straight
    told = [event for event in events if event["kind"] == "metrics"]
    assert [row["step"] for row in told[:-1]] == [STEPS * epoch for epoch in range(1, 4)]
    apart = ("check/", "route/flip_rate_", "route/overlap")
    ending = {k: v for k, v in told[-1]["values"].items() if not k.startswith(apart)}
    assert {f"check/{name}" for name in ("logits", "gap", "eps_zero")} <= told[-1]["values"].keys()
    tags = {event["key"] for event in events if event["kind"] == "tag"}
    assert {"verdict", "verdict_why", "verdict_worst"} <= tags
    shares = {"sa", "ra_pgd2", "ra_pgd2_margin", "ra_forced", "ra_worst", "ra_router", "ra_expert"}
    wanted = {f"test/{share}{end}" for share in shares for end in ("", "_low", "_high")}
    wanted |= {f"cost/{n}" for n in ("gmac", "gmac_router", "params", "ratio_to_dense")}
    wanted |= {"cost/images_per_second", "cost/images_per_second_dense"}
    wanted |= {"route/entropy", "route/flip_rate", "route/load_0", "route/load_1"}
    assert ending.keys() == wanted
    assert all(math.isfinite(value) for row in told for value in row["values"].values())
    for share in shares:
        low, value, high = (ending[f"test/{share}{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= value + 1e-12
        assert value - 1e-12 <= high <= 1
        assert share in {"sa", "ra_worst"} or ending["test/ra_worst"] <= value <= ending["test/sa"]
    best = checkpoint.verify(folder / "checkpoints" / "best")
    assert told[-1]["step"] == best["update"], "measured on the model of that update"
    for row in told[:-1]:
        losses = {key for key in row["values"] if key.startswith("train/loss_")}
        names = {"natural", "robust", "router_natural", "router_robust"}
        assert losses == {f"train/loss_{name}" for name in names}
        assert {"train/images_per_second", "val/sa", "val/ra"} <= row["values"].keys()


def test_run_leaves_what_the_contract_lists(straight: tuple[Path, Events]) -> None:
    folder, events = straight
    assert json.loads((folder / "config.json").read_text())["algorithm"] == "adv_moe"
    assert (folder / "card.md").read_text().startswith("# run\n\nVerdict: **")
    assert json.loads((folder / "claim.json").read_text())["autoattack_acc"] is None
    plots = {"losses", "accuracies", "accuracy_over_eps", "class_load"}
    plots |= {"waterfall", "flips", "router_margins"}
    assert {plot.stem for plot in (folder / "plots").glob("*.png")} == plots
    names = {entry.name for entry in (folder / "checkpoints").iterdir()}
    assert names == {"best", "step_00000008", "step_00000012"}
    assert events[-1] == {"kind": "artifacts", "folder": str(folder)}


def test_progress_tells_the_loss_and_where_the_run_is(straight: tuple[Path, Events]) -> None:
    rows = [event for event in straight[1] if event["kind"] == "progress"]
    assert [(row["epoch"], row["step"]) for row in rows] == [
        (epoch, step) for epoch in range(1, 4) for step in range(1, 5)
    ]
    assert {(row["epochs"], row["steps"]) for row in rows} == {(3, STEPS)}
    first = rows[:STEPS]
    values = next(event["values"] for event in straight[1] if event["kind"] == "metrics")
    wanted = values["train/loss_natural"] + 6 * values["train/loss_robust"]
    assert sum(row["loss"] for row in first) / STEPS == pytest.approx(wanted, rel=1e-4)
    assert rows[-1]["seconds_left"] == 0
    assert all(row["images_per_second"] > 0 for row in rows)


def test_best_checkpoint_is_the_one_of_the_best_validation(straight: tuple[Path, Events]) -> None:
    folder, events = straight
    epochs = [event["values"] for event in events if event["kind"] == "epoch"]
    accuracies = [values["val/ra"] for values in epochs]
    best = checkpoint.verify(folder / "checkpoints" / "best")
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    assert best["best"] == max(accuracies)


@pytest.mark.parametrize(("algorithm", "epoch"), [("adv_moe", 1), ("standard", 3), ("gaussian", 3)])
def test_training_without_an_attack_keeps_the_epoch_of_the_best_clean_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, epoch: int
) -> None:
    falling = iter([0.3, 0.2, 0.1])

    def scripted(*_: Any) -> dict[str, float]:
        return {"val/ra": (ra := next(falling)), "val/sa": 1 - ra}

    monkeypatch.setattr(loop, "validate", scripted)
    run(override(TINY, {"algorithm": algorithm}), tmp_path)
    assert checkpoint.verify(tmp_path / "checkpoints" / "best")["epoch"] == epoch


def test_run_with_the_same_seed_is_the_same_to_the_bit(
    straight: tuple[Path, Events], tmp_path: Path
) -> None:
    torch.rand(7)  # whatever was drawn before
    run(TINY, tmp_path)
    assert_equal_runs(straight[0], tmp_path)


def test_report_gets_every_epoch(tmp_path: Path) -> None:
    reports: list[Mapping[str, float]] = []
    fit(override(TINY, {"epochs": 1}), tmp_path, Session(report=reports.append))
    assert [report["epoch"] for report in reports] == [1]
    assert {"val/sa", "val/ra"} <= reports[0].keys()


# Interrupted runs


@pytest.mark.parametrize(
    ("kind", "count", "every"),
    [
        ("progress", 1, 0),  # in the first update: nothing was saved
        ("epoch", 2, 0),  # after an epoch
        ("metrics", 3, 0),  # between validation and checkpoint
        ("progress", 11, 3),  # in an epoch, after a checkpoint within it
        ("progress", 12, 3),
        ("judging", 1, 0),  # after training
    ],
)
def test_interrupted_run_ends_as_if_it_had_not_been(
    straight: tuple[Path, Events], tmp_path: Path, kind: str, count: int, every: int
) -> None:
    config = override(TINY, {"checkpoint_steps": every})
    with pytest.raises(StopError):
        run(config, tmp_path, stop_at(kind, count))
    torch.rand(3)
    events = run(config, tmp_path)
    assert_equal_runs(straight[0], tmp_path)
    steps = [row["step"] for row in history(tmp_path)]
    assert steps == [STEPS * epoch for epoch in range(1, 4)], "no step is doubled or lost"
    resumed = [event for event in events if event["kind"] == "resumed"]
    assert len(resumed) == (0 if count == 1 and kind == "progress" else 1)
    if every:
        assert resumed[0]["step"] > 0, "it did continue within the epoch"
    assert ending(events) == ending(straight[1])


RECIPE = {
    "ema_decay": 0.9,
    "awp_gamma": 0.01,
    "awp_warmup": 0.5,
    "label_smoothing": 0.1,
    "clip_norm": 1.0,
    "augmentation": "randaugment",
    "cutmix": 0.5,
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Events]:
    """The same run with every option of the recipe."""
    folder = tmp_path_factory.mktemp("rich")
    return folder, run(override(TINY, RECIPE), folder)


@pytest.mark.parametrize(
    ("kind", "count", "every"),
    [("epoch", 1, 0), ("progress", 11, 3)],
)
def test_interrupted_run_with_every_option_ends_as_if_it_had_not_been(
    rich: tuple[Path, Events], tmp_path: Path, kind: str, count: int, every: int
) -> None:
    config = override(TINY, RECIPE | {"checkpoint_steps": every})
    with pytest.raises(StopError):
        run(config, tmp_path, stop_at(kind, count))
    torch.rand(3)
    events = run(config, tmp_path)
    assert_equal_runs(rich[0], tmp_path)
    assert [event["kind"] for event in events].count("resumed") == 1
    assert ending(events) == ending(rich[1])
    saved = checkpoint.load_state(newest(tmp_path))
    assert saved["ema_updates"] == 3 * STEPS


def test_average_of_the_weights_is_what_is_validated_kept_and_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    judged: list[dict[str, Tensor]] = []
    follow, judge = WeightAverage.follow, loop.judge

    def weights(model: Network) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def recorded(average: WeightAverage, model: Network) -> None:
        seen.append(weights(model))
        follow(average, model)

    def watched(model: Network, *given: Any, **settings: Any) -> Any:
        judged.append(weights(model))
        return judge(model, *given, **settings)

    monkeypatch.setattr(WeightAverage, "follow", recorded)
    monkeypatch.setattr(loop, "judge", watched)
    monkeypatch.setattr(end_of_run, "judge", watched)
    run(override(TINY, {"ema_decay": 0.5, "epochs": 2}), tmp_path)
    mean, wanted = dict(seen[0]), []
    for t, new in enumerate(seen[1:], 1):
        d = min(0.5, (1 + t) / (10 + t))
        mean = {name: d * mean[name] + (1 - d) * new[name] for name in mean}
        wanted.append(mean)
    epochs = [wanted[STEPS * epoch - 2] for epoch in (1, 2)]
    best = checkpoint.verify(tmp_path / "checkpoints" / "best")["epoch"]
    tested = [epochs[best - 1]] * (len(judged) - 2)
    assert tested
    for found, averaged in zip(judged, [*epochs, *tested], strict=True):
        for name, weight in averaged.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    kept = weights(checkpoint.load_model(tmp_path / "checkpoints" / "best"))
    assert all(torch.equal(kept[name], judged[-1][name]) for name in kept)
    trained = checkpoint.load_state(newest(tmp_path))["weights"]
    assert all(torch.equal(trained[name], weight) for name, weight in seen[-1].items())
    assert any(not torch.equal(trained[name], judged[1][name]) for name in kept)


def test_options_that_are_off_leave_no_trace_in_a_checkpoint(straight: tuple[Path, Events]) -> None:
    assert checkpoint.load_state(newest(straight[0])).keys() == {"optimizers"}


@pytest.mark.parametrize("option", ["randaugment", "cutmix"])
def test_option_of_the_images_changes_neither_crops_nor_noise(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """So that runs with and without it can be compared update by update."""
    real, found = loop.augment, []

    def recorded(x_BCHW: Tensor, **settings: Any) -> Tensor:
        state = settings["generator"].get_state()
        y_BCHW = real(x_BCHW, **settings)
        found.append((state, settings["generator"].get_state()))
        return y_BCHW

    monkeypatch.setattr(loop, "augment", recorded)
    changes = {"augmentation": option} if option == "randaugment" else {"cutmix": 1.0}
    batches = []
    for config in (TINY, override(TINY, changes)):
        splits = config.dataset.load(0)
        _, x_BCHW, y_B, draws = next(loop.batches(config, Session(), splits, 1, 2))
        batches.append((x_BCHW, y_B, Noise(draws).uniform(x_BCHW)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(batches[0][2], batches[1][2])
    assert not torch.equal(batches[0][0], batches[1][0])
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert batches[1][0].is_contiguous(memory_format=torch.channels_last)
    if option == "cutmix":
        shares_BK = batches[1][1]
        assert shares_BK.shape == (20, 4)
        torch.testing.assert_close(shares_BK.sum(1), torch.ones(20))


def test_losses_of_an_epoch_that_was_interrupted_are_those_of_all_its_updates(
    straight: tuple[Path, Events], tmp_path: Path
) -> None:
    config = override(TINY, {"checkpoint_steps": 2})
    with pytest.raises(StopError):
        run(config, tmp_path, stop_at("progress", 3))
    run(config, tmp_path)
    for wanted, found in zip(history(straight[0]), history(tmp_path), strict=True):
        for key, value in wanted["values"].items():
            if key != "train/images_per_second":
                assert found["values"][key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize(("call", "epoch"), [("copy", 1), ("copy", 2), ("save", 2)])
def test_run_killed_between_a_checkpoint_and_the_best_one_finds_the_best_again(
    straight: tuple[Path, Events],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    epoch: int,
) -> None:
    real, calls = getattr(checkpoint, call), 0

    def killed(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == epoch:
            raise StopError
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, killed)
        with pytest.raises(StopError):
            run(TINY, tmp_path)
    run(TINY, tmp_path)
    assert_equal_runs(straight[0], tmp_path)


def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    straight: tuple[Path, Events], tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        run(TINY, tmp_path, stop_at("epoch", 2))
    damaged = newest(tmp_path) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    events = run(TINY, tmp_path)
    warnings = [event["text"] for event in events if event["kind"] == "warning"]
    assert any("step_00000008 is damaged: model.safetensors" in text for text in warnings)
    assert next(e for e in events if e["kind"] == "resumed")["checkpoint"] == "step_00000004"
    assert_equal_runs(straight[0], tmp_path)


def test_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(TINY, tmp_path, stop_at("epoch", 1))
    (newest(tmp_path) / "state.pt").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt is missing, and none before"):
        run(TINY, tmp_path)


def test_finished_training_is_judged_again_without_an_update(
    straight: tuple[Path, Events], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StopError):
        run(TINY, tmp_path, stop_at("judging", 1))
    monkeypatch.setattr(AdvMoE, "step", None)
    events = run(TINY, tmp_path)
    assert not [event for event in events if event["kind"] == "progress"]
    assert ending(events) == ending(straight[1])


# What must stop a run


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    calls, real = 0, loop.TrainState.descend

    def poisoned(state: Any, loss: Tensor, *groups: str) -> None:
        nonlocal calls
        calls += 1
        real(state, loss * (bad if calls == 2 * STEPS + 4 else 1.0), *groups)

    monkeypatch.setattr(loop.TrainState, "descend", poisoned)
    with pytest.raises(NonFiniteError, match=rf"^step 6: loss of router is {bad}$"):
        run(TINY, tmp_path)
    assert newest(tmp_path).name == "step_00000004"
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path).values())


def test_attack_that_turns_to_nan_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.algorithms.attack_objectives.kl_per_image",
        lambda p, q: (q * float("nan")).sum(-1),
    )
    with pytest.raises(NonFiniteError, match=r"^step 1: adversarial images is nan$"):
        run(TINY, tmp_path)


def test_router_that_hands_on_integers_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published router returned ``argmax`` indices, and never trained."""
    real = Route.fixed
    monkeypatch.setattr(Route, "fixed", staticmethod(lambda e, s: real(e, s.detach())))
    with pytest.raises(loop.RouterError, match="step 1: the router gets no gradient"):
        run(override(TINY, {"algorithm": "moe_at"}), tmp_path)


def test_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most the \d+ training images, got 200"):
        fit(override(TINY, {"batch_size": 200}), tmp_path)


def test_number_of_workers_must_be_the_one_that_was_started(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be 1, as started, got 2"):
        fit(override(TINY, {"workers": 2}), tmp_path)


def test_collapsed_router_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "COLLAPSED", 0.4)
    events = run(override(TINY, {"epochs": 1}), tmp_path)
    assert any("it has collapsed" in e["text"] for e in events if e["kind"] == "warning")
    assert {"kind": "tag", "key": "router_collapsed", "value": "true"} in events


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "digits", "dataset.train_images": 100, "dataset.test_images": 20},
        {"algorithm": "standard", "backbone.num_experts": 1},
        {"algorithm": "trades", "optimizer": "adam", "lr": 1e-3},
        {"backbone.router_scope": "per_layer", "algorithm.router_loss": "pseudo_label"},
        {"algorithm": "moe_at", "precision": "bf16", "schedule": "cyclic"},
        {"algorithm": "pgd_training", "evaluation.norm": "l2", "evaluation.restarts": 2},
        {"algorithm.minibatches": "two", "backbone.num_experts": 3},
        RECIPE | {"algorithm.router_loss": "pseudo_label", "algorithm.aim": "ce"},
        RECIPE | {"algorithm": "moe_at", "algorithm.aim": "ce", "precision": "bf16"},
        RECIPE | {"algorithm": "pgd_training", "backbone.num_experts": 1, "precision": "bf16"},
        RECIPE | {"algorithm": "standard", "backbone.router_scope": "per_layer"},
    ],
)
def test_run_of_one_epoch_works_and_is_finite(tmp_path: Path, changes: dict[str, Any]) -> None:
    metrics = fit(override(TINY, {"epochs": 1} | changes), tmp_path)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["test/ra_worst"] <= metrics["test/sa"]
