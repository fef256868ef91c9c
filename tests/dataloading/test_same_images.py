"""Images that two data sets share are found, and others of the same name are not taken for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from made_images import encode, picture

from cluster.parallel import ProcessMap
from cluster.store import Store
from dataloading.pack import pack
from dataloading.same_images import rows_of_the_same_images
from dataloading.sources import list_images, open_dataset

NAMES = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png")


def write(folder: Path, names=NAMES, side: int = 150) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(picture(side, side, number), "PNG"))
    return folder


@pytest.mark.parametrize("side", [150, 20])
@pytest.mark.parametrize("copy", [shutil.copy, os.link, os.symlink])
def test_copies_and_links_in_another_split_are_the_same_images(tmp_path, copy, side):
    write(tmp_path / "train", side=side)
    for name in ("dog/1.png", "cat/2.png"):
        (tmp_path / "test" / name).parent.mkdir(parents=True)
        copy(tmp_path / "train" / name, tmp_path / "test" / name)
    # The same name and, as pixels in memory have it, the same size: another image all the same.
    (tmp_path / "test/dog/3.png").write_bytes(encode(picture(side, side, 77), "PNG"))
    train, test = (open_dataset("folder", str(tmp_path), split) for split in ("train", "test"))
    found = dict(zip(test.index.names, rows_of_the_same_images(train, test).tolist(), strict=True))
    assert found == {"cat/2.png": 1, "dog/1.png": 2, "dog/3.png": -1}


def test_of_one_split_the_name_is_the_image(tmp_path):
    write(tmp_path / "train")
    train = open_dataset("folder", str(tmp_path), "train")
    assert rows_of_the_same_images(train, train).tolist() == [0, 1, 2, 3]


def test_checksums_of_packed_images_tell_which_are_the_same(tmp_path):
    source = tmp_path / "source"
    write(source / "train")
    write(source / "test", ("cat/2.png", "cat/1.png"))  # under each other's names
    shutil.copy(source / "train/dog/3.png", source / "test/cat/3.png")
    (source / "test" / "dog").mkdir()
    shutil.copy(source / "train/dog/3.png", source / "test/dog/3.png")
    for split in ("train", "test"):
        target = Store(str(tmp_path / "packed"))
        pack(list_images("folder", str(source), split), target, split, parallel=ProcessMap(0), shard_mb=1)
    train, test = (open_dataset("packed", str(tmp_path / "packed"), split) for split in ("train", "test"))
    found = dict(zip(test.index.names, rows_of_the_same_images(train, test).tolist(), strict=True))
    assert found == {"cat/1.png": -1, "cat/2.png": -1, "cat/3.png": -1, "dog/3.png": 3}
