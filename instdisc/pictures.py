"""Pictures for people: nearest neighbours of query images, and a batch as the network sees it.

Drawn with Pillow alone, so that a picture costs no further package and looks the same on every machine.

Shapes: B images, C = 3 colour channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]

_BACKGROUND: Colour = (255, 255, 255)
_TEXT: Colour = (31, 35, 40)
_FAINT: Colour = (101, 109, 118)
_EMPTY: Colour = (238, 240, 243)
_EDGE: Colour = (216, 222, 228)
# Okabe and Ito's bluish green and vermillion, which colour-blind people tell apart; the marks say the same again.
_RIGHT: Colour = (0, 158, 115)
_WRONG: Colour = (213, 94, 0)

_SMALL_SIDE = 64
_SMALL_CELL = 96
_LARGE_CELL = 112
_MARGIN = 24
_SPACE = 14
_GAP = 40
_FRAME = 4
_CAPTION = 26
_TITLE_SIZE, _LEGEND_SIZE, _LABEL_SIZE, _SCORE_SIZE = 21, 14, 14, 13
_TITLE_HEIGHT, _LEGEND_HEIGHT = 34, 30
_BADGE = 20
_OVERSAMPLING = 8


def neighbours_picture(
    queries: Sequence[Pixels],
    neighbours: Sequence[Sequence[Pixels]],
    correct: Sequence[Sequence[bool]] | None,
    *,
    query_labels: Sequence[str] | None,
    scores: Sequence[Sequence[float]] | None = None,
    title: str,
) -> Image.Image:
    """Return a picture with a row per query: the query over its label, then its neighbours, the nearest first.

    queries: Q images, uint8 (H, W, 3), of any sizes. neighbours: those of each query, in the order in which they are
    drawn. correct: whether each neighbour is of the query's class (green frame and tick, else red frame and cross);
    None where the classes are unknown: no frames. scores: the cosine under each neighbour.

    Raises ValueError where the lengths do not fit together or an image is not uint8 (H, W, 3).
    """
    _check_lengths(queries, neighbours, correct, query_labels, scores)
    cell = _cell_side([*queries, *(image for row in neighbours for image in row)])
    layout = _Layout(cell=cell, num_rows=len(queries), num_columns=max(len(row) for row in neighbours))
    legend = _legend(correct, has_scores=scores is not None)
    needed = max(_text_width(title, _TITLE_SIZE), legend.width) + 2 * _MARGIN
    picture = Image.new("RGB", (max(layout.width, needed), layout.height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN - 4), title, fill=_TEXT, font=_font(_TITLE_SIZE), stroke_width=0.35)
    picture.paste(legend, (_MARGIN, _MARGIN + _TITLE_HEIGHT))

    for row, query in enumerate(queries):
        label = None if query_labels is None else query_labels[row]
        _draw_query(picture, layout.query(row), cell, query, label)
        for column, image in enumerate(neighbours[row]):
            right = None if correct is None else bool(correct[row][column])
            score = None if scores is None else scores[row][column]
            _draw_neighbour(picture, layout.neighbour(row, column), cell, image, right, score)
    return picture


def image_grid(
    images_BCHW: Tensor | NDArray[np.floating[Any]],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    columns: int,
    enlarge: int = 1,
) -> Pixels:
    """Return normalised images as one picture, uint8 (height, width, 3), `columns` images to a row, 2 pixels apart.

    enlarge: every pixel becomes a square of so many pixels, since small images show nothing at their size.

    images_BCHW: float32 (B, 3, H, W), (x - mean) / std with x in 0..1; a tensor on any device or an array. Values
    outside 0..1 are cut, not-a-number is black; places without an image are light grey.

    Raises ValueError where the images are not (B, 3, H, W) with B of at least 1, or columns is not at least 1.
    """
    on_host = images_BCHW if isinstance(images_BCHW, np.ndarray) else images_BCHW.detach().float().cpu().numpy()
    pixels_BCHW = np.asarray(on_host, dtype=np.float32)
    if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] != 3 or len(pixels_BCHW) == 0 or columns < 1:
        raise ValueError(
            f"image_grid: found images of shape {pixels_BCHW.shape} and {columns} columns, expected (B, 3, H, W) with "
            "at least one image, and at least one column"
        )
    scale_C11 = np.asarray(std, dtype=np.float32)[:, None, None]
    shift_C11 = np.asarray(mean, dtype=np.float32)[:, None, None]
    unit_BCHW = np.nan_to_num((pixels_BCHW * scale_C11 + shift_C11), nan=0.0).clip(0, 1)
    bytes_BHWC = np.rint(unit_BCHW * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    bytes_BHWC = bytes_BHWC.repeat(enlarge, axis=1).repeat(enlarge, axis=2)

    space = 2
    num_images, height, width, _ = bytes_BHWC.shape
    columns = min(columns, num_images)
    num_rows = -(-num_images // columns)
    shape = (num_rows * (height + space) - space, columns * (width + space) - space, 3)
    grid = np.broadcast_to(np.array(_EMPTY, dtype=np.uint8), shape).copy()
    for place, image_HWC in enumerate(bytes_BHWC):
        top, left = (place // columns) * (height + space), (place % columns) * (width + space)
        grid[top : top + height, left : left + width] = image_HWC
    return grid


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where things stand, in pixels; frames lie outside of the cells, in the space between them."""

    cell: int
    num_rows: int
    num_columns: int

    @property
    def width(self) -> int:
        return self.neighbour(0, self.num_columns)[0] - _SPACE + _MARGIN

    @property
    def height(self) -> int:
        return self.query(self.num_rows)[1] - _SPACE + _MARGIN

    def query(self, row: int) -> tuple[int, int]:
        """Return left and top of a query."""
        return _MARGIN, _MARGIN + _TITLE_HEIGHT + _LEGEND_HEIGHT + _SPACE + row * (self.cell + _CAPTION + _SPACE)

    def neighbour(self, row: int, column: int) -> tuple[int, int]:
        """Return left and top of a neighbour."""
        return _MARGIN + self.cell + _GAP + column * (self.cell + _SPACE), self.query(row)[1]


