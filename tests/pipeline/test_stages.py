"""Runs whose network changes on the way: when, to what, and that stopping anywhere changes nothing.

Shapes: CHW channels and sides.
"""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.cost import cost
from moe.pruning.hydra import ScoredBody, scored_body
from pipeline import checkpoint, end_of_run
from pipeline.algorithms import ALGORITHMS
from pipeline.algorithms.sparse import Sparse
from pipeline.algorithms.staged import Stage, Staged
from pipeline.attacks.pgd import PGD
from pipeline.checkpoint import build_model
from pipeline.config.overrides import override
from pipeline.context import Session
from pipeline.loop import fit
from pipeline.optim import advance, build_optimizers, moment, starts
from pipeline.optimization.state import TrainState
from pipeline.seeding import Noise, generator_at
from tests.helpers.pair import run_pair
from tests.pipeline.test_loop import (
    TINY,
    Events,
    StopError,
    assert_equal_runs,
    ending,
    run,
    stop_at,
)

SPARSE = override(
    TINY,
    {
        "algorithm": "sparse",
        "algorithm.pretrain": 0.4,
        "algorithm.score": 0.25,
        "algorithm.tune_rate": 0.5,
        "backbone.num_experts": 1,
        "backbone.ratio": 0.125,
        "batch_size": 10,
        "dataset.train_images": 34,  # three updates an epoch
        "epochs": 4,
        "warmup_epochs": 0.0,
        "checkpoint_steps": 1,
    },
)
STARTS = [0, 5, 8, 12]  # in the second epoch, and in the third


