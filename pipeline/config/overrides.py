"""Dotted overrides of a config: parsing, flattening, and names of components."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from moe.backbones import BACKBONES
from pipeline.algorithms import ALGORITHMS
from pipeline.attacks import ATTACKS
from pipeline.config.worker_range import Elastic, read_workers
from pipeline.data import DATASETS
from pipeline.nearest_names import unknown

C = TypeVar("C")


REGISTRIES: dict[str, Mapping[str, type[Any]]] = {
    "dataset": DATASETS,
    "backbone": BACKBONES,
    "expert": BACKBONES,
    "standard": BACKBONES,
    "robust": BACKBONES,
    "algorithm": ALGORITHMS,
    "attack": ATTACKS,
}


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Write a config as dotted keys and plain values; ``override(Config(), ...)`` reads it back."""
    flat: dict[str, Any] = {}
    for field in fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if not is_dataclass(value):
            flat[key] = str(value) if isinstance(value, Elastic) else value
            continue
        if field.name in REGISTRIES:
            flat[key] = name_of(field.name, value)
        flat |= flatten(value, f"{key}.")
    return flat


def name_of(registry: str, component: Any) -> str:
    """Name a component as its registry does."""
    return next(name for name, kind in REGISTRIES[registry].items() if type(component) is kind)


def override(node: C, changes: Mapping[str, Any], prefix: str = "") -> C:
    """Replace dotted fields: ``override(config, {"algorithm": "adv_moe", "algorithm.beta": 3.0})``.

    The one way in for the command line, Ray Tune and tests. Strings are parsed by the type of the
    field (``8/255`` is a float). The order of ``changes`` does not matter; every dataclass that
    changes is validated once, in its final state. Changing a component keeps the settings that the
    old and the new one share by name, so that ``algorithm=moe_at`` trains under the same attack.

    Raises:
        ValueError: No such field or component, or the result is not valid.
    """
    new: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    hints = typing.get_type_hints(type(node))
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if name not in [field.name for field in fields(node)]:  # type: ignore[arg-type]
            raise unknown("key", prefix + path, _keys(node, prefix))
        if rest:
            inner.setdefault(name, {})[rest] = value
        elif name in REGISTRIES:
            own = {key.split(".")[1] for key in changes if key.startswith(f"{name}.")}
            new[name] = _switch(prefix, name, value, getattr(node, name), own)
        elif is_dataclass(getattr(node, name)):
            raise ValueError(f"{prefix + name} has keys of its own, such as {prefix + name}.eps")
        else:
            new[name] = parse(prefix + name, value, hints[name])
    for name, nested in inner.items():
        target = new.get(name, getattr(node, name))
        if not is_dataclass(target):
            raise ValueError(f"no key {prefix + name + '.' + next(iter(nested))!r}")
        new[name] = override(target, nested, f"{prefix}{name}.")
    try:
        return replace(node, **new)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(prefix + str(error)) from None


def _keys(node: Any, prefix: str) -> Iterator[str]:
    """Name every dotted key of a config."""
    for field in fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        yield key
        if is_dataclass(value):
            yield from _keys(value, f"{key}.")


def _switch(prefix: str, name: str, value: Any, old: Any, own: set[str]) -> Any:
    """Change a component; ``own`` are the keys that are set anyway, and so not kept."""
    if value not in (registry := REGISTRIES[name]):
        raise unknown(prefix + name, value, registry)
    kind = registry[value]
    if type(old) is kind:
        return old
    shared = {f.name for f in fields(old)} & {f.name for f in fields(kind)}
    if name == "dataset":  # crop and flip are the data set's own unless somebody set them
        shared = {key for key in shared if getattr(old, key) != getattr(type(old)(), key)}
    try:
        return kind(**{key: getattr(old, key) for key in shared - own})
    except ValueError as error:
        raise ValueError(f"{prefix + name}.{error}") from None


def parse(key: str, value: Any, hint: Any) -> Any:
    """Read a value as the type of its field.

    Raises:
        ValueError: It is not of that type; the message names the key, the value and what is valid.
    """
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if union else (hint,)
    if types.NoneType in options:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        options = tuple(option for option in options if option is not types.NoneType)
    kind = Elastic if Elastic in options else options[0]
    if typing.get_origin(kind) is Literal:
        if value in (valid := typing.get_args(kind)):
            return value
        raise ValueError(f"{key} must be one of {', '.join(map(str, valid))}, got {value!r}")
    try:
        return _as(kind, value)
    except (ValueError, TypeError, ZeroDivisionError):
        wanted = {
            int: "a whole number",
            float: "a number such as 0.1 or 8/255",
            bool: "true or false",
            Elastic: "a whole number or a range such as 1..4",
        }
        raise ValueError(
            f"{key} must be {wanted.get(kind, kind.__name__)}, got {value!r}"
        ) from None


def _as(kind: Any, value: Any) -> Any:
    if kind is str and not isinstance(value, str):
        raise TypeError
    if kind is Elastic:
        return read_workers(value)
    if kind is bool:
        if (text := str(value).lower()) not in ("true", "false", "1", "0"):
            raise ValueError
        return text in ("true", "1")
    if isinstance(value, bool):
        raise TypeError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    if kind is float:
        top, slash, bottom = str(value).partition("/")
        return float(top) / float(bottom) if slash else float(value)
    return kind(value)