def _check_lengths(
    queries: Sequence[Pixels],
    neighbours: Sequence[Sequence[Pixels]],
    correct: Sequence[Sequence[bool]] | None,
    query_labels: Sequence[str] | None,
    scores: Sequence[Sequence[float]] | None,
) -> None:
    counts = [len(row) for row in neighbours]
    if not queries or len(counts) != len(queries) or 0 in counts:
        raise ValueError(
            f"neighbours_picture: found {len(queries)} queries with {counts} neighbours, expected at least one query "
            "and at least one neighbour of each"
        )
    for name, rows in (("correct", correct), ("scores", scores)):
        if rows is not None and [len(row) for row in rows] != counts:
            raise ValueError(
                f"neighbours_picture: found {[len(row) for row in rows]} values of `{name}` by query, expected one for "
                f"each of the neighbours, {counts}"
            )
    if query_labels is not None and len(query_labels) != len(queries):
        raise ValueError(
            f"neighbours_picture: found {len(query_labels)} labels, expected one for each of the {len(queries)} queries"
        )
    for image in (*queries, *(image for row in neighbours for image in row)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"neighbours_picture: found an image of {image.dtype} {image.shape}, expected uint8 (height, width, 3)"
            )


def _cell_side(images: Iterable[Pixels]) -> int:
    """Return the side of a cell: a whole multiple of small images, so that all their pixels are drawn equally big."""
    side = max(max(image.shape[:2]) for image in images)
    return side * max(1, round(_SMALL_CELL / side)) if side <= _SMALL_SIDE else _LARGE_CELL


def _fit(image_HWC: Pixels, cell: int) -> Image.Image:
    """Return the image in the middle of a cell, as large as fits without changing its proportions."""
    height, width = image_HWC.shape[:2]
    scale = cell / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    is_small = max(height, width) <= _SMALL_SIDE
    how = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
    fitted = Image.new("RGB", (cell, cell), _EMPTY)
    scaled = Image.fromarray(np.ascontiguousarray(image_HWC)).resize(size, how)
    fitted.paste(scaled, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return fitted


def _draw_query(picture: Image.Image, place: tuple[int, int], cell: int, image: Pixels, label: str | None) -> None:
    left, top = place
    picture.paste(_fit(image, cell), place)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left - 1, top - 1, left + cell, top + cell), outline=_EDGE)
    if label is not None:
        label = _shortened(label, cell + _GAP - 8, _LABEL_SIZE)
        draw.text((left, top + cell + 7), label, fill=_TEXT, font=_font(_LABEL_SIZE))


