"""Disks that fill up and places that may not be written, made by the operating system and not by a fake."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from tiny_data import write_cifar10

from instdisc.runs import Run

NOBODY = 65534
FULL_DISK = """
mount -t tmpfs -o size=4m tmpfs {folder}
{train} > {folder}.first 2>&1 &
until [ -n "$(ls {folder}/run/checkpoints/manifests 2>/dev/null)" ]; do
  kill -0 $! 2>/dev/null || break
  sleep 0.05
done
dd if=/dev/zero of={folder}/fill bs=512 2>/dev/null
wait $!
echo $? > {folder}.first_code
ls {folder}/run/checkpoints/manifests > {folder}.manifests
rm {folder}/fill
{train} > {folder}.second 2>&1
echo $? > {folder}.second_code
"""


@pytest.fixture
def root(tmp_path):
    return write_cifar10(tmp_path / "data", 96, 20)


def command(root, uri):
    arguments = [
        *("train", "cifar10-cpu", "--workers", "2", "--launcher", "local", "--run", str(uri), "--data.root", str(root)),
        *("--data.max_rows", "none", "--model.width", "8", "--model.feature_dim", "16"),
        *("--optim.global_batch", "16", "--optim.epochs", "60", "--eval.k", "5", "--eval.every_epochs", "0"),
        *("--checkpoint.every_steps", "5"),
    ]
    return [sys.executable, "-m", "instdisc.cli.main", *arguments]


def may_mount(folder):
    if shutil.which("unshare") is None:
        return False
    attempt = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    return subprocess.run(attempt, capture_output=True, check=False).returncode == 0


def can_run_python(environment, user):
    probe = [sys.executable, "-c", "import instdisc.launch"]
    try:
        return subprocess.run(probe, env=environment, capture_output=True, check=False, **user).returncode == 0
    except PermissionError:
        return False


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(root, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if not may_mount(folder):
        pytest.skip("mounting a small file system needs root")
    script = FULL_DISK.format(folder=folder, train=shlex.join(command(root, folder / "run")))
    subprocess.run(["unshare", "-m", "sh", "-c", script], check=True, timeout=300)

    def said(name):
        return (tmp_path / f"disk.{name}").read_text()

    assert said("first_code").strip() == "2", said("first")
    assert "the disk is full; free space there" in said("first")
    assert "Traceback" not in said("first")
    assert said("manifests").strip(), "the checkpoint from before the disk was full is gone"
    assert said("second_code").strip() == "0", said("second")
    assert "continuing from the checkpoint of step" in said("second")


def test_a_place_without_permission_is_told_and_nothing_is_left_in_it(root, tmp_path):
    place = tmp_path / "theirs"
    place.mkdir(mode=0o555)
    user = {}
    if os.geteuid() == 0:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(folder.stat().st_mode | 0o055)
        home = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        if not can_run_python(home, user):
            pytest.skip("tests run as root, and nobody else may read this Python or this project")
    else:
        home = dict(os.environ)
    answer = subprocess.run(
        command(root, place / "run"), env=home, capture_output=True, text=True, timeout=120, check=False, **user
    )
    assert answer.returncode == 2, answer.stderr
    assert f"{place}/run: no permission" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert Run(str(place / "run")).result() is None
    assert not any(place.iterdir())
