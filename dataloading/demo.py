"""The embedded demo images: small prints of ten motifs, made by code from a seed; nothing is downloaded.

The class is the motif: its outline and its pattern. Everything else varies, and most of it *within* an image too: every
copy of the motif has its own hue, polarity, rotation and proportions, and the background runs from dark to light. This
is on purpose. Whatever is constant within an image and differs between images is what instance discrimination learns
first; here the class is nearly all that is left. What stays, and what the augmentation of a recipe should vary: the
scale (random crops), the direction of light and background (flips, rotations), the background's hue (hue, grayscale).

Measured with seed 0, kNN on the test split (chance 10 %): raw pixels 14.4 % (k = 20) and 13.9 % (k = 200), colour
histograms 11.7 %, mean colours 12.0 %, sorted luma 20.0 %. A ResNet-18 of width 16 trained with labels for
10 epochs: 99.3 %.

Shapes: N rows asked for, B images of one class, T = 25 cells of the table, H = W pixels of a side, C = 3 colours.
"""

from __future__ import annotations

import hashlib
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataloading.cache import Fetched, ShardCache
from dataloading.demo_shapes import MOTIFS, Array, Motif, cosine, sine
from dataloading.philox import Purpose, uniforms

CLASS_NAMES: tuple[str, ...] = tuple(motif.name for motif in MOTIFS)
NUM_ROWS = {"train": 4_000, "test": 1_000}
SIZE = 32

# The splits differ in the word that names the visit, so no image of one is an image of the other.
_VISITS = {"train": 0, "test": 1}
_LABEL_VIEW, _IMAGE_VIEW, _CELL_VIEW = 0, 1, 2
_OVERSAMPLING = 2
_IMAGES_AT_ONCE = 50  # their arrays fit into the cache of a core
_TABLE_SIDE = 5  # the lattice repeats after five cells, more than fit into an image
_RADIUS = 0.39  # of a motif, in cells: tips just reach the cell's border
_NUM_BLOBS = 3
_SHA256 = {
    "train": "49cd80d232c37926da62016fc72520bf5a4b554e84f39ae46a27ff0c598ae8af",
    "test": "d5206056b35eaa7ff64870aae152537ce36dccdd186b22797bb1c4b12e83c3b6",
}
"""Of all images of a split with seed 0."""
_MAKER_TIMEOUT_S = 60.0


class _Image(NamedTuple):
    """What is drawn once for an image: uniform numbers in [0, 1), float64 (B,) each."""

    spacing: Array
    turn: Array
    shift_across: Array
    shift_down: Array
    light: Array
    ramp: Array
    hue: Array
    hue_change: Array
    chroma: Array


class _Cells(NamedTuple):
    """What is drawn for every copy of the motif: uniform numbers in [0, 1), float64 (B, T) each."""

    turn: Array
    proportion_1: Array
    proportion_2: Array
    proportion_3: Array
    polarity: Array
    dark: Array
    bright: Array
    hue: Array
    chroma: Array


class _Lattice(NamedTuple):
    """Where each pixel stands in the staggered lattice of cells that the copies of the motif fill."""

    across: Array
    """Float32 (B, H, W): from the middle of its cell, in cells, -0.5 to 0.5."""
    down: Array
    """Likewise."""
    cells: NDArray[np.int64]
    """int64 (B, H, W): its cell's place in a flattened (B, T) table."""


