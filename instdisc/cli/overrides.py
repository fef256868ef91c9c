"""Overrides as they are typed: --section.field VALUE or --section.field=VALUE."""

from __future__ import annotations

from collections.abc import Sequence

from instdisc.overrides import OverrideError


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without the overrides, and the overrides: options with a dot in their name, and --seed."""
    rest: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        if takes_value and not argument.startswith("--"):
            overrides.append(argument)
            takes_value = False
        elif name == "--seed" or (name.startswith("--") and "." in name):
            overrides.append(argument)
            takes_value = not has_value
        else:
            rest.append(argument)
            takes_value = False
    return rest, overrides


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Return the overrides by dotted name. Raises OverrideError for what is none."""
    overrides: dict[str, str] = {}
    waiting: str | None = None
    for argument in arguments:
        if waiting is not None and not argument.startswith("--"):
            overrides[waiting], waiting = argument, None
        elif waiting is not None:
            break
        elif not argument.startswith("--"):
            raise OverrideError(
                f"found {argument!r}, expected --SECTION.FIELD VALUE (`instdisc train --help` lists them)"
            )
        else:
            name, has_value, value = argument[2:].partition("=")
            if has_value:
                overrides[name] = value
            else:
                waiting = name
    if waiting is not None:
        raise OverrideError(f"--{waiting}: found no value after it, expected --{waiting} VALUE")
    return overrides
