"""Tars of others whose headers claim what is not there: refused at once, with the file and the member named."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest
from made_images import encode, picture

from dataloading.index import DatasetError
from dataloading.numerals import whole_number
from dataloading.sources import open_dataset

IMAGE = encode(picture(40, 50, 1))
BLOCK = tarfile.BLOCKSIZE


def tar_of(*members: tuple[str, bytes], pax: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.pax_headers = (pax or {}) if name.startswith("notes") else {}
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def with_size_field(tar: bytes, at: int, field: bytes) -> bytes:
    """Return the tar with another size in the header at a place, and that header's checksum."""
    changed = bytearray(tar)
    changed[at + 124 : at + 136] = field.ljust(12, b"\0")
    changed[at + 148 : at + 156] = b" " * 8
    changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + BLOCK])
    return bytes(changed)


def base_256(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, signed=True)


def chain_of_extended_headers() -> bytes:
    """Return a header that is followed by another header, and so on for longer than Python's stack."""
    with_pax = tar_of(("notes.txt", b"x"), pax={"comment": "x"})
    return with_pax[: 2 * BLOCK] * 3000 + with_pax[2 * BLOCK :]


PLAIN = tar_of(("0.jpg", IMAGE), ("notes.txt", b"x" * 100))
SECOND = BLOCK + -(-len(IMAGE) // BLOCK) * BLOCK
WITH_PAX = tar_of(("0.jpg", IMAGE), ("notes.txt", b"x" * 100), pax={"comment": "x"})
HOSTILE = {
    "negative PAX size": tar_of(("0.jpg", IMAGE), ("notes.txt", b"x" * 100), pax={"size": "-1536"}),
    "huge PAX size": tar_of(("0.jpg", IMAGE), ("notes.txt", b"x" * 100), pax={"size": str(1 << 62)}),
    "PAX size that is no number": tar_of(("0.jpg", IMAGE), ("notes.txt", b"x" * 100), pax={"size": "1_00"}),
    "huge size": with_size_field(PLAIN, SECOND, b"77777777777"),
    "size with an underline": with_size_field(PLAIN, SECOND, b"0000000_144"),
    "negative size": with_size_field(PLAIN, SECOND, base_256(-1536)),
    "size beyond all files": with_size_field(PLAIN, SECOND, base_256(1 << 70)),
    "huge size of the first member": with_size_field(PLAIN, 0, b"77777777777"),
    "huge extended header": with_size_field(WITH_PAX, SECOND, b"77777777777"),
    "endless extended header": with_size_field(WITH_PAX, SECOND, base_256(1 << 70)),
    "negative extended header": with_size_field(WITH_PAX, SECOND, base_256(-1)),
    "chain of extended headers": chain_of_extended_headers(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tar_whose_headers_claim_what_is_not_there_is_refused_by_name(name, tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(HOSTILE[name])
    with pytest.raises(DatasetError, match=r"train-000000\.tar is not a whole tar file"):
        open_dataset("webdataset", str(tmp_path), "train")


def test_the_member_is_named(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(HOSTILE["huge size"])
    with pytest.raises(DatasetError, match=r"member 'notes\.txt' of 8,589,934,591 bytes"):
        open_dataset("webdataset", str(tmp_path), "train")


def test_a_tar_that_is_cut_within_an_image_is_refused(tmp_path):
    path = tmp_path / "train-000000.tar"
    for size in range(100, BLOCK + len(IMAGE), 97):
        path.write_bytes(PLAIN[:size])
        with pytest.raises(DatasetError, match=r"train-000000\.tar is not a whole tar file|no images in train-000000"):
            open_dataset("webdataset", str(tmp_path), "train")


@pytest.mark.parametrize(("text", "number"), [(b"7", 7), (b"10\n", 10), (" -3 ", -3), ("+4", 4), (b"0012", 12)])
def test_digits_are_a_number(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize("text", [b"1_0", "1_0", "٣", b"\xd9\xa3", "", " ", "1.0", "0x10", "1 0", "--1", "1e3"])
def test_nothing_else_is_a_number(text):
    with pytest.raises(ValueError, match=r"expected a whole number|codec"):
        whole_number(text)


def test_a_label_that_is_no_number_does_not_become_one(tmp_path):
    for labels, num_classes in (((b"3", b"10"), 11), ((b"3", b"1_0"), 2)):
        members = [member for n in (0, 1) for member in ((f"{n}.jpg", IMAGE), (f"{n}.cls", labels[n]))]
        (tmp_path / "train-000000.tar").write_bytes(tar_of(*members))
        assert len(open_dataset("webdataset", str(tmp_path), "train").index.class_names) == num_classes


def test_a_compressed_tar_is_called_that(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(gzip.compress(tar_of(("a.jpg", IMAGE))))
    with pytest.raises(DatasetError, match=r"train-0\.tar is compressed.*unpack it"):
        open_dataset("webdataset", str(tmp_path), "train")


def test_a_tar_of_tars_says_that_they_are_to_be_unpacked(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(tar_of(("n01.tar", b"")))
    with pytest.raises(DatasetError, match=r"no images in train-0\.tar in .* 1 \.tar; .* Unpack the tars in it"):
        open_dataset("webdataset", str(tmp_path), "train")


def test_a_label_with_a_byte_order_mark_is_the_number_after_it(tmp_path):
    members = (("a.jpg", IMAGE), ("a.cls", b"\xef\xbb\xbf1"), ("b.jpg", IMAGE), ("b.cls", b"0"))
    (tmp_path / "train-0.tar").write_bytes(tar_of(*members))
    assert open_dataset("webdataset", str(tmp_path), "train").index.labels_N.tolist() == [1, 0]
