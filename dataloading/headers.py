"""What the images of a dataset are: size from the header, and the pixels where images are small.

Files are not trusted: only formats that training can decode are opened (no PostScript interpreter is ever started),
anything that a decoder raises marks the one image as bad, and a header that claims more than `MAX_PIXELS` is believed
to be a decompression bomb and never decoded.

Shapes: N images, H height, W width, C = 3 colour channels.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

# Importing the plugins registers them; Pillow would import all its formats at the first image.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from dataloading import jpeg, other_formats, samples
from dataloading.io_threads import IoThreads
from dataloading.orientation import orientation_of, tail_of, turned, turned_size
from dataloading.pixel_rules import PixelRules
from dataloading.read_errors import TOO_LARGE, WatchedFile, raise_if_of_memory, too_large_for_memory

Item = TypeVar("Item")
Progress = Callable[[int, int], None]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of the formats that are read: those that both Pillow and DALI decode."""
_ENDINGS = "jpg jpeg jpe jfif png webp bmp tif tiff ppm pgm pbm pnm jp2 j2k"
EXTENSIONS = frozenset(f".{ending}" for ending in _ENDINGS.split())
"""File name endings of these formats, in lower case."""
MAX_PIXELS = 89_478_485
"""More pixels than this is taken for a decompression bomb. Pillow's limit for a warning (1/4 GiB of RGB)."""
MAX_SMALL_SIDE = 96
"""Images up to this many pixels high and wide, all of one size, are kept in memory decoded."""
MAX_SMALL_BYTES = 4 << 30
"""... if their pixels need no more than this."""


@dataclass
class Scan:
    """What was found in N images, in order."""

    heights_N: NDArray[np.int32]
    widths_N: NDArray[np.int32]
    reasons: dict[int, str]
    pixels_NHWC: NDArray[np.uint8] | None

    @property
    def bad_N(self) -> NDArray[np.bool_]:
        bad_N = np.zeros(len(self.heights_N), dtype=np.bool_)
        bad_N[list(self.reasons)] = True
        return bad_N


class BadHeader(ValueError):
    """A header that says something impossible."""


REFUSALS = (BadHeader, samples.NoRange, jpeg.TooManyScans)
"""What is raised here with a reason for people, before anything is decoded."""


class _Look(NamedTuple):
    """What one image is."""

    height: int = 0
    width: int = 0
    reason: str = ""
    """Why the header cannot be used; empty where it can."""
    pixels_HWC: NDArray[np.uint8] | None = None
    decode_reason: str = ""
    """Why the pixels of a small image cannot be decoded; empty where they can, or where nobody tried."""


@dataclass
class _Small:
    """Pixels of small images of one size, for as long as all images are that."""

    num_rows: int
    wanted: bool = True
    size: tuple[int, int] | None = None
    pixels_NHWC: NDArray[np.uint8] | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    """Per row that could not be decoded, why. They count only where the pixels are kept in the end: whether an image of
    a mixed data set was decoded before another size turned up depends on the threads."""

    def accepts(self, height: int, width: int) -> bool:
        """True if an image of this size may be one of them. Called from many threads."""
        size = self.size
        return self.wanted and ((height, width) == size if size else small_enough(height, width, self.num_rows))

    def put(self, row: int, look: _Look) -> None:
        """Keep the pixels of an image whose header is good; the first of another size ends the collection."""
        size = (look.height, look.width)
        if self.size is None and self.accepts(*size):
            self.size = size
            self.pixels_NHWC = np.zeros((self.num_rows, *size, 3), dtype=np.uint8)
        if size != self.size or self.pixels_NHWC is None:
            self.wanted, self.pixels_NHWC = False, None
        elif look.pixels_HWC is None:
            self.reasons[row] = look.decode_reason
        else:
            self.pixels_NHWC[row] = look.pixels_HWC