@pytest.fixture(autouse=True)
def cheap_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots and the timing."""
    monkeypatch.setattr(end_of_run, "images_per_second", lambda models, *_: [1.0] * len(models))
    monkeypatch.setattr(end_of_run, "draw", lambda *_: None)


# When a stage begins


@pytest.mark.parametrize(
    ("shares", "updates", "want"),
    [
        ((0.45, 0.1, 0.45), 1000, [0, 450, 550, 1000]),
        ((0.4, 0.25, 0.35), 12, [0, 5, 8, 12]),
        ((0.45, 0.1, 0.45), 3, [0, 1, 2, 3]),
        ((0.9, 0.05, 0.05), 4, [0, 2, 3, 4]),  # each gets an update
        ((0.01, 0.01, 0.98), 10, [0, 1, 2, 10]),
        ((1.0,), 7, [0, 7]),
    ],
)
def test_stages_get_their_shares_and_at_least_one_update(
    shares: tuple[float, ...], updates: int, want: list[int]
) -> None:
    assert starts(tuple(Stage(share, 1.0) for share in shares), updates) == want


def test_run_with_fewer_updates_than_stages_is_refused() -> None:
    stages = Sparse().stages()
    with pytest.raises(ValueError, match=r"enough for 3 updates, one for each stage .*, got 2"):
        starts(stages, 2)


def test_every_stage_runs_the_whole_schedule_at_its_own_rate() -> None:
    found = [moment(SPARSE, update // 3, update % 3, 3) for update in range(12)]
    assert [now.stage for now in found] == [0] * 5 + [1] * 3 + [2] * 4
    assert [now.rate for now in found] == [1.0] * 8 + [0.5] * 4
    for first, end in itertools.pairwise(STARTS):
        for update in range(first, end):
            want = SPARSE.epochs * (update - first) / (end - first)
            assert found[update].epoch == pytest.approx(want)


def test_algorithm_without_stages_follows_the_run() -> None:
    assert moment(TINY, 2, 3, 4) == (0, 2.75, 1.0)
    staged = {name for name, kind in ALGORITHMS.items() if issubclass(kind, Staged)}
    assert staged == {"sparse", "upcycled_adv_moe"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, r"beta must be at least 0, got -1\.0"),
        ({"pretrain": 0.0}, r"pretrain must be above 0 and below 1, got 0\.0"),
        ({"score": float("nan")}, "score must be above 0 and below 1, got nan"),
        (
            {"pretrain": 0.6, "score": 0.4},
            r"score must be below 0\.4, what pretrain leaves of the run, got 0\.4",
        ),
        ({"score_rate": 0.0}, r"score_rate must be above 0, got 0\.0"),
        ({"tune_rate": float("inf")}, "tune_rate must be above 0 and finite, got inf"),
        ({"aim": "dlr"}, "aim must be kl or ce, got 'dlr'"),
    ],
)
def test_setting_of_sparse_out_of_range_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparse(**settings)


# From stage to stage


def state_at(stage: int, **settings: Any) -> TrainState:
    """The state of a run that has just entered a stage, from seed 0."""
    torch.manual_seed(0)
    state = TrainState(build_model(SPARSE, 0), {}, **settings)
    state.optimizers = build_optimizers(SPARSE, state)
    for number in range(1, stage + 1):
        advance(SPARSE, state, number)
    return state


def updates(state: TrainState, count: int, rank: int = 0, world: int = 1) -> None:
    size, algorithm = 8 // world, Sparse(attack=PGD(steps=1, start="gaussian"))
    for update in range(count):
        draws = generator_at("cpu", "update", update)
        x_BCHW = torch.rand(8, 3, 8, 8, generator=draws)[rank * size :][:size]
        y_B = (torch.arange(8) % 4)[rank * size :][:size]
        state.noise = Noise(draws, rank, world)
        algorithm.step(state, x_BCHW, y_B)
        state.check(update)


def test_stages_train_the_dense_net_then_its_scores_then_the_small_net() -> None:
    state = state_at(0)
    dense = build_model(override(SPARSE, {"algorithm": "trades", "backbone.ratio": 1.0}))
    small = build_model(SPARSE)
    assert cost(state.model, 8) == cost(dense, 8)
    updates(state, 1)
    before = copy.deepcopy(state.model.body.state_dict())
    advance(SPARSE, state, 1)
    body = scored_body(state.model)
    assert all(torch.equal(v, before[k]) for k, v in body.dense.state_dict().items())
    first = [scores_D.detach().clone() for scores_D in body.scores]
    updates(state, 2)
    assert not any(torch.equal(a, b) for a, b in zip(first, body.scores, strict=True))
    after = body.dense.state_dict()
    resting = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert resting == {name for name, _ in body.dense.named_parameters()}, "statistics follow"
    advance(SPARSE, state, 2)
    assert cost(state.model, 8) == cost(small, 8)
    filled = copy.deepcopy(state.model.body.state_dict())
    updates(state, 1)
    moved = {n for n, p in state.model.body.named_parameters() if not torch.equal(p, filled[n])}
    assert moved == {name for name, _ in state.model.body.named_parameters()}


def test_small_net_begins_as_the_masked_net_that_was_validated() -> None:
    state = state_at(1)
    updates(state, 2)
    masked = copy.deepcopy(state.model).double().eval()
    advance(SPARSE, state, 2)
    x_BCHW = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        found = state.model.double().eval()(x_BCHW).logits
        torch.testing.assert_close(found, masked(x_BCHW).logits, rtol=0, atol=1e-10)


def test_first_stage_is_trades_on_the_dense_net() -> None:
    """To the bit: the same weights, images, attack and losses."""
    state, other = state_at(0), state_at(0)
    algorithm = ALGORITHMS["trades"](attack=PGD(start="gaussian"))  # type: ignore[call-arg]
    x_BCHW, y_B = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    for each, how in ((state, Sparse()), (other, algorithm)):
        each.noise = Noise(generator_at("cpu", 1))
        how.step(each, x_BCHW, y_B)
    one, two = state.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_optimizers_are_made_anew_for_what_the_stage_trains() -> None:
    for stage in range(3):
        state = state_at(stage)
        assert state.optimizers.keys() == {"experts"}
        (group,) = state.optimizers["experts"].param_groups
        training = [p for p in state.model.parameters() if p.requires_grad]
        assert [id(p) for p in group["params"]] == [id(p) for p in training]
        assert not state.optimizers["experts"].state


def test_scores_that_are_not_finite_stop_the_run_with_the_layer() -> None:
    state = state_at(1)
    scored_body(state.model).scores[1].data[0] = float("inf")
    with pytest.raises(ValueError, match=r"scores of blocks\.0\.conv1\.conv are not finite"):
        advance(SPARSE, state, 2)


# A whole run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Events]:
    """A run through all stages that nobody disturbed; every checkpoint of it is kept."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_of_run, "images_per_second", lambda models, *_: [1.0] * len(models))
        patch.setattr(end_of_run, "draw", lambda *_: None)
        patch.setattr("pipeline.loop.KEEP", 99)
        return folder, run(SPARSE, folder)


