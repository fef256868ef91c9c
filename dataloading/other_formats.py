"""What files are that are no image of a format that is read, by their first bytes, in words for people."""

from __future__ import annotations

NUM_BYTES = 64
_TIFF = (
    "a damaged TIFF, or one of a kind that is not read (such as floating-point or 10-bit samples); convert the image"
)
_FIRST_BYTES = {
    b"GIF8": "a GIF, which is not read",
    b"\x00\x00\x00\x0cjxl ": "a JPEG XL image, which is not read",
    b"\xff\x0a": "a JPEG XL image, which is not read",
    b"II*\x00": _TIFF,
    b"MM\x00*": _TIFF,
    b"II+\x00": _TIFF,
    b"MM\x00+": _TIFF,
    b"\x89PNG": "a damaged PNG",
    b"\xff\xd8\xff": "a damaged JPEG",
    b"P7": "a PAM image, which is not read",
    b"\x76\x2f\x31\x01": "an OpenEXR image, which is not read",
    b"#?RADIANCE": "a Radiance HDR image, which is not read",
    b"\x00\x00\x01\x00": "an icon, which is not read",
    b"SIMPLE": "a FITS image, which is not read",
    b"\x93NUMPY": "a NumPy array, no image",
    b"\x0a\x01": "a PCX image, which is not read",
    b"8BPS": "a Photoshop file, which is not read",
    b"%PDF": "a PDF, which is not read",
    b"%!PS": "a PostScript file, which is not read",
    b"\x1f\x8b": "a gzip file, no image",
    b"PK\x03\x04": "a zip file, no image",
    b"version https://git-lfs": "a Git LFS pointer, no image: fetch the file itself",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}
_TEXTS = {
    b"<svg": "an SVG drawing, which is not read",
    b"<!doctype html": "a web page, no image",
    b"<html": "a web page, no image",
}


def named(head: bytes) -> str:
    """Return what a file is by its first `NUM_BYTES` bytes, in words; "" where they say nothing."""
    if not head:
        return "an empty file"
    for first, name in _FIRST_BYTES.items():
        if head.startswith(first):
            return name
    if head[4:8] == b"ftyp":
        brand = _BRANDS.get(head[8:12])
        return f"{brand}, which is not read" if brand else "a film or an image of another kind, which is not read"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((name for first, name in _TEXTS.items() if text.startswith(first)), "")