def small_enough(height: int, width: int, num_rows: int) -> bool:
    """True if `num_rows` images of this size are kept in memory decoded."""
    return max(height, width) <= MAX_SMALL_SIDE and num_rows * height * width * 3 <= MAX_SMALL_BYTES


def all_small(heights_N: NDArray[np.int32], widths_N: NDArray[np.int32], bad_N: NDArray[np.bool_]) -> bool:
    """True if the good images are all of one size and small enough to be kept in memory."""
    first = int(np.argmin(bad_N)) if len(bad_N) else 0
    # The first image decides it nearly always; a hundred million of them are not copied for that.
    if len(bad_N) == 0 or bad_N[first] or not small_enough(int(heights_N[first]), int(widths_N[first]), len(bad_N)):
        return False
    return bool((bad_N | ((heights_N == heights_N[first]) & (widths_N == widths_N[first]))).all())


def scan(
    chunks: Iterable[Sequence[Item]],
    num_rows: int,
    open_item: Callable[[Item], BinaryIO],
    *,
    on_progress: Progress | None = None,
    num_threads: int | None = None,
    rules: PixelRules | None = None,
) -> Scan:
    """Read the header of every image, and the pixels of small images of one size.

    chunks: the images in order, in groups that one thread reads; few groups are alive at a time.
    open_item opens one image, in a thread; a ValueError that it raises is the reason why the image is bad.
    on_progress(done, total) is called at the start and after each group. num_threads: default twice the usable cores.
    rules: the present ones where None.

    Raises OSError where an image cannot be read.
    """
    small = _Small(num_rows)
    heights_N = np.zeros(num_rows, dtype=np.int32)
    widths_N = np.zeros(num_rows, dtype=np.int32)
    reasons: dict[int, str] = {}
    num_threads, shown = num_threads or 2 * len(os.sched_getaffinity(0)), rules or PixelRules()
    row = 0
    if on_progress:
        on_progress(0, num_rows)
    # The filters are global, so threads must not touch them: they are set once, around all of them.
    with warnings.catch_warnings(), closing(IoThreads(num_threads, "look-at-images")) as threads:
        warnings.simplefilter("ignore")
        for looks in _map_in_order(
            threads, lambda chunk: _look_at(chunk, open_item, small, shown), chunks, num_threads
        ):
            for look in looks:
                heights_N[row], widths_N[row] = look.height, look.width
                if look.reason:
                    reasons[row] = look.reason
                elif small.wanted:
                    small.put(row, look)
                row += 1
            if on_progress:
                on_progress(row, num_rows)
    assert row == num_rows, f"found {row} images, expected {num_rows}"
    if small.pixels_NHWC is not None:
        reasons |= small.reasons
    return Scan(heights_N, widths_N, reasons, small.pixels_NHWC)


def _look_at(
    chunk: Sequence[Item], open_item: Callable[[Item], BinaryIO], small: _Small, rules: PixelRules
) -> list[_Look]:
    looks: list[_Look] = []
    for item in chunk:
        try:
            file = WatchedFile(open_item(item))
        except ValueError as error:
            looks.append(_Look(reason=reason(error)))
            continue
        with closing(file):
            try:
                with Image.open(file, formats=FORMATS) as image:  # pyright: ignore[reportArgumentType]
                    look = _look(image, file, small, rules)
            except Exception as error:  # a decoder that meets a damaged file raises nearly anything
                raise_if_of_memory(error, "the header of an image")
                look = _Look(reason=reason(error, _first_bytes(error, file)))
        if file.failure is not None:
            raise file.failure
        looks.append(look)
    return looks


def _first_bytes(error: Exception, file: WatchedFile) -> bytes | None:
    """Return the first bytes of a file of no format that is read; None for other errors."""
    if not isinstance(error, UnidentifiedImageError) or file.failure is not None:
        return None
    file.seek(0)
    return file.read(other_formats.NUM_BYTES)


