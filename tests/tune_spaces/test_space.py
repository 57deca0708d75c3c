"""Spaces as data: what they search is there, and what cannot be a space is refused."""

from __future__ import annotations

from typing import Any

import pytest
from ray import tune

from pipeline.config.overrides import flatten, override
from pipeline.presets import PRESETS
from tune_spaces import SPACES, Space


@pytest.mark.parametrize("name", SPACES)
def test_every_key_of_a_space_is_a_setting_of_its_preset(name: str) -> None:
    space = SPACES[name]
    known = flatten(PRESETS[space.preset]())
    assert set(space.keys) <= set(known)


@pytest.mark.parametrize("name", SPACES)
def test_what_a_sampler_draws_is_a_run(name: str) -> None:
    space = SPACES[name]
    base = PRESETS[space.preset]()
    for _ in range(20 if not space.points else 1):
        point = {key: s.sample() for key, s in space.keys.items() if key not in space.grid}
        config = override(base, point | {key: v[-1] for key, v in space.grid.items()})
        assert all(flatten(config)[key] == pytest.approx(value) for key, value in point.items())


def test_ablations_are_grids_and_count_their_points() -> None:
    grids = {name: space.points for name, space in SPACES.items() if space.grid}
    assert set(grids) == {name for name in SPACES if name.startswith("ablation_")}
    assert grids["ablation_attack"] == 9
    assert SPACES["ablation_beta"].grid == {"algorithm.beta": [1, 3, 6, 9]}
    assert SPACES["adv_moe"].points == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {}}, "keys must name at least one setting, got none"),
        ({"keys": {"lr": tune.grid_search([1, 2]), "seed": tune.choice([0])}}, "grids for lr"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"reduction": 1}, "reduction must be at least 2, got 1"),
        ({"objectives": (("val/sa", "up"),)}, "mode of val/sa must be max or min, got 'up'"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"title": "t", "preset": "quickstart", "keys": {"lr": tune.uniform(0, 1)}}
    with pytest.raises(ValueError, match=message):
        Space(**settings | changes)
