"""Overrides as they are typed: --section.field VALUE or --section.field=VALUE."""

from __future__ import annotations

from collections.abc import Sequence

from instdisc.overrides import OverrideError


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Return the overrides by dotted name. Raises OverrideError for what is none."""
    overrides: dict[str, str] = {}
    waiting: str | None = None
    for argument in arguments:
        if waiting is not None:
            overrides[waiting], waiting = argument, None
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
