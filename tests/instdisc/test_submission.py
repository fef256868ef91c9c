"""What `instdisc submit` looks at before it submits anything."""

from __future__ import annotations

import io
import os
import socket
import zipfile

import pytest

from cluster.job import JobRefusedError
from cluster.ray_working_dir import pack_working_dir
from instdisc.cli.main import main
from instdisc.cli.submit import Lines
from instdisc.config_sections import ConfigError
from instdisc.progress import Progress
from instdisc.recipes import recipe
from instdisc.runs import Run
from instdisc.submission import job_name, passed_on, require_groups, run_on_cluster, train_command


def test_a_runs_jobs_have_readable_names_of_their_own():
    assert (
        job_name("s3://bucket/runs/first try!") == f"instdisc-first-try-{job_name('s3://bucket/runs/first try!')[-6:]}"
    )
    assert job_name("s3://a/first") != job_name("s3://b/first")
    assert job_name("s3://a/first/").startswith("instdisc-first-")
    assert len(job_name("s3://a/" + "x" * 300)) < 70


def test_workers_are_passed_on_as_they_were_given():
    command = train_command("quickstart", "s3://b/r 1", "2..16", ["--optim.lr", "0.1"])
    assert command.endswith("train quickstart --run 's3://b/r 1' --workers 2..16 --optim.lr 0.1")
    for workers in ("", "two", "2..", "2-4", "-1", "1; rm"):
        with pytest.raises(ValueError, match=r"MIN\.\.MAX"):
            train_command("quickstart", "s3://b/r", workers, [])
    with pytest.raises(ConfigError, match="expected at least 1"):
        train_command("quickstart", "s3://b/r", "0", [])


@pytest.mark.parametrize("place", ["s3://key:s3cret@bucket/run", "https://me:s3cret@host/x"])
def test_credentials_in_a_uri_are_refused_without_showing_them(place):
    for arguments in ((place, []), ("s3://b/r", ["--data.root", place])):
        with pytest.raises(ConfigError, match="user name or password") as refused:
            train_command("quickstart", arguments[0], "2", arguments[1])
        assert "s3cret" not in str(refused.value)


