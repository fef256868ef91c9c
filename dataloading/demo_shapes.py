"""The ten motifs of the demo images: an outline and a pattern of two tones each, as signed distances.

Only + - * / sqrt, floor and comparisons are used, which IEEE 754 rounds alike on every machine, so that the demo
images are the same bytes everywhere; cosine and angle are polynomials for that reason.

A motif is a function (u, v, draws) -> (outline, tone). u, v: float32 coordinates in which the motif has a radius of
about 1. draws: three arrays of uniform numbers that vary it. outline: the distance to the edge, negative inside.
tone: the distance to the border of the two tones, positive in the first one. Near the edge and the border both
are distances in units of u; elsewhere only their signs count. All arrays of a call have one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Draws = tuple[Array, Array, Array]


def cosine(turns: Array) -> Array:
    """Return cos(2 pi turns) by its Taylor polynomial, error below 1e-6 in float64."""
    folded = np.abs(turns - np.floor(turns + 0.5))
    # cos(x) = -cos(pi - x): the polynomial is used up to a quarter turn only, where it is accurate.
    mirrored = np.minimum(folded, 0.5 - folded)
    square = mirrored * mirrored * 39.4784176
    series = square * (-1 / 720 + square * (1 / 40320 - square / 3628800))
    series = 1 + square * (-1 / 2 + square * (1 / 24 + series))
    return np.where(folded > 0.25, -series, series)


def sine(turns: Array) -> Array:
    """Return sin(2 pi turns), like `cosine`."""
    return cosine(turns - 0.25)


def angle(u: Array, v: Array) -> Array:
    """Return the angle of (u, v) in turns, -0.5 to 0.5, error below 1e-3 turns."""
    across, along = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    ratio = across / np.maximum(along, 1e-6)
    square = ratio * ratio
    eighth = ratio * (0.15886 + square * (-0.0491 + square * 0.01525))
    quarter = np.where(np.abs(v) > np.abs(u), 0.25 - eighth, eighth)
    half = np.where(u < 0, 0.5 - quarter, quarter)
    return np.where(v < 0, -half, half)


def _radius(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v)


def _wave(phase: Array) -> Array:
    """Triangle wave of period 1 and slope 1: its value is the distance to its zeros, 0.25 at whole numbers."""
    return 0.25 - np.abs(phase - np.floor(phase + 0.5))


def _rounded_box(u: Array, v: Array, half_side: float, rounding: float) -> Array:
    beyond_u, beyond_v = np.abs(u) - (half_side - rounding), np.abs(v) - (half_side - rounding)
    corner = _radius(np.maximum(beyond_u, 0), np.maximum(beyond_v, 0))
    return corner + np.minimum(np.maximum(beyond_u, beyond_v), 0) - rounding


def _target(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    frequency = 1.35 + 0.35 * draws[0]
    radius = _radius(u, v)
    return radius - 1, _wave(radius * frequency + 0.3 * draws[1]) / frequency


def _checker(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    frequency = 0.62 + 0.12 * draws[0]
    columns, rows = _wave(u * frequency + draws[1]), _wave(v * frequency + draws[2])
    nearest = np.minimum(np.abs(columns), np.abs(rows)) / frequency
    return _rounded_box(u, v, 0.89, 0.1), np.where(columns * rows > 0, nearest, -nearest)


def _stripes(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    frequency = 0.75 + 0.2 * draws[0]
    return _rounded_box(u, v, 0.92, 0.45), _wave(u * frequency + draws[1]) / frequency


def _dots(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    # Two rectangular lattices, one in the middles of the other: together the hexagonal lattice.
    frequency = 0.9 + 0.15 * draws[0]
    a, b = u * frequency + draws[1], v * frequency * 0.57735 + draws[2]
    first = _radius(a - np.floor(a + 0.5), (b - np.floor(b + 0.5)) * 1.73205)
    second = _radius(a - np.floor(a) - 0.5, (b - np.floor(b) - 0.5) * 1.73205)
    return _radius(u, v) - 1, (np.minimum(first, second) - 0.36) / frequency


def _star(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    arms = angle(u, v) * 5
    from_axis = (arms - np.floor(arms + 0.5)) / 5
    radius = _radius(u, v)
    along, across = radius * cosine(from_axis), radius * np.abs(sine(from_axis))
    # The edge of an arm: the line from the tip (1.3, 0) to the notch at a tenth of a turn.
    notch = 0.64 + 0.1 * draws[0]
    step_u, step_v = 0.80902 * notch - 1.3, 0.58779 * notch
    outline = ((along - 1.3) * step_v - across * step_u) / _radius(step_u, step_v)
    return outline, radius * sine(from_axis)


def _spiral(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    frequency = 1.0 + 0.25 * draws[0]
    radius = _radius(u, v)
    arm = np.where(draws[1] < 0.5, 1, -1) * angle(u, v)
    return radius - 1, _wave(radius * frequency + arm) / frequency


def _gear(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    radius = _radius(u, v)
    teeth = np.clip(_wave(angle(u, v) * np.floor(7 + 2 * draws[0])) * 12, -1, 1)
    return radius - 0.93 - 0.2 * teeth, radius - 0.48 - 0.08 * draws[1]


def _triangle(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    # The distance from the middle to the nearest of three sides; the corners are cut off by a circle.
    inward = np.maximum(v, 0.866025 * np.abs(u) - 0.5 * v)
    return np.maximum(inward - 0.8, _radius(u, v) - 1.28), inward - 0.46 - 0.1 * draws[0]


def _pinwheel(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    num_blades = np.floor(3 + 2 * draws[0])
    radius = _radius(u, v)
    return radius - 1, _wave(angle(u, v) * num_blades) * radius * 6.28319 / num_blades


def _leaf(u: Array, v: Array, draws: Draws) -> tuple[Array, Array]:
    # Two circular arcs through the tips (0, 1.4) and (0, -1.4), half_width apart from the axis.
    half_width = 0.7 + 0.1 * draws[0]
    centre = (1.96 - half_width * half_width) / (2 * half_width)
    frequency = 0.8 + 0.2 * draws[1]
    veins = _wave((v - np.abs(u)) * frequency + draws[2]) / (1.41421 * frequency)
    return _radius(np.abs(u) + centre, v) - centre - half_width, veins


class Motif(NamedTuple):
    """A class of the demo data: its name, its function and the size that gives every class the same area."""

    name: str
    draw: Callable[[Array, Array, Draws], tuple[Array, Array]]
    size: float


MOTIFS = (
    Motif("target", _target, 0.960),
    Motif("checker", _checker, 0.955),
    Motif("stripes", _stripes, 0.950),
    Motif("dots", _dots, 0.960),
    Motif("star", _star, 1.049),
    Motif("spiral", _spiral, 0.960),
    Motif("gear", _gear, 1.015),
    Motif("triangle", _triangle, 0.961),
    Motif("pinwheel", _pinwheel, 0.960),
    Motif("leaf", _leaf, 0.987),
)
