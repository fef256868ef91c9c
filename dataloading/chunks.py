"""The structure of PNG and WebP files, chunk by chunk, without decoding them.

Decoders believe the length that a chunk says: one wrong bit in it makes nvImageCodec 0.9 clear gigabytes for an image
of a few kilobytes. So every length is compared with the bytes that are there before such a file is given to it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_PNG_START = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 1 << 16
"""More chunks than this are not walked through; the usual 8 kB of pixels in each would make 512 MB."""
_MAX_RATIO = 1032
"""Deflate makes at most so many bytes out of one."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a PNG's pixel by its colour type."""
_ANIMATED = 0x02
"""Flag of a WebP file's header."""


def is_sound_png(encoded: bytes) -> bool:
    """Return whether the chunks of a PNG follow each other up to its end, its pixels can be in them, and it is no
    animation."""
    if not encoded.startswith(_PNG_START + b"\0\0\0\x0dIHDR"):
        return False
    num_pixel_bytes = 0
    for kind, length in _png_chunks(encoded):
        if kind == b"acTL":
            return False
        if kind == b"IDAT":
            num_pixel_bytes += length
        if kind == b"IEND":
            return num_pixel_bytes * _MAX_RATIO >= _unpacked_bytes(encoded[16:29])
    return False


def png_exif(tail: bytes) -> bytes:
    """Return the EXIF data of a PNG that has it behind its pixels, given the last bytes of the file; else nothing."""
    place = tail.rfind(b"eXIf")
    if place < 4:
        return b""
    length = int.from_bytes(tail[place - 4 : place])
    data = tail[place + 4 : place + 4 + length]
    checksum = tail[place + 4 + length : place + 8 + length]
    return data if zlib.crc32(b"eXIf" + data).to_bytes(4) == checksum else b""


def is_sound_webp(encoded: bytes) -> bool:
    """Return whether the chunks of a WebP file follow each other up to its end, and it is no animation.

    False for those that nvImageCodec 0.9 cannot read, and says so on standard error each time: it takes no notice of
    the padding after lossless pixels of an odd number of bytes, so that EXIF data after them lie elsewhere to it.
    """
    if encoded[:4] != b"RIFF" or encoded[8:12] != b"WEBP":
        return False
    end, place = 8 + int.from_bytes(encoded[4:8], "little"), 12
    if len(encoded) < end:
        return False
    for _ in range(_MAX_CHUNKS):
        kind, length = encoded[place : place + 4], int.from_bytes(encoded[place + 4 : place + 8], "little")
        is_last = place + 8 + length + length % 2 >= end
        if place + 8 + length > end or (kind == b"VP8X" and encoded[place + 8] & _ANIMATED):
            return False
        if is_last:
            return True
        if kind == b"VP8L" and length % 2:
            return False
        place += 8 + length + length % 2
    return False


def _png_chunks(encoded: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield each chunk's kind and length, while they lie in the file."""
    place = len(_PNG_START)
    for _ in range(_MAX_CHUNKS):
        length, kind = int.from_bytes(encoded[place : place + 4]), encoded[place + 4 : place + 8]
        if len(kind) < 4 or not kind.isalpha() or place + 12 + length > len(encoded):
            return
        yield kind, length
        place += 12 + length


def _unpacked_bytes(header: bytes) -> int:
    """Return the bytes that the pixels of a PNG need at least, from its header's data."""
    width, height, bits, colours = int.from_bytes(header[:4]), int.from_bytes(header[4:8]), header[8], header[9]
    return height * (width * bits * _CHANNELS.get(colours, 1) // 8)
