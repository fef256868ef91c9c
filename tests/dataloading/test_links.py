"""Links below a data root: each folder is listed once, and links that lead nowhere are no images."""

import os

import pytest

from dataloading import listing
from dataloading.folder import list_folder
from dataloading.layout import Part
from dataloading.listing import list_files

JPG = {".jpg"}


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


@pytest.mark.parametrize("num", [3, 12])
def test_folders_that_link_to_each_other_are_each_looked_at_once(tmp_path, monkeypatch, num):
    """Twelve such folders have more than a thousand million paths."""
    for a in range(num):
        image(tmp_path / f"{a:02d}/{a}.jpg")
    for a in range(num):
        for b in range(num):
            if a != b:
                (tmp_path / f"{a:02d}/to{b:02d}").symlink_to(tmp_path / f"{b:02d}")
    looked, scandir = [], os.scandir
    monkeypatch.setattr(listing.os, "scandir", lambda place: (looked.append(place), scandir(place))[1])
    assert list_files(tmp_path, tmp_path, JPG) == [(f"{a:02d}/{a}.jpg", 1) for a in range(num)]
    assert len(looked) == num + 1


def test_a_folder_has_its_own_path_and_one_beside_the_base_that_of_the_first_link(tmp_path):
    image(tmp_path / "train/z/real.jpg")
    image(tmp_path / "pool/far.jpg")
    (tmp_path / "train/a").symlink_to(tmp_path / "train/z")
    (tmp_path / "train/c").symlink_to(tmp_path / "pool")
    (tmp_path / "train/b").symlink_to(tmp_path / "pool")
    assert list_files(tmp_path / "train", tmp_path, JPG) == [("b/far.jpg", 1), ("z/real.jpg", 1)]


def test_a_run_of_an_older_version_keeps_the_rows_that_it_had_under_each_path(tmp_path):
    image(tmp_path / "train/z/real.jpg")
    (tmp_path / "train/a").symlink_to(tmp_path / "train/z")
    (tmp_path / "train/z/up").symlink_to(tmp_path / "train")
    names = {rule: list(list_folder(str(tmp_path), Part("train", rule=rule))[0].names) for rule in (1, 2)}
    assert names == {1: ["a/real.jpg", "z/real.jpg"], 2: ["z/real.jpg"]}


def test_a_loop_of_links_is_no_image(tmp_path):
    image(tmp_path / "a.jpg")
    for name in ("loop.jpg", "loop"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "broken.jpg").symlink_to("nothing.jpg")
    assert list_files(tmp_path, tmp_path, JPG) == [("a.jpg", 1)]
