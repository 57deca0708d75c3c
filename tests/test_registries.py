"""Every entry of every registry is a component in the house's sense."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from moe.backbones import BACKBONES
from pipeline.algorithms import ALGORITHMS
from pipeline.attacks import ATTACKS
from pipeline.data import DATASETS
from pipeline.measures import MEASURES

REGISTRIES: list[Mapping[str, Any]] = [BACKBONES, DATASETS, ATTACKS, ALGORITHMS, MEASURES]
ENTRIES = [
    pytest.param(name, kind, id=f"{kind.__module__}-{name}")
    for registry in REGISTRIES
    for name, kind in registry.items()
]


@pytest.mark.parametrize(("name", "kind"), ENTRIES)
def test_entry_is_a_frozen_dataclass_with_a_default_for_every_field(name: str, kind: Any) -> None:
    component = kind()
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert component == kind()
    assert hash(component) == hash(kind())
    assert dataclasses.replace(component) == component


@pytest.mark.parametrize(("name", "kind"), ENTRIES)
def test_entry_says_what_it_is_and_its_fields_are_documented(name: str, kind: Any) -> None:
    assert name == name.lower()
    assert name.replace("_", "").isalnum()
    text = kind.__doc__ or ""
    assert text.splitlines()[0].rstrip().endswith((".", ":"))
    said = " ".join(base.__doc__ or "" for base in kind.__mro__ if dataclasses.is_dataclass(base))
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in said]
    assert set(missing) <= {"attack"}, "of a measure, the base says what its attack is"


@pytest.mark.parametrize("registry", REGISTRIES)
def test_no_class_is_registered_twice(registry: Mapping[str, Any]) -> None:
    assert len(set(registry.values())) == len(registry)
