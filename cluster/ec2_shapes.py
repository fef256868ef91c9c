"""Values against EC2's own model of its calls (botocore's): unknown keys, wrong types, values that do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import botocore.session
from botocore.loaders import Loader
from botocore.model import ServiceModel, Shape

from cluster.config_document import Key, Problem, closest, unknown_key

_TYPES: dict[str, tuple[type, ...]] = {
    "structure": (dict,),
    "map": (dict,),
    "list": (list,),
    "string": (str,),
    "blob": (str, bytes),
    "integer": (int,),
    "long": (int,),
    "float": (int, float),
    "double": (int, float),
    "boolean": (bool,),
}


def input_shape(operation: str, *members: str) -> Shape:
    """Return the model of an EC2 call's input, such as "RunInstances", or of a part of it."""
    shape: Any = _service().operation_model(operation).input_shape
    for member in members:
        shape = shape.members[member]
    return shape


@cache
def regions() -> frozenset[str]:
    """Return the regions that EC2 is known to have."""
    session = botocore.session.Session()
    parts = session.get_available_partitions()
    return frozenset(region for part in parts for region in session.get_available_regions("ec2", part))


def check_shape(value: Any, shape: Any, key: Key) -> Iterator[Problem]:
    """Yield what in `value` does not fit the model, each with its key; numbers are held against their limits."""
    types = _TYPES.get(shape.type_name)
    if types is None:  # a timestamp: EC2 takes several forms
        return
    if not _fits(value, types):
        hint = f"; put it in quotes: '{value}'" if types == (str,) and isinstance(value, (int, float)) else ""
        yield Problem(key, f"found {_told(value)}, expected {_article(shape.type_name)}{hint}")
    elif shape.type_name == "structure":
        yield from _check_structure(value, shape, key)
    elif shape.type_name == "list":
        for position, item in enumerate(value):
            yield from check_shape(item, shape.member, (*key, position))
    elif shape.type_name == "map":
        for name, item in value.items():
            yield from check_shape(item, shape.value, (*key, str(name)))
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield Problem(key, f"found {value!r}, {_expected(value, shape.enum)}")
    elif isinstance(value, (int, float)):
        low, high = shape.metadata.get("min"), shape.metadata.get("max")
        if (low is not None and value < low) or (high is not None and value > high):
            yield Problem(key, f"found {value}, expected {low} to {high}")


def _check_structure(value: dict[str, Any], shape: Any, key: Key) -> Iterator[Problem]:
    for name, item in value.items():
        if name in shape.members:
            yield from check_shape(item, shape.members[name], (*key, name))
        else:
            yield Problem((*key, str(name)), unknown_key(name, shape.members))
    for name in shape.required_members:
        if name not in value:
            yield Problem((*key, name), "is missing, and required here")


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # to Python it is an int as well
        return bool in types
    return isinstance(value, types)


def _told(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _article(name: str) -> str:
    called = {"structure": "keys with values", "map": "keys with values", "list": "a list", "string": "a text"}
    return called.get(name) or ("an integer" if name in ("integer", "long") else f"a {name}")


def _expected(value: str, known: list[str]) -> str:
    if len(known) <= 12:
        return f"expected one of {', '.join(known)}"
    return "; ".join(filter(None, [f"expected one that botocore {version('botocore')} knows", closest(value, known)]))


@cache
def _service() -> ServiceModel:
    return ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")
