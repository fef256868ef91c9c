"""Errors of JSON Schema as problems with a key: that of the unknown or missing value itself, not of its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jsonschema.exceptions import ValidationError

from cluster.config_document import Problem, unknown_key


def problems_of(errors: Iterable[ValidationError]) -> Iterator[Problem]:
    """Yield each error's problems."""
    for error in errors:
        key, expected = tuple(error.absolute_path), error.validator_value
        instance: Any = error.instance
        if error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
            known = error.schema.get("properties", {})
            for name in instance:
                if name not in known:
                    yield Problem((*key, str(name)), unknown_key(name, known))
        elif error.validator == "required" and isinstance(expected, list):
            for name in expected:
                if name not in instance:
                    yield Problem((*key, name), "is missing, and required here")
        else:
            yield Problem(key, f"found {_told(error.instance)}, {_expected(str(error.validator), expected)}")


def _expected(validator: str, value: Any) -> str:
    if validator == "type":
        return f"expected {value if isinstance(value, str) else ' or '.join(value)}"
    if validator == "enum":
        return f"expected one of {', '.join(map(str, value))}"
    known = {
        "const": "expected {}",
        "minimum": "expected at least {}",
        "maximum": "expected at most {}",
        "minItems": "expected at least {} of them",
        "minLength": "expected at least {} characters",
        "pattern": "expected the form {}",
    }
    return known.get(validator, f"which does not fit {validator} {{}}").format(value)


def _told(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({'null' if value is None else type(value).__name__})"
