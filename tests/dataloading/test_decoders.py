"""The decoders by themselves: pixels against Pillow and torchvision, failures, order."""

import io
import logging
import sys

import numpy as np
import pytest
import torch
from made_images import encode, odd_sized_jpegs, picture
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tv

from dataloading import dali_pipeline, dali_self_test, jpeg, pillow
from dataloading.dali_pipeline import DaliDecoder, build_pipeline
from dataloading.dali_self_test import may_decode_regions
from dataloading.encoded import Window
from dataloading.image_decoder import ImageDecoder
from dataloading.nvimgcodec_decoder import decode_part
from dataloading.pixel_rules import BEFORE_RULES

CPU = torch.device("cpu")
SIXTEEN_BITS = np.asarray(picture(64, 80, 7).convert("L")).astype(np.uint16) * 257


def turned_by(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif.tobytes()


BAD = b"no image"


def open_decoder(kind: str, max_windows: int, num_threads: int) -> DaliDecoder | ImageDecoder:
    if kind == "dali":
        return DaliDecoder(size=48, max_windows=max_windows, device=CPU, num_threads=num_threads)
    fast = decode_part if kind == "nvimgcodec" else None
    return ImageDecoder(fast, size=48, device=CPU, num_threads=num_threads)


@pytest.fixture(scope="module", params=["dali", "nvimgcodec", "pillow"])
def decoder(request):
    decoder = open_decoder(request.param, 16, 2)
    yield decoder
    decoder.close()


@pytest.fixture
def kind(decoder):
    return "dali" if isinstance(decoder, DaliDecoder) else "nvimgcodec" if decoder._fast else "pillow"


def windows_in(files: list[bytes]) -> list[Window]:
    """Return a window of each file that is an image."""
    windows = []
    for number, file in enumerate(files):
        if file == BAD:
            windows.append(Window(BAD, (0, 0), (9, 9), is_plain=True))
            continue
        with Image.open(io.BytesIO(file)) as image:
            height, width = image.height, image.width
            is_plain = pillow.is_plain(file, image.format or "")
            orientation = image.getexif().get(0x112, 1)
        top, left = height // 5, width // 3
        size = (height - top - number % 7, width - left - number % 7)
        windows.append(Window(file, (top, left), size, is_plain, orientation=orientation))
    return windows


def expected_crop(window: Window) -> torch.Tensor:
    """Return torchvision's crop of Pillow's pixels, turned by Pillow."""
    stored_HWC = pillow.decode(window.encoded, BEFORE_RULES)
    (top, left), (height, width) = window.anchor, window.size
    part = Image.fromarray(stored_HWC[top : top + height, left : left + width])
    part.getexif()[0x112] = window.orientation
    pixels_HWC = np.asarray(ImageOps.exif_transpose(part))
    return tv.resize(torch.from_numpy(pixels_HWC.transpose(2, 0, 1).copy()), [48, 48], antialias=True)


def all_of(decoder, windows: list[Window]) -> torch.Tensor:
    decoder.submit(windows)
    decoded = decoder.collect()
    assert decoded.reasons == {}
    return decoded.crops


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(encode(picture(375, 500, 1)), id="jpeg"),
        pytest.param(encode(picture(61, 83, 2), subsampling=0), id="jpeg 4:4:4"),
        pytest.param(encode(picture(61, 83, 3), progressive=True), id="progressive"),
        pytest.param(encode(picture(61, 83, 4).convert("L")), id="grayscale"),
        pytest.param(encode(picture(61, 83, 5).convert("CMYK")), id="CMYK"),
        pytest.param(encode(picture(61, 83, 6), "PNG"), id="PNG"),
        pytest.param(encode(picture(61, 83, 7).convert("RGBA"), "PNG"), id="PNG with alpha"),
        pytest.param(encode(picture(61, 83, 8).convert("P"), "PNG"), id="PNG with palette"),
        pytest.param(encode(picture(61, 83, 8).convert("P"), "PNG", transparency=b"\0\x80"), id="transparent palette"),
        pytest.param(encode(Image.fromarray(SIXTEEN_BITS), "PNG"), id="PNG of 16 bits"),
        pytest.param(encode(picture(61, 83, 9), "WEBP"), id="WebP"),
        pytest.param(encode(picture(61, 83, 10), "BMP"), id="BMP"),
        *(
            pytest.param(encode(picture(61, 83, 11), exif=turned_by(orientation)), id=f"EXIF orientation {orientation}")
            for orientation in range(1, 9)
        ),
        pytest.param(encode(picture(61, 83, 11), "PNG", exif=turned_by(6)), id="PNG with EXIF orientation"),
        pytest.param(encode(picture(61, 83, 11), "WEBP", exif=turned_by(6)), id="WebP with EXIF orientation"),
    ],
)  # fmt: skip
def test_crops_equal_torchvisions_of_pillows_pixels(decoder, kind, file):
    (window,) = windows_in([file])
    error = (all_of(decoder, [window])[0].float() - expected_crop(window).float()).abs()
    if kind == "dali":
        assert error.mean() < 0.5
        # At the border of the window DALI repeats the last pixel where Pillow shortens the filter.
        assert error[:, 1:-1, 1:-1].max() <= 3.0
    else:
        assert error.max() == 0.0


def test_crops_do_not_depend_on_batch_size_or_threads(decoder, kind):
    windows = windows_in(odd_sized_jpegs(16))
    together = all_of(decoder, windows)
    one_thread = open_decoder(kind, 5, 1)
    for start in range(0, 16, 5):
        part = slice(start, start + 5)
        assert torch.equal(all_of(one_thread, windows[part]), together[part])
    one_thread.close()


