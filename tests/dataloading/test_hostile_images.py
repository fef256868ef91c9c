"""Images whose lengths and counts are wrong: no decoder works or takes memory for what is not there."""

from __future__ import annotations

import io

import numpy as np
import pytest
from made_images import encode, picture
from PIL import Image

from dataloading import jpeg, pillow
from dataloading.encoded import Window
from dataloading.nvimgcodec_decoder import decode_part
from dataloading.pack_unit import look_at

ORIENTED = Image.Exif()
ORIENTED[0x112] = 1


def png_with_wrong_length(bit: int, kind: bytes = b"IDAT") -> bytes:
    """Return a PNG in which one bit of a chunk's length is another."""
    damaged = bytearray(encode(picture(61, 83, 1), "PNG", exif=ORIENTED.tobytes()))
    damaged[damaged.index(kind) - 1 - bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def jpeg_of_scans(num_scans: int, side: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    whole = encode(Image.linear_gradient("L").resize((side, side)), progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * (num_scans - whole.count(b"\xff\xda")) + whole[-2:]


@pytest.mark.parametrize("kind", [b"IDAT", b"eXIf", b"IHDR", b"IEND"])
@pytest.mark.parametrize("bit", range(32))
def test_no_fast_decoder_sees_a_png_with_a_wrong_bit_in_a_length(kind, bit):
    damaged = png_with_wrong_length(bit, kind)
    assert not pillow.is_plain(damaged, "PNG")


def test_a_png_that_claims_more_pixels_than_its_bytes_can_hold_is_not_seen_by_fast_decoders():
    whole = bytearray(encode(Image.new("L", (100, 100)), "PNG"))
    assert pillow.is_plain(bytes(whole), "PNG")
    whole[16:24] = (9000).to_bytes(4) * 2
    assert not pillow.is_plain(bytes(whole), "PNG")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_whole_png_is_seen_by_fast_decoders(mode):
    image = Image.fromarray(np.full((500, 500), 9, np.uint16)) if mode == "I;16" else Image.new(mode, (500, 500))
    assert pillow.is_plain(encode(image, "PNG"), "PNG")


def test_a_jpeg_is_looked_through_once_however_many_scans_it_has():
    """Counted: the bytes that are searched. Looking through the rest for each scan took 18 s for 16 x 16 pixels."""
    few, many = (jpeg_of_scans(num, 16) for num in (20, 900))
    searched = []
    original = jpeg._ends_of_scans

    def counted(encoded: bytes, start: int):
        searched.append(len(encoded) - start)
        return original(encoded, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg, "_ends_of_scans", counted)
        assert jpeg.is_sound(few)
        assert jpeg.is_sound(many)
    assert len(searched) == 2
    assert sum(searched) < len(few) + len(many)


def test_a_jpeg_of_more_scans_than_anybody_writes_is_not_seen_by_fast_decoders():
    assert not jpeg.is_sound(jpeg_of_scans(2000, 16))


def test_a_jpeg_whose_scans_are_minutes_of_work_is_damaged_before_any_of_it():
    endless = jpeg_of_scans(400, 2000)
    assert not jpeg.is_sound(endless)
    assert "400 scans of 4,000,000 pixels" in look_at(endless).reason
    with pytest.raises(ValueError, match="400 scans of 4,000,000 pixels"):
        pillow.decode(endless)
    with pytest.raises(ValueError, match="400 scans of 4,000,000 pixels"):
        pillow.read_header(endless)


@pytest.mark.parametrize("seed", range(8))
def test_lossless_webp_with_exif_decodes_without_a_word(seed, capfd):
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4 + seed, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((40, 30))
    encoded = encode(image, "WEBP", lossless=True, exif=ORIENTED.tobytes())
    if pillow.is_plain(encoded, "WEBP"):
        found = decode_part(Window(encoded, (0, 0), (30, 40), True))
        assert found is not None
        assert (found.numpy() == np.asarray(image)).all()
    else:
        start = encoded.index(b"VP8L") + 4
        assert int.from_bytes(encoded[start : start + 4], "little") % 2
    assert capfd.readouterr() == ("", "")


def test_what_nvimagecodec_cannot_do_it_leaves_to_pillow_without_a_word(capfd):
    cut = encode(picture(61, 83, 1))[:-300]
    assert decode_part(Window(cut, (0, 0), (61, 83), True)) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_length_reaches_beyond_a_cut_file(kind):
    whole = encode(picture(61, 83, 1), kind)
    assert pillow.is_plain(whole, kind)
    assert not any(pillow.is_plain(whole[:size], kind) for size in range(0, len(whole), 7))


def test_an_animated_webp_is_not_seen_by_fast_decoders():
    file = io.BytesIO()
    frames = [picture(30, 40, seed) for seed in range(2)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    assert not pillow.is_plain(file.getvalue(), "WEBP")