def demo_images(split: str, *, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return a whole split: images uint8 (N, 32, 32, 3) and labels int64 (N,), indices into `CLASS_NAMES`.

    split: "train" (4,000 images) or "test" (1,000); every class has as many images as any other. The same seed
    gives the same bytes on every machine. Takes about three seconds. Raises ValueError for another split.
    """
    return demo_rows(split, np.arange(NUM_ROWS.get(split, 0)), seed=seed)


def kept_demo_images(split: str, cache: ShardCache) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return what `demo_images` does with seed 0, made once on this machine: the cache keeps the images.

    What the cache holds is used only if it has the right SHA-256. Of several processes one makes the images.
    """
    if split not in NUM_ROWS:
        return demo_images(split)
    key, num_bytes = f"demo/{split}-{_SHA256[split][:16]}", NUM_ROWS[split] * SIZE * SIZE * 3

    def make(descriptor: int) -> None:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(demo_images(split)[0].tobytes())

    deadline = time.monotonic() + _MAKER_TIMEOUT_S
    while cache.fetch(key, num_bytes, make, time.time()) is Fetched.BUSY and time.monotonic() < deadline:
        time.sleep(0.02)
    images_NHWC = np.empty((NUM_ROWS[split], SIZE, SIZE, 3), dtype=np.uint8)
    descriptor = cache.open(key)
    if descriptor is not None:
        with open(descriptor, "rb") as file:
            num_read = file.readinto(images_NHWC.data.cast("B"))
        if num_read == num_bytes and hashlib.sha256(images_NHWC.data).hexdigest() == _SHA256[split]:
            return images_NHWC, _labels(np.arange(NUM_ROWS[split]), _VISITS[split], seed=0)
        cache.remove(key)
    return demo_images(split)


def demo_rows(split: str, rows_N: ArrayLike, *, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return some rows of a split, like `demo_images`: each is a pure function of (seed, split, row)."""
    if split not in NUM_ROWS:
        raise ValueError(f"split of the demo images: found {split!r}, expected one of {', '.join(NUM_ROWS)}")
    rows = np.asarray(rows_N, dtype=np.int64)
    outside = rows[(rows < 0) | (rows >= NUM_ROWS[split])]
    if len(outside):
        raise ValueError(f"row of the demo images: found {outside[0]}, expected 0 to {NUM_ROWS[split] - 1}")
    labels_N = _labels(rows, _VISITS[split], seed)
    images_NHWC = np.empty((len(rows), SIZE, SIZE, 3), dtype=np.uint8)
    for label, motif in enumerate(MOTIFS):
        same = np.flatnonzero(labels_N == label)
        for start in range(0, len(same), _IMAGES_AT_ONCE):
            chosen = same[start : start + _IMAGES_AT_ONCE]
            images_NHWC[chosen] = _print(motif, rows[chosen], _VISITS[split], seed)
    return images_NHWC, labels_N


def _labels(rows_N: NDArray[np.int64], visit: int, seed: int) -> NDArray[np.int64]:
    """Return labels int64 (N,): every block of ten rows holds each class once, in a random order."""
    num_classes = len(MOTIFS)
    blocks, offsets = np.divmod(rows_N, num_classes)
    draws = _draw(blocks, visit, seed, _LABEL_VIEW, num_classes)
    return np.argsort(draws, axis=1)[np.arange(len(rows_N)), offsets]


def _draw(rows_B: NDArray[np.int64], visit: int, seed: int, view: int, num_draws: int) -> Array:
    visits_B = np.full(len(rows_B), visit)
    return uniforms(seed, visits_B, rows_B, view=view, purpose=Purpose.DEMO, num_draws=num_draws)


def _print(motif: Motif, rows_B: NDArray[np.int64], visit: int, seed: int) -> NDArray[np.uint8]:
    """Return the images of these rows, all of one class, uint8 (B, H, W, C)."""
    num_image_draws = len(_Image._fields) + 4 * _NUM_BLOBS
    draws_KB = _draw(rows_B, visit, seed, _IMAGE_VIEW, num_image_draws).T
    image, blobs_KB = _Image(*draws_KB[: len(_Image._fields)]), draws_KB[len(_Image._fields) :]
    cell_draws = _draw(rows_B, visit, seed, _CELL_VIEW, len(_Cells._fields) * _TABLE_SIDE**2)
    cells = _Cells(*cell_draws.reshape(len(rows_B), len(_Cells._fields), -1).swapaxes(0, 1))

    cover, first = _coverage(motif, image, cells)
    lattice = _lattice(image, oversampling=1)
    shading, gloss, shadow = _lighting(image, lattice)
    background = _background(image, blobs_KB) * shadow[..., None]
    first_tone, second_tone = (tone.reshape(-1, 3)[lattice.cells] for tone in _tones(cells))
    copies = second_tone * (cover - first)[..., None] + first_tone * first[..., None]
    painted = background * (1 - cover)[..., None] + copies * shading[..., None] + (gloss * cover)[..., None]
    x, y = _pixels(oversampling=1)
    # One lamp for the whole image: raw pixels are mostly its brightness, a local contrast does not see it.
    lamp = 0.84 + (x * _each(cosine(image.light)) + y * _each(sine(image.light))) * np.float32(0.34 * 2 / SIZE)
    return np.floor(np.clip(painted * lamp[..., None], 0, 1) * 255 + 0.5).astype(np.uint8)


def _each(values_B: Array) -> Array:
    """Return one value per image as float32 (B, 1, 1), beside pixels."""
    return np.asarray(values_B, dtype=np.float32)[:, None, None]


def _pixels(oversampling: int) -> tuple[Array, Array]:
    """Return x (1, 1, W) and y (1, H, 1) of the samples, float32, in pixels from the middle of the image."""
    middles = (np.arange(SIZE * oversampling) + 0.5) / oversampling - SIZE / 2
    return middles.astype(np.float32)[None, None, :], middles.astype(np.float32)[None, :, None]


def _spacing(image: _Image) -> Array:
    """Return the side of a cell in pixels, (B,): about three to six copies of the motif to an image."""
    return 13.4 + 4.8 * image.spacing


def _lattice(image: _Image, *, oversampling: int) -> _Lattice:
    x, y = _pixels(oversampling)
    cos = _each(cosine(image.turn) / _spacing(image))
    sin = _each(sine(image.turn) / _spacing(image))
    across = x * cos + y * sin + _each(image.shift_across)
    down = y * cos - x * sin + _each(image.shift_down)
    row = np.floor(down)
    across = across + 0.5 * (row - 2 * np.floor(row / 2))  # every other row is staggered
    column = np.floor(across)
    table_row, table_column = (i - _TABLE_SIDE * np.floor(i / _TABLE_SIDE) for i in (row, column))
    tables = np.arange(len(image.turn))[:, None, None] * _TABLE_SIDE**2
    cells = (table_row * _TABLE_SIDE + table_column).astype(np.int64) + tables
    return _Lattice(across - column - np.float32(0.5), down - row - np.float32(0.5), cells)


def _coverage(motif: Motif, image: _Image, cells: _Cells) -> tuple[Array, Array]:
    """Return how much of each pixel the motif covers, and its first tone, float32 (B, H, W), 0 to 1."""
    lattice = _lattice(image, oversampling=_OVERSAMPLING)

    def look_up(table_BT: Array) -> Array:
        return table_BT.astype(np.float32).reshape(-1)[lattice.cells]

    radius = _RADIUS * motif.size
    cos, sin = look_up(cosine(cells.turn) / radius), look_up(sine(cells.turn) / radius)
    u, v = lattice.across * cos + lattice.down * sin, lattice.down * cos - lattice.across * sin
    proportions = look_up(cells.proportion_1), look_up(cells.proportion_2), look_up(cells.proportion_3)
    outline, tone = motif.draw(u, v, proportions)
    # An edge is as wide as a sample and a bit: smooth at 2 x 2 samples to a pixel, yet not soft.
    sharpness = _each(1.4 * radius * _spacing(image))
    cover = np.clip(0.5 - outline * sharpness, 0, 1)
    first = cover * np.clip(0.5 + tone * sharpness, 0, 1)
    return _pixel_means(cover), _pixel_means(first)


def _pixel_means(samples: Array) -> Array:
    # Written out, because the order in which a library's mean adds up is its own affair.
    top = samples[:, ::2, ::2] + samples[:, ::2, 1::2]
    bottom = samples[:, 1::2, ::2] + samples[:, 1::2, 1::2]
    return (top + bottom) * np.float32(0.25)


def _lighting(image: _Image, lattice: _Lattice) -> tuple[Array, Array, Array]:
    """Return the shading and the highlight of the copies and the shadow that they cast, float32 (B, H, W)."""
    light_across = _each(cosine(image.light - image.turn))
    light_down = _each(sine(image.light - image.turn))
    across, down = lattice.across / np.float32(_RADIUS), lattice.down / np.float32(_RADIUS)
    shading = 1 + 0.2 * np.clip(across * light_across + down * light_down, -1, 1)
    from_gloss = (across - 0.45 * light_across) ** 2 + (down - 0.45 * light_down) ** 2
    gloss = np.maximum(1 - 4 * from_gloss, 0) ** 2 * np.float32(0.2)
    from_shadow = np.sqrt((across + 0.2 * light_across) ** 2 + (down + 0.2 * light_down) ** 2)
    return shading, gloss, 1 - 0.4 * np.clip(2.5 - 2 * from_shadow, 0, 1)


def _background(image: _Image, blobs_KB: Array) -> Array:
    """Return a ramp between two hues, dark to light, with soft blobs, float32 (B, H, W, C)."""
    x, y = _pixels(oversampling=1)
    along = x * _each(cosine(image.ramp)) + y * _each(sine(image.ramp))
    ramp = np.clip(0.5 + along * np.float32(1 / 36), 0, 1)
    luma = 0.25 + 0.5 * ramp
    for blob_x, blob_y, radius, strength in blobs_KB.reshape(_NUM_BLOBS, 4, -1):
        distance = (x - _each(40 * blob_x - 20)) ** 2 + (y - _each(40 * blob_y - 20)) ** 2
        blob = np.maximum(1 - distance / _each((7 + 8 * radius) ** 2), 0) ** 2
        luma = luma + blob * _each(0.3 * strength - 0.15)
    amount = 0.05 + 0.1 * image.chroma
    start = _chroma(image.hue, amount)[:, None, None, :]
    stop = _chroma(image.hue + 0.5 * (image.hue_change - 0.5), amount)[:, None, None, :]
    return luma[..., None] + start + (stop - start) * ramp[..., None]


def _tones(cells: _Cells) -> tuple[Array, Array]:
    """Return the two colours of every copy, float32 (B, T, C): one dark, one bright, of neighbouring hues."""
    dark, bright = 0.08 + 0.18 * cells.dark, 0.72 + 0.2 * cells.bright
    dark_first = cells.polarity < 0.5
    amount = 0.08 + 0.18 * cells.chroma
    first = np.where(dark_first, dark, bright)[..., None] + _chroma(cells.hue, amount)
    second_hue = cells.hue + 0.25 * (cells.bright - 0.5)
    second = np.where(dark_first, bright, dark)[..., None] + _chroma(second_hue, amount)
    return first.astype(np.float32), second.astype(np.float32)


def _chroma(hue: Array, amount: Array) -> Array:
    """Return what makes grey a colour of this hue (in turns) and the same luma, float32 (..., C): YIQ to RGB."""
    i, q = amount * cosine(hue), amount * sine(hue)
    red, green, blue = 0.956 * i + 0.621 * q, -0.272 * i - 0.647 * q, -1.106 * i + 1.703 * q
    return np.stack([red, green, blue], axis=-1).astype(np.float32)