def test_variables_are_passed_on_by_name_and_never_secrets(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert passed_on(["AWS_ENDPOINT_URL"]) == {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "DB_PASSWORD"):
        monkeypatch.setenv(name, "s3cret")
        with pytest.raises(ConfigError, match="looks like a credential") as refused:
            passed_on([name])
        assert "instance profile" in str(refused.value)
        assert "s3cret" not in str(refused.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:s3cret@host")
    with pytest.raises(ConfigError, match="looks like a credential"):
        passed_on(["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with pytest.raises(ConfigError, match="not set here"):
        passed_on(["AWS_ENDPOINT_URL"])
    with pytest.raises(ConfigError, match="expected a name") as refused:
        passed_on(["NAME=s3cret"])
    assert "s3cret" not in str(refused.value)


def test_a_folder_is_taken_only_where_all_machines_have_it(tmp_path):
    here, folder = socket.gethostname(), str(tmp_path / "run")
    assert run_on_cluster(folder, lambda: {here}, is_shared=False) == folder
    assert run_on_cluster(f"file://{folder}/", lambda: {here}, is_shared=False) == folder
    assert run_on_cluster(folder, lambda: {here, "other"}, is_shared=True) == folder
    with pytest.raises(ConfigError, match=r"the cluster runs on head-7, other; give --run s3://.* or --shared-folder"):
        run_on_cluster(folder, lambda: {here, "other", "head-7"}, is_shared=False)
    with pytest.raises(ConfigError, match="memory that ends"):
        run_on_cluster("memory://x", lambda: {here}, is_shared=True)
    assert run_on_cluster("s3://b/r/", lambda: {"other"}, is_shared=False) == "s3://b/r"


def test_a_working_directory_travels_without_secrets_data_and_environments(tmp_path):
    folder, out = tmp_path / "project", tmp_path / "out"
    out.mkdir()
    kept = ["train.py", "src/data/loader.py", "notes.txt"]
    left = [".env", ".env.local", ".aws/credentials", "deploy.pem", "src/id_rsa", ".venv/bin/python", "data/a.bin"]
    left += ["runs/first/config.json", ".git/config", "secret.txt", "big.log"]
    for name in kept + left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * 10)
    (folder / ".gitignore").write_text("secret.txt\n")
    (folder / ".rayignore").write_text("*.log\n")
    packed = pack_working_dir(folder, out)
    names = zipfile.ZipFile(packed.package).namelist()
    assert {name for name in names if not name.endswith("/")} == {*kept, ".gitignore", ".rayignore"}
    assert packed.num_files == len(kept) + 2


def test_what_a_working_directory_leaves_out_as_secret_is_named(tmp_path):
    folder, out = tmp_path / "project", tmp_path / "out"
    for path in (folder / "src", out):
        path.mkdir(parents=True)
    (folder / "src/train.py").write_text("import torch\n")
    (folder / "src/secrets.py").write_text("def load(): ...\n")
    (folder / "src/old [1].py").write_text("KEY = '-----BEGIN RSA PRIVATE KEY-----'\n")
    (folder / "gcp-key.json").write_text("{}")
    packed = pack_working_dir(folder, out)
    assert packed.secrets == ("gcp-key.json", "src/old [1].py")
    names = zipfile.ZipFile(packed.package).namelist()
    assert {name for name in names if not name.endswith("/")} == {"src/train.py", "src/secrets.py"}


@pytest.mark.parametrize("target", ["../away/private.txt", "../away", "..", ".", "link", "nothing"])
def test_a_link_that_leads_out_of_a_working_directory_or_to_no_end_is_refused(target, tmp_path):
    (tmp_path / "away").mkdir()
    (tmp_path / "away/private.txt").write_text("mine")
    (tmp_path / "project").mkdir()
    (tmp_path / "project/link").symlink_to(target)
    with pytest.raises(JobRefusedError, match=r"found link, a link to .*\.rayignore"):
        pack_working_dir(tmp_path / "project", tmp_path)


def test_a_link_inside_a_working_directory_travels_as_what_it_leads_to(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project/a.py").write_text("1")
    (tmp_path / "project/b.py").symlink_to("a.py")
    packed = pack_working_dir(tmp_path / "project", tmp_path)
    assert zipfile.ZipFile(packed.package).read("b.py") == b"1"


def test_a_link_with_a_harmless_name_does_not_take_credentials_along(tmp_path):
    project = tmp_path / "project"
    (project / ".aws").mkdir(parents=True)
    (project / ".aws" / "config").write_text("[default]\n")
    (project / "train.py").write_text("pass\n")
    (project / "settings.txt").symlink_to(".aws/config")
    (project / "conf").symlink_to(".aws")
    packed = pack_working_dir(project, tmp_path)
    assert zipfile.ZipFile(packed.package).namelist() == ["train.py"]
    assert packed.secrets == (".aws/config", "conf/config", "settings.txt")


@pytest.mark.parametrize(
    ("name", "found"), [(b"token ", "cannot leave out"), (b"\xff.txt", "not UTF-8")], ids=["blank", "latin"]
)
def test_a_name_that_packing_would_mistake_is_refused(name, found, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / os.fsdecode(name)).write_text("x")
    with pytest.raises(JobRefusedError, match=found):
        pack_working_dir(project, tmp_path)
    assert not (tmp_path / "working_dir.zip").exists()


def test_a_working_directory_that_is_too_large_is_refused_with_what_is_large(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/a.bin").write_bytes(bytes(1_500_000))
    (tmp_path / "weights/b.bin").write_bytes(bytes(1_500_000))
    (tmp_path / "small.py").write_text("1")
    with pytest.raises(
        JobRefusedError, match=r"found 3\.0 MB in 3 files, expected at most 2\.0 MB.*: weights/ \(3\.0 MB\)"
    ):
        pack_working_dir(tmp_path, tmp_path, limit_bytes=2_000_000)
    with pytest.raises(JobRefusedError, match="expected a folder, found nothing"):
        pack_working_dir(tmp_path / "none", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no-such-recipe", "--run", "s3://b/r"], "unknown recipe"),
        (["quickstart", "--run", "s3://b/r", "--optim.lrr", "1"], "did you mean optim.lr"),
        (["quickstart", "--run", "s3://b/r", "--workers", "many"], "MIN..MAX"),
        (["quickstart", "--run", "s3://b/r", "--env", "HOME=1"], "expected a name"),
        (["quickstart", "--run", "s3://b/r"], "expected the dashboard's"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(arguments, told, capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["submit", *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_log_in_pieces_becomes_whole_lines_and_progress_is_redrawn_in_a_terminal_only(is_terminal):
    stream = io.StringIO()
    lines = Lines(Progress(stream, is_terminal=is_terminal))
    for piece in (
        "star",
        "ting\nstep 1/10 (10%), 0:0",
        "9 left\nstep 2/10 (20%), 0:08 left\n",
        "end without a newline",
    ):
        lines.add(piece)
    lines.tell({"kind": "message", "text": "told"})
    lines.close()
    if is_terminal:
        assert "\r\x1b[Kstep 1/10 (10%), 0:09 left" in stream.getvalue()
        assert "step 1/10 (10%), 0:09 left\n" not in stream.getvalue()
    else:
        expected = [
            "starting",
            "step 1/10 (10%), 0:09 left",
            "step 2/10 (20%), 0:08 left",
            "told",
            "end without a newline",
        ]
        assert stream.getvalue().splitlines() == expected


def test_more_workers_than_the_run_has_groups_are_refused_here_and_not_after_a_minute_there(tmp_path):
    config = recipe("quickstart")
    with pytest.raises(ConfigError, match=r"workers: found 3, .* give --workers 2"):
        require_groups(str(tmp_path), config, "3")
    require_groups(str(tmp_path), config, "1..3")
    # A run that began with more groups than its recipe has now.
    Run(str(tmp_path)).keep_config(config.with_overrides({"optim.norm_group": 32}))
    require_groups(str(tmp_path), config, "3")
    require_groups("s3://", config, "3")
