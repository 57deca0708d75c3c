"""What a command line asks of the grid: runs, and the name under which they belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.overrides import override, parse
from pipeline.presets.paper_grid import ROWS, cell, held, offered, offered_rows
from pipeline.storage.run_folder import run_folder

AXES = ("backbone", "dataset", "algorithm", "seed")
FORM = {"backbone.ratio": float, "backbone.num_experts": int}
OWN = {"name": str, "at_once": int}


@dataclass(frozen=True)
class GridRequest:
    """The runs of a grid.

    Attributes:
        configs: One a cell and seed.
        name: What the parent run is called.
        at_once: Most runs at a time; None: as many as the cluster has room for.
    """

    configs: tuple[Config, ...]
    name: str = "grid"
    at_once: int | None = None

    @property
    def folder(self) -> Path:
        """The grid's folder: the same request finds it again, whatever happened in between."""
        cells = sorted(f"{config.name} {config.fingerprint}" for config in self.configs)
        digest = hashlib.sha256(json.dumps(cells).encode()).hexdigest()
        return run_folder(self.configs[0]).parent / f"{self.name}-{digest[:8]}"


def read_request(settings: Mapping[str, str]) -> GridRequest:
    """Make the runs that a command line's settings ask for.

    ``backbone``, ``dataset``, ``algorithm`` and ``seed`` take lists. ``backbone.ratio`` and
    ``backbone.num_experts`` shape the nets that are narrow or mixtures. Any other key changes the
    runs that have it.

    Raises:
        ValueError: A name, key or value is not valid, a list names one twice, or a key is in none
            of the runs.
    """
    lists = {axis: _listed(axis, settings) for axis in AXES}
    seeds = [parse("seed", text, int) for text in lists["seed"]]
    form = {
        key.removeprefix("backbone."): parse(key, settings[key], kind)
        for key, kind in FORM.items()
        if key in settings
    }
    own = {key: parse(key, settings[key], kind) for key, kind in OWN.items() if key in settings}
    if own.get("at_once", 1) < 1:
        raise ValueError(f"at_once must be at least 1, got {own['at_once']}")
    rest = {k: v for k, v in settings.items() if k not in (*AXES, *FORM, *OWN)}
    made = [
        cell(backbone, dataset, algorithm, **form, changes=rest)
        for algorithm in lists["algorithm"]
        for dataset in lists["dataset"]
        for backbone in lists["backbone"]
    ]
    for key, shapes in (("ratio", "narrow"), ("num_experts", "mixture")):
        rows = [ROWS[name] for name in lists["algorithm"]]
        if key in form and not any(row.same_cost or getattr(row, shapes) for row in rows):
            raise ValueError(f"backbone.{key} changes none of {', '.join(lists['algorithm'])}")
    override(made[0], {"name": own.get("name", "grid")})  # refuses what is no plain name
    for key, value in rest.items():
        if not any(held(config, {key: ""}) for config in made):
            override(made[0], {key: value})  # says which keys there are
    configs = tuple(replace(config, seed=seed) for config in made for seed in seeds)
    return GridRequest(configs, **own)


def _listed(axis: str, settings: Mapping[str, Any]) -> list[str]:
    defaults = {"algorithm": "adv_moe", "seed": "0"}
    if axis not in settings:
        return [defaults[axis]] if axis in defaults else list(offered(axis))
    names = [name.strip() for name in str(settings[axis]).split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"{axis} names one twice: {settings[axis]}")
    return list(offered_rows()) if axis == "algorithm" and names == ["all"] else names
