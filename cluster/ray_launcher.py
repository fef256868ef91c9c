"""Ray's own validation of a cluster-launcher file, as `ray up` does it before it asks the cloud for anything."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config_document import Problem
from cluster.schema_problems import problems_of


def check_with_ray(config: dict[str, Any]) -> Iterator[Problem]:
    """Yield what Ray finds wrong, at most one problem."""
    logger = logging.getLogger("ray.autoscaler")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it tells each default that it fills in
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where it warns, of a mounted file for instance
            validate_config(prepare_config(copy.deepcopy(config)))
    except jsonschema.ValidationError as error:
        yield from problems_of([error])
    except (ValueError, RuntimeError, AssertionError, KeyError, TypeError, AttributeError) as error:
        yield Problem((), f"Ray says: {type(error).__name__}: {error}")
    finally:
        logger.setLevel(level)