def test_a_damaged_image_fails_alone(decoder):
    files = odd_sized_jpegs(9)
    windows = windows_in([*files[:4], BAD, *files[5:]])
    windows[7] = Window(b"", (0, 0), (9, 9), reason="cannot be read")
    for start in (0, 3, 6):
        decoder.submit(windows[start : start + 3])
    found = [decoder.collect() for _ in range(3)]
    assert found[0].reasons == {}
    assert list(found[1].reasons) == [1]
    assert "cannot be decoded" in found[1].reasons[1]
    assert found[2].reasons == {1: "cannot be read"}
    good = [m for m in range(9) if m not in (4, 7)]
    crops = torch.cat([decoded.crops for decoded in found])
    assert torch.equal(crops[good], all_of(decoder, [windows[m] for m in good]))


def test_collected_crops_are_not_overwritten_by_later_batches(decoder):
    windows = windows_in(odd_sized_jpegs(12))
    kept = all_of(decoder, windows[:4])
    copy = kept.clone()
    for _ in range(20):
        all_of(decoder, windows[4:8])
    assert torch.equal(kept, copy)


def test_the_self_test_passes_on_the_cpu_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert may_decode_regions.__wrapped__(None)
    assert "self-test passed" in caplog.text


def test_region_decoding_that_crashes_leaves_whole_images(caplog, monkeypatch, tmp_path):
    """As on some GPUs: the process that tries it ends with a segmentation fault."""
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -SEGV $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    assert not may_decode_regions.__wrapped__(None)
    assert "DALI decodes whole images on the CPU: region decoding failed its self-test (exit status -11" in caplog.text


def test_regions_of_other_pixels_fail_the_self_test(monkeypatch):
    def build(*arguments, regions):
        pipeline = build_pipeline(*arguments, regions=regions)
        if regions:  # windows one pixel off
            feed = pipeline.feed_input
            pipeline.feed_input = lambda name, data: feed(name, np.maximum(data - 1, 0) if name == "anchors" else data)
        return pipeline

    monkeypatch.setattr(dali_pipeline, "build_pipeline", build)
    monkeypatch.setattr(sys, "argv", ["dali_self_test", "cpu"])
    with pytest.raises(SystemExit, match="windows have other pixels"):
        dali_self_test.main()


def sound(**options) -> bytes:
    return encode(picture(120, 160, 3), **options)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}, {"quality": 5}])
def test_a_whole_jpeg_is_sound(options):
    assert jpeg.is_sound(sound(**options))
    assert jpeg.is_sound(sound(**options) + b"trailing bytes")
    assert jpeg.is_sound(sound(exif=turned_by(6), **options))


def test_restart_markers_and_padding_are_sound():
    image = Image.new("RGB", (64, 64), "red")
    file = io.BytesIO()
    image.save(file, "JPEG", restart_marker_rows=1)
    encoded = file.getvalue()
    assert b"\xff\xd0" in encoded
    assert jpeg.is_sound(encoded)
    assert jpeg.is_sound(encoded.replace(b"\xff\xc0", b"\xff\xff\xff\xc0", 1))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_what_is_cut_off_anywhere_is_not_sound(options):
    whole = sound(**options)
    assert not any(jpeg.is_sound(whole[:length]) for length in range(len(whole) - 1))


@pytest.mark.parametrize("marker", [0xC0, 0xC4, 0xD8, 0xDB, 0xCE, 0x01, 0xDA])
def test_a_marker_in_mid_scan_is_not_sound(marker):
    """libjpeg stops there and leaves the rest gray, without a word where the window lies above."""
    whole = bytearray(sound())
    place = len(whole) - 300
    whole[place : place + 2] = bytes([0xFF, marker])
    assert not jpeg.is_sound(bytes(whole))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_flipped_bytes_are_never_sound_where_pillow_fails(options):
    """What Pillow refuses must reach Pillow, or fail in the fast decoder too, in every window."""
    whole, generator = sound(**options), np.random.default_rng(0)
    num_refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for place in generator.integers(2, len(whole), 3):
            damaged[place] = generator.integers(0, 256)
        try:
            header = pillow.read_header(bytes(damaged))
            pillow.decode(bytes(damaged))
        except (OSError, ValueError, SyntaxError):
            num_refused += 1
            continue_with_pillow = not jpeg.is_sound(bytes(damaged))
            assert continue_with_pillow or decode_part(Window(bytes(damaged), (0, 0), (8, 8))) is None
        else:
            assert header.format == "JPEG"
    assert num_refused > 20


def test_memory_that_is_used_again_holds_the_right_pixels_after_any_window_and_any_failure():
    files, generator = [*odd_sized_jpegs(6), encode(picture(61, 83, 6), "PNG")], np.random.default_rng(1)
    for number in range(150):
        if number % 7 == 3:
            assert decode_part(Window(BAD, (0, 0), (9, 9), is_plain=True)) is None
        file = files[number % len(files)]
        with Image.open(io.BytesIO(file)) as image:
            height, width = (int(generator.integers(1, side + 1)) for side in (image.height, image.width))
            top = int(generator.integers(0, image.height - height + 1))
            left = int(generator.integers(0, image.width - width + 1))
        found = decode_part(Window(file, (top, left), (height, width)))
        assert found is not None
        assert torch.equal(found, pillow.decode_part(file, (top, left), (height, width)))
