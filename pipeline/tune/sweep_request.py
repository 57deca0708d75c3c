"""What a command line asks of a sweep, and whether a point of it can be run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.overrides import flatten, override, parse
from pipeline.config.worker_range import Elastic
from pipeline.nearest_names import unknown
from pipeline.presets import PRESETS
from pipeline.presets.paper_grid import costs
from pipeline.storage.run_folder import run_folder
from tune_spaces import SPACES, Space

OWN = {
    "num_samples": int,
    "concurrent": int,
    "finalists": int,
    "search": str,
    "scheduler": str,
    "max_gmac": float,
}
SEARCHES = ("random", "optuna")
SCHEDULERS = ("asha", "none")


@dataclass(frozen=True)
class SweepRequest:
    """A sweep.

    Attributes:
        name, space: Of ``tune_spaces``.
        preset, base: The run that is varied, with the command line's settings.
        keys: What is searched: the space's keys less those that the command line fixes.
        samples: Trials, the infeasible ones included.
        search: ``random``, ``optuna``, or ``grid``, which is the space's own.
        scheduler: ``asha`` or ``none``.
        max_gmac: A trial whose net costs more is not run; None: any.
        concurrent: Trials at a time; None: as many as there is room for.
        finalists: Members of the front that are judged on the test split.
    """

    name: str
    space: Space
    preset: str
    base: Config
    keys: Mapping[str, Any]
    samples: int
    search: str
    scheduler: str
    max_gmac: float | None = None
    concurrent: int | None = None
    finalists: int = 1

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values of the keys of a grid that are not fixed."""
        return {key: values for key, values in self.space.grid.items() if key in self.keys}

    @property
    def folder(self) -> Path:
        """The sweep's folder: the same search finds it again, be it of more trials than before."""
        parts = [
            self.name,
            sorted((key, described(sampler)) for key, sampler in self.keys.items()),
            self.base.fingerprint,
            self.search,
            self.scheduler,
            self.max_gmac,
            *(self.space.objectives, self.space.watched, self.space.grace, self.space.reduction),
        ]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return run_folder(self.base).parent / f"tune-{self.name}-{digest[:8]}"

    def trial_folder(self, trial: str) -> Path:
        """Name the folder of a trial, apart from that of a run of the same settings."""
        return self.folder / "trials" / trial

    def config(self, trial: str, point: Mapping[str, Any]) -> Config:
        """Make the run of a trial.

        Raises:
            ValueError: There is no such run.
        """
        return override(self.base, {**point, "name": f"{self.name}-{trial}"})


@dataclass(frozen=True)
class Prospect:
    """What can be said of a point without running it.

    Attributes:
        config: None if there is no such run.
        costs: ``cost/gmac`` and so on, as of a run that has ended.
        reason: Why it is not run; empty: it is.
    """

    config: Config | None
    costs: Mapping[str, float]
    reason: str = ""


def prospect(request: SweepRequest, trial: str, point: Mapping[str, Any]) -> Prospect:
    """Look whether a point can be run: valid settings, a channel in every layer, not too dear."""
    try:
        config = request.config(trial, point)
        own, dense = costs(config)
    except ValueError as error:
        return Prospect(None, {}, str(error))
    found = {
        "cost/gmac": own.gmac,
        "cost/gmac_router": own.gmac_router,
        "cost/params": float(own.params),
        "cost/ratio_to_dense": own.gmac / dense.gmac,
    }
    if request.max_gmac is not None and own.gmac > request.max_gmac:
        reason = f"cost/gmac must be at most max_gmac={request.max_gmac:g}, got {own.gmac:.4g}"
        return Prospect(config, found, reason)
    return Prospect(config, found)


def read_request(names: tuple[str, ...], settings: Mapping[str, str]) -> SweepRequest:
    """Make the sweep that a command line asks for.

    Raises:
        ValueError: A name, key or value is not valid, or the preset lacks a key of the space.
    """
    if not names:
        raise ValueError(f"which space? one of {', '.join(SPACES)}")
    if (name := names[0]) not in SPACES:
        raise unknown("space", name, SPACES)
    space = SPACES[name]
    preset = names[1] if len(names) > 1 else space.preset
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    own = {key: parse(key, settings[key], kind) for key, kind in OWN.items() if key in settings}
    rest = {key: value for key, value in settings.items() if key not in OWN}
    base = override(PRESETS[preset](), {"workers": space.workers, **rest})
    if isinstance(base.workers, Elastic):
        raise ValueError(f"workers must be a whole number for a sweep, got {base.workers}")
    if "://" in base.storage:
        raise ValueError(
            f"storage must be a folder that all nodes share for a sweep, got {base.storage!r}"
        )
    keys = {key: sampler for key, sampler in space.keys.items() if key not in rest}
    known = flatten(base)
    if lacking := [key for key in keys if key not in known]:
        raise ValueError(f"no key {lacking[0]!r} in {preset}, which space {name} searches")
    if not keys:
        raise ValueError(f"nothing to search: every key of space {name} is given a value")
    return SweepRequest(name, space, preset, base, keys, **limits(space, keys, own))


def limits(space: Space, keys: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Check what is the sweep's own, and fill in what the space says."""
    points = 1
    for key, values in space.grid.items():
        points *= len(values) if key in keys else 1
    found = {"num_samples": points if space.grid else space.num_samples, **own}
    for key, least in (("num_samples", 1), ("concurrent", 1), ("finalists", 0)):
        if key in found and found[key] < least:
            raise ValueError(f"{key} must be at least {least}, got {found[key]}")
    if not found.get("max_gmac", 1.0) > 0:
        raise ValueError(f"max_gmac must be above 0, got {found['max_gmac']}")
    samples = found.pop("num_samples")
    if space.grid and samples > points:
        raise ValueError(f"num_samples must be at most the grid's {points} points, got {samples}")
    if space.grid and "search" in own:
        raise ValueError(f"search must be left out for a grid, got {own['search']!r}")
    search = "grid" if space.grid else found.pop("search", "random")
    if search == "pbt":
        raise ValueError(
            "search must be random or optuna, got 'pbt': population based training does nothing "
            "under Ray Train V2, where Tune has no checkpoint to copy"
        )
    if not space.grid and search not in SEARCHES:
        raise ValueError(f"search must be {' or '.join(SEARCHES)}, got {search!r}")
    if search == "optuna" and find_spec("optuna") is None:
        raise ValueError("search=optuna needs the package: pip install 'robust-moe[search]'")
    scheduler = found.pop("scheduler", "none" if space.grid else "asha")  # a table wants all rows
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler must be {' or '.join(SCHEDULERS)}, got {scheduler!r}")
    return {"samples": samples, "search": search, "scheduler": scheduler, **found}


def described(sampler: Any) -> str:
    """Tell a sampler from others by what it draws."""
    if isinstance(sampler, dict):
        return json.dumps(sampler)
    return f"{type(sampler).__name__} {type(sampler.get_sampler()).__name__} {sampler.domain_str}"