def test_checkpoints_hold_the_network_of_their_stage(straight: tuple[Path, Events]) -> None:
    for update in range(1, 13):
        folder = straight[0] / "checkpoints" / f"step_{update:08d}"
        stage = sum(start < update for start in STARTS[:3]) - 1
        assert checkpoint.verify(folder)["stage"] == stage
        model = checkpoint.load_model(folder)
        assert isinstance(model.body, ScoredBody) == (stage == 1)
        width = model.body.head.weight.shape[1] if stage != 1 else 384
        assert width == (48 if stage == 2 else 384)
        assert model(torch.rand(2, 3, 8, 8)).logits.isfinite().all()


def test_result_is_the_small_net_selected_among_small_nets(straight: tuple[Path, Events]) -> None:
    folder, events = straight
    best = checkpoint.verify(folder / "checkpoints" / "best")
    epochs = [event["values"] for event in events if event["kind"] == "epoch"]
    assert [values["train/stage"] for values in epochs] == [0, 1, 2, 2]
    accuracies = [values["val/ra"] for values in epochs]
    late = accuracies[2:]  # the third epoch ends in the last stage, the second in the one before
    assert best["stage"] == 2
    assert best["best"] == max(late)
    assert best["epoch"] == 3 + late.index(max(late))
    metrics = ending(events)
    s_dense = cost(build_model(SPARSE), 8)
    assert metrics["cost/gmac"] == s_dense.gmac
    assert metrics["cost/params"] == s_dense.params
    assert metrics["cost/gmac_router"] == 0
    whole = cost(build_model(SPARSE, 0), 8)
    assert metrics["cost/ratio_to_dense"] == pytest.approx(s_dense.gmac / whole.gmac)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["test/ra_worst"] <= metrics["test/sa"]


@pytest.mark.parametrize(
    "updates",
    [
        5,  # the newest checkpoint is the dense net's, the next update begins with its scores
        6,  # in the second stage
        8,  # before the channels are cut
        9,  # after
    ],
)
def test_run_interrupted_near_a_change_ends_as_if_it_had_not_been(
    straight: tuple[Path, Events], tmp_path: Path, updates: int
) -> None:
    with pytest.raises(StopError):
        run(SPARSE, tmp_path, stop_at("progress", updates + 1))
    torch.rand(3)
    events = run(SPARSE, tmp_path)
    resumed = next(event for event in events if event["kind"] == "resumed")
    assert 3 * resumed["epoch"] + resumed["step"] == updates
    assert_equal_runs(straight[0], tmp_path)
    assert ending(events) == ending(straight[1])


def test_shortest_run_has_an_update_for_each_stage(tmp_path: Path) -> None:
    metrics = fit(override(SPARSE, {"epochs": 1}), tmp_path)
    best = checkpoint.verify(tmp_path / "checkpoints" / "best")
    assert (best["stage"], best["update"]) == (2, 3)
    assert metrics["cost/params"] == cost(build_model(SPARSE), 8).params


# Two workers


def work(rank: int, folder: str) -> None:
    state, found = state_at(0, average=Session(rank, 2).average), {}
    for stage in range(3):
        if stage:
            advance(SPARSE, state, stage)
        updates(state, 2, rank, 2)
        found[stage] = copy.deepcopy(state.model.state_dict())
    torch.save(found, f"{folder}/{rank}.pt")


def test_replicas_prune_alike_and_stay_equal_to_the_bit(tmp_path: Path) -> None:
    """Each sees other images: what they prune follows from the scores that they average."""
    run_pair(work, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for stage in range(3):
        differing = [k for k in one[stage] if not torch.equal(one[stage][k], other[stage][k])]
        assert differing == []
