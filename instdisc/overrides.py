"""Dotted overrides of nested dataclasses, with types from the annotations and the likely name for a misspelt one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

BEFORE = "before"
"""Key of a field's metadata: the value that reproduces what a version without the field did."""


class OverrideError(ValueError):
    """An override that names no field or whose value does not read as the field's type."""


def field_names(kind: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields of a dataclass and of those inside it."""
    names = []
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        inner = hints[f.name]
        if dataclasses.is_dataclass(inner):
            names += field_names(typing.cast(type, inner), f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def flatten(config: Any) -> dict[str, Any]:
    """Return every field of a dataclass of dataclasses by its dotted name."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": inner_value for inner, inner_value in value.items()})
        else:
            flat[name] = value
    return flat


def as_annotated(config: T) -> T:
    """Return the configuration with every value of its field's type: 1 is 1.0 where a float is expected."""
    return from_plain(type(config), dataclasses.asdict(config))  # pyright: ignore[reportArgumentType]


def values_before(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return, by dotted name, the value that stands for a field's absence, of all fields that a newer version added."""
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= values_before(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
        elif BEFORE in f.metadata:
            found[prefix + f.name] = f.metadata[BEFORE]
    return found


def apply_overrides(config: T, overrides: Mapping[str, Any]) -> T:
    """Return `config` with the fields named by dotted names replaced.

    Values are of the field's type, or text as typed on a command line ("0.1", "true", "none", "0.2,1"). Raises
    OverrideError for an unknown name (with the likely one) and for a value that does not fit.
    """
    known = field_names(type(config))
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in known:
            raise OverrideError(_unknown(name, known))
        section, _, rest = name.rpartition(".")
        (nested.setdefault(section, {}) if section else flat)[rest] = value
    replaced: dict[str, Any] = _read_all(type(config), flat, "")
    for section, values in nested.items():
        inner = getattr(config, section)
        replaced[section] = dataclasses.replace(inner, **_read_all(type(inner), values, f"{section}."))
    return dataclasses.replace(config, **replaced)  # pyright: ignore[reportArgumentType]


def as_typed(value: Any) -> str:
    """Return a field's value as text that `apply_overrides` reads."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def from_plain(kind: type[T], plain: Mapping[str, Any], prefix: str = "") -> T:
    """Return the dataclass that `dataclasses.asdict` turned into `plain` (through JSON, so lists are tuples).

    A field that `plain` lacks was added by a newer version: it takes the value in its metadata under `BEFORE`, which
    reproduces what the older version did, or its default where it has none.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    unknown = [name for name in plain if name not in known]
    if unknown:
        raise OverrideError(
            f"{prefix}{unknown[0]}: this version of instdisc has no such field; use the version that wrote it"
        )
    values = {
        name: from_plain(hints[name], value, f"{prefix}{name}.")
        if dataclasses.is_dataclass(hints[name])
        else _read(value, hints[name], prefix + name)
        for name, value in plain.items()
    }
    for f in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        if f.name not in plain and dataclasses.is_dataclass(hints[f.name]):
            values[f.name] = from_plain(hints[f.name], {}, f"{prefix}{f.name}.")
        elif f.name not in plain and BEFORE in f.metadata:
            values[f.name] = f.metadata[BEFORE]
    return kind(**values)


def _unknown(name: str, known: list[str]) -> str:
    likely = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not likely:
        by_last = {k.rpartition(".")[2]: k for k in known}
        likely = [by_last[m] for m in difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1, cutoff=0.6)]
    advice = f"did you mean {likely[0]}?" if likely else "`instdisc train --help` lists the fields"
    return f"unknown configuration field {name!r}: {advice}"


def _read_all(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {name: _read(value, hints[name], prefix + name) for name, value in values.items()}


def _read(value: Any, annotation: Any, name: str) -> Any:
    try:
        return _convert(value, annotation)
    except (TypeError, ValueError, OverflowError):
        raise OverrideError(f"{name}: found {value!r}, expected {_described(annotation)}") from None


def _convert(value: Any, annotation: Any) -> Any:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _convert(value, next(a for a in inner if a is not type(None)))
    if origin is tuple:
        items = (
            [item for item in value.strip("()[] ").split(",") if item.strip()]
            if isinstance(value, str)
            else list(value)
        )
        if inner[-1] is Ellipsis:
            return tuple(_convert(item, inner[0]) for item in items)
        if len(items) != len(inner):
            raise ValueError
        return tuple(_convert(item, kind) for item, kind in zip(items, inner, strict=True))
    if annotation is bool:
        text = str(value).strip().lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError
        return text in ("true", "1", "yes")
    if isinstance(value, str) and annotation in (int, float) and ("_" in value or not value.isascii()):
        raise ValueError  # Python's own numbers: 1_0 is 10 to it
    if annotation is int:
        number = float(value)
        if isinstance(value, bool) or number != int(number):
            raise ValueError
        return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdigit() else int(number)
    if annotation is float:
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
        return number + 0.0  # 0.0 and not -0.0, which is written in another way
    if annotation is str:
        if not isinstance(value, str):
            raise TypeError
        return value.strip()
    raise TypeError(f"no way to read {annotation}")


def _described(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return f"{_described(next(a for a in inner if a is not type(None)))} or none"
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a comma-separated list, each {_described(inner[0])}"
        return f"{len(inner)} comma-separated values, each {_described(inner[0])}"
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}.get(
        annotation, str(annotation)
    )