def _draw_neighbour(
    picture: Image.Image, place: tuple[int, int], cell: int, image: Pixels, right: bool | None, score: float | None
) -> None:
    left, top = place
    draw = ImageDraw.Draw(picture)
    if right is None:
        draw.rectangle((left - 1, top - 1, left + cell, top + cell), outline=_EDGE)
        picture.paste(_fit(image, cell), place)
    else:
        box = (left - _FRAME, top - _FRAME, left + cell + _FRAME - 1, top + cell + _FRAME - 1)
        draw.rounded_rectangle(box, radius=_FRAME, fill=_RIGHT if right else _WRONG)
        picture.paste(_fit(image, cell), place)
        _paste_badge(picture, (left + cell - _BADGE + _FRAME, top + cell - _BADGE + _FRAME), right=right)
    if score is not None:
        middle = (left + cell / 2, top + cell + 9)
        draw.text(middle, f"{score:.2f}", fill=_FAINT, font=_font(_SCORE_SIZE), anchor="ma")


def _paste_badge(picture: Image.Image, place: tuple[int, int], *, right: bool) -> None:
    badge = _badge(right)
    picture.paste(badge, place, mask=badge)


@cache
def _badge(right: bool) -> Image.Image:
    """Return a disc with a tick or a cross, RGBA. Drawn large and made small: Pillow's lines have hard edges."""
    side = _BADGE * _OVERSAMPLING
    badge = Image.new("RGBA", (side, side), (*_BACKGROUND, 0))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, side - 1, side - 1), fill=(*_BACKGROUND, 255))
    rim = side // 12
    draw.ellipse((rim, rim, side - 1 - rim, side - 1 - rim), fill=(*(_RIGHT if right else _WRONG), 255))
    tick = [[(0.28, 0.52), (0.44, 0.67), (0.72, 0.35)]]
    cross = [[(0.33, 0.33), (0.67, 0.67)], [(0.33, 0.67), (0.67, 0.33)]]
    for stroke in tick if right else cross:
        points = [(x * side, y * side) for x, y in stroke]
        draw.line(points, fill=(*_BACKGROUND, 255), width=side // 9, joint="curve")
    return badge.resize((_BADGE, _BADGE), Image.Resampling.LANCZOS)


def _legend(correct: Sequence[Sequence[bool]] | None, *, has_scores: bool) -> Image.Image:
    """Return the line under the title: what stands where, and what the colours and the numbers mean."""
    order = "Query on the left, then its nearest neighbours, nearest first" + (
        "; the number is the cosine." if has_scores else "."
    )
    parts: list[tuple[bool | None, str]] = [(None, order)]
    if correct is not None:
        flat = [bool(value) for row in correct for value in row]
        parts.append((True, f"the query's class ({sum(flat)} of {len(flat)})"))
        parts.append((False, "another class"))
    font, space = _font(_LEGEND_SIZE), 18
    badge_width = _BADGE + 6
    widths = [_text_width(text, _LEGEND_SIZE) + (0 if mark is None else badge_width) for mark, text in parts]
    legend = Image.new("RGB", (sum(widths) + space * (len(parts) - 1), _LEGEND_HEIGHT - 6), _BACKGROUND)
    draw, left = ImageDraw.Draw(legend), 0
    for (mark, text), width in zip(parts, widths, strict=True):
        shift = 0
        if mark is not None:
            _paste_badge(legend, (left, 1), right=mark)
            shift = badge_width
        draw.text((left + shift, 3), text, fill=_FAINT, font=font)
        left += width + space
    return legend


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _text_width(text: str, size: int) -> int:
    return int(np.ceil(_font(size).getlength(text))) + 1


def _shortened(text: str, width: int, size: int) -> str:
    """Return the text, its end replaced by an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"