def _look(image: Image.Image, file: WatchedFile, small: _Small, rules: PixelRules) -> _Look:
    height, width = checked_size(image, rules, tail_of(image, file))
    if not small.accepts(height, width):
        return _Look(height, width)
    try:
        if image.format in jpeg.FORMATS:
            place = file.tell()
            file.seek(0)
            jpeg.check_scans(file.read(), height, width)
            file.seek(place)
        pixels_HWC = decode(image, rules)
        assert pixels_HWC.shape == (height, width, 3), f"decoded to {pixels_HWC.shape}"
    except MemoryError:
        return _Look(height, width, decode_reason=too_large_for_memory(height, width))
    except Exception as error:  # as above
        return _Look(height, width, decode_reason=reason(error))
    return _Look(height, width, pixels_HWC=pixels_HWC)


def checked_size(image: Image.Image, rules: PixelRules, tail: bytes = b"") -> tuple[int, int]:
    """Return height and width of an opened image, turned where the rules say so.

    tail: as for `orientation_of`. Raises ValueError for a size or for samples that cannot be.
    """
    check_size(image.height, image.width)
    if rules.deep_samples == "scaled":
        samples.check_samples(image)
    orientation = orientation_of(image, tail) if rules.orientation == "exif" else 1
    return turned_size(image.height, image.width, orientation)


def check_size(height: int, width: int) -> None:
    """Raise BadHeader for a size that no image has, or that only a decompression bomb would claim."""
    if not (width > 0 and height > 0):
        raise BadHeader(f"the header says {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadHeader(
            f"{TOO_LARGE}: {width} x {height} pixels, expected at most {MAX_PIXELS:,} in all, since more may be a "
            "decompression bomb; make it smaller"
        )


def reason(error: Exception, first_bytes: bytes | None = None) -> str:
    """Return why an image is bad in one line, the same one for the same bytes.

    first_bytes: of the file, which tell what it is where it is no image.
    """
    if isinstance(error, UnidentifiedImageError):  # Pillow's text has an address in memory
        named = "" if first_bytes is None else other_formats.named(first_bytes)
        return named or "no image in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"{TOO_LARGE}: DecompressionBombError: {error}"[:200]
    is_ours = isinstance(error, REFUSALS)
    return (str(error) if is_ours else f"{type(error).__name__}: {error}")[:200]


def decode(image: Image.Image, rules: PixelRules | None = None) -> NDArray[np.uint8]:
    """Return the pixels of an opened image, uint8 (H, W, 3), by the rules (None: the present ones).

    Raises what Pillow raises, and ValueError for samples that cannot be scaled.
    """
    rules = rules or PixelRules()
    pixels_HWC = decode_stored(image, rules)
    # Asked for after decoding: by then what stands behind a PNG's pixels was read too.
    return turned(pixels_HWC, orientation_of(image)) if rules.orientation == "exif" else pixels_HWC


def decode_stored(image: Image.Image, rules: PixelRules) -> NDArray[np.uint8]:
    """Return the pixels as the file has them, not turned. The rest as `decode`."""
    if rules.deep_samples == "scaled":
        samples.check_samples(image)
        grey_HW = samples.scaled(image) if samples.is_deep(image) else None
    else:
        grey_HW = (np.asarray(image) >> 8).astype(np.uint8) if image.mode.startswith("I;16") else None
    if grey_HW is not None:
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.mode == "P":
        image = image.convert("RGBA")  # as Pillow asks for in a warning: palettes may have transparency
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _map_in_order(
    threads: IoThreads,
    function: Callable[[Sequence[Item]], list[_Look]],
    chunks: Iterable[Sequence[Item]],
    num_threads: int,
) -> Iterator[list[_Look]]:
    """Yield the results in order, with a bounded number of chunks in memory."""
    waiting: deque[Future[list[_Look]]] = deque()
    for chunk in chunks:
        waiting.append(threads.submit(function, chunk))
        if len(waiting) > 2 * num_threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
