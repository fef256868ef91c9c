"""The DALI decoder by itself: pixels against Pillow, failures, order."""

import io

import numpy as np
import pytest
import torch
from made_images import encode, odd_sized_jpegs, picture
from PIL import Image

from dataloading import pillow
from dataloading.dali_pipeline import DaliDecoder
from dataloading.encoded import DecodeFailed

CPU = torch.device("cpu")
SIXTEEN_BITS = np.asarray(picture(64, 80, 7).convert("L")).astype(np.uint16) * 257
ROTATED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


@pytest.fixture(scope="module")
def decoder():
    decoder = DaliDecoder(size=48, max_windows=16, device=CPU, num_threads=2)
    yield decoder
    decoder.close()


def windows_in(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([Image.open(io.BytesIO(file)).size[::-1] for file in files])
    anchors = sizes // np.array([[5, 3]])
    return anchors, sizes - anchors - np.arange(len(files))[:, None] % 7


def submit(decoder, files: list[bytes], anchors, sizes) -> None:
    decoder.submit([np.frombuffer(file, np.uint8) for file in files], anchors, sizes)


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
        pytest.param(encode(picture(61, 83, 11), exif=ROTATED), id="EXIF rotation"),
    ],
)  # fmt: skip
def test_crops_equal_pillows_within_half_a_level_on_average(decoder, file):
    anchors, sizes = windows_in([file])
    submit(decoder, [file], anchors, sizes)
    expected = pillow.decode_crop(file, anchors[0], sizes[0], 48).float()
    error = (decoder.collect()[0].float() - expected).abs()
    assert error.mean() < 0.5
    # At the border of the window DALI repeats the last pixel where Pillow shortens the filter.
    assert error[:, 1:-1, 1:-1].max() <= 3.0


def test_crops_do_not_depend_on_batch_size_or_threads(decoder):
    files = odd_sized_jpegs(16)
    anchors, sizes = windows_in(files)
    submit(decoder, files, anchors, sizes)
    together = decoder.collect()
    one_thread = DaliDecoder(size=48, max_windows=5, device=CPU, num_threads=1)
    for start in range(0, 16, 5):
        part = slice(start, start + 5)
        submit(one_thread, files[part], anchors[part], sizes[part])
        assert torch.equal(one_thread.collect(), together[part])
    one_thread.close()


def test_a_damaged_image_fails_its_batch_and_no_other(decoder):
    files = odd_sized_jpegs(9)
    anchors, sizes = windows_in(files)
    submit(decoder, files[:3], anchors[:3], sizes[:3])
    submit(decoder, [files[3], b"no image", files[5]], anchors[3:6], sizes[3:6])
    submit(decoder, files[6:], anchors[6:], sizes[6:])
    first = decoder.collect()
    with pytest.raises(DecodeFailed):
        decoder.collect()
    last = decoder.collect()
    for results, part in ((first, slice(0, 3)), (last, slice(6, 9))):
        submit(decoder, files[part], anchors[part], sizes[part])
        assert torch.equal(decoder.collect(), results)


def test_collected_crops_are_not_overwritten_by_later_batches(decoder):
    files = odd_sized_jpegs(12)
    anchors, sizes = windows_in(files)
    submit(decoder, files[:4], anchors[:4], sizes[:4])
    kept = decoder.collect()
    copy = kept.clone()
    for _ in range(8):
        submit(decoder, files[4:], anchors[4:], sizes[4:])
        decoder.collect()
    assert torch.equal(kept, copy)
