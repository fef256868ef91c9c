"""The command line: what a person meets, mistakes included. Training here is in this process or in local processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import write_cifar10

import instdisc
from cluster.worker import run_local
from dataloading.index import NoSplit
from dataloading.scanned import scan_dataset
from instdisc.cli.main import main
from instdisc.images import open_images
from instdisc.runs import Run, RunError
from instdisc.train.image_sets import open_test_set, open_train_set, require_same_images, tell_notes

TINY = [
    *("--data.max_rows", "none", "--model.width", "8", "--model.feature_dim", "16"),
    *("--optim.global_batch", "16", "--eval.k", "5", "--system.log_every", "1"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_cifar10(tmp_path_factory.mktemp("commands") / "data", 96, 20)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A finished run of two epochs, trained in this process."""
    uri = str(tmp_path_factory.mktemp("commands") / "run")
    assert train(root, uri) == 0
    return uri


def train(root, uri, *more):
    arguments = ["--workers", "0", "--data.root", str(root), "--optim.epochs", "2", *TINY]
    return main(["train", "cifar10-cpu", "--run", uri, *arguments, *more])


def test_a_finished_run_says_so_at_once(root, finished, capsys):
    assert train(root, finished) == 0
    printed = capsys.readouterr().out
    assert "This run is finished: 12 steps" in printed
    assert "kNN, images re-encoded" in printed


def test_the_result_as_json_is_one_document(root, finished, capsys):
    assert train(root, finished, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["finished"]
    assert document["metrics"]["knn_top1"][-1][0] == 12


def test_a_run_holds_its_configuration_events_results_and_picture(finished):
    run = Run(finished)
    config = run.config()
    assert config is not None
    assert config.optim.norm_group == 16
    assert run.index().num_rows == 96
    with Image.open(f"{finished}/neighbours.png") as picture:
        assert min(picture.size) > 200
    assert any(name.startswith("events.") for name in os.listdir(f"{finished}/tensorboard"))


def test_show_tells_what_a_run_is(finished, capsys):
    assert main(["show", finished]) == 0
    assert "recipe cifar10-cpu, finished, step 12" in capsys.readouterr().out
    assert main(["show", finished, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 12


def test_knn_of_a_run_is_the_one_measured_at_its_end(finished, capsys):
    assert main(["knn", finished, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    result = Run(finished).result()
    assert result is not None
    for name in ("knn_top1", "knn_bank_top1"):
        assert document[name] == pytest.approx(result.metrics[name][-1][1], abs=1e-6)


def test_embed_writes_unit_features_in_row_order(finished, tmp_path, capsys):
    out = tmp_path / "features.npy"
    assert main(["embed", finished, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 96
    features_ND = np.load(out, allow_pickle=False)
    assert features_ND.shape == (96, 16)
    np.testing.assert_allclose(np.linalg.norm(features_ND, axis=1), 1, rtol=1e-5)


def test_the_python_interface_loads_encoder_and_bank(finished, root):
    encoder, bank = instdisc.load_encoder(finished), instdisc.load_bank(finished)
    pixels_NHWC = np.frombuffer((root / "cifar-10-batches-bin" / "test_batch.bin").read_bytes(), np.uint8)
    image = Image.fromarray(pixels_NHWC.reshape(20, 3073)[0, 1:].reshape(3, 32, 32).transpose(1, 2, 0))
    with torch.no_grad():
        features_BD = encoder(encoder.preprocess(image)[None])
    assert not encoder.training
    scores_BK, indices_BK = bank.nearest(features_BD, k=3)
    for features, k, message in [(features_BD, 97, "1 to 96"), (features_BD[0], 3, r"expected \(B, 16\)")]:
        with pytest.raises(ValueError, match=message):
            bank.nearest(features, k)
    assert scores_BK.shape == indices_BK.shape == (1, 3)
    torch.testing.assert_close(bank.rows_ND.norm(dim=1), torch.ones(96))
    assert (bank.last_step_N >= 6).all()


def test_index_lists_a_folder_and_its_damaged_images(tmp_path, capsys):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (200, 150)).save(tmp_path / name)
    (tmp_path / "b" / "4.jpg").write_bytes(b"not an image")
    assert main(["index", str(tmp_path), "--json", "--out", str(tmp_path / "index.parquet")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_rows"] == 4
    assert document["num_bad"] == 1
    assert document["classes"] == ["a", "b"]
    assert "b/4.jpg" in next(iter(document["bad"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart"], "did you mean quickstart"),
        (["train", "--objective.temprature", "0.1"], "did you mean objective.temperature"),
        (["train", "--objective.temperature", "warm"], "expected a finite number"),
        (["train", "--optim.lr"], "no value after it"),
        (["train", "--workers", "-3"], "workers: found '-3'"),
        (["train", "cifar10-cpu", "--data.root", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (
            ["train", "cifar10-cpu", "--data.root", "/nowhere/at/all", "--data.kind", "cifar10"],
            "unpack it in /nowhere/at/all, which gives",
        ),
        (["train", "--data.root", "/tmp"], "since code makes those images"),
        (["train", "cifar10-cpu", "--data.root", ""], "data.root: found ''"),
        (["train", "--data.test_split", "tset"], "demo: found split 'tset', expected the split train or test"),
        (["train", "--run", "memory://run", "--workers", "2"], "memory that ends with each process"),
        (["train", "--optim.final_lr", "-5"], "optim.final_lr: found -5.0, expected at least 0"),
        (
            ["train", "--model.architecture", "alexnet", "--data.max_rows", "20"],
            "augment.size: found 32, which alexnet cannot take",
        ),
        (["embed", "/nowhere/run", "--out", "/tmp"], "--out /tmp: found a folder"),
        (["index", "/nowhere/images", "--out", "/tmp"], "--out /tmp: found a folder"),
        (["show", "/nowhere/run"], "no run at /nowhere/run"),
        (["index", "/nowhere/images"], "/nowhere/images"),
    ],
)
def test_a_mistake_is_told_without_a_traceback_and_exits_with_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workers = ["--workers", "0"] if arguments[0] == "train" and "--workers" not in arguments else []
    assert main([*arguments, *workers]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_an_empty_folder_is_told(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    uri = str(tmp_path / "run")
    assert main(["train", "cifar10-cpu", "--workers", "0", "--run", uri, "--data.root", str(tmp_path / "empty")]) == 2
    assert "no images in" in capsys.readouterr().err


def test_another_configuration_is_refused_with_the_difference(root, finished, capsys):
    before = Run(finished).result()
    assert train(root, finished, "--objective.temperature", "0.3") == 2
    printed = capsys.readouterr().err
    assert "objective.temperature: the run has 0.2, asked for 0.3" in printed
    assert Run(finished).result() == before


def test_a_run_whose_images_changed_is_refused_with_what_differs(tmp_path, capsys):
    root = write_cifar10(tmp_path / "data", 96, 20)
    uri = str(tmp_path / "run")
    assert train(root, uri) == 0
    (tmp_path / "run" / "results.json").unlink()
    batch = root / "cifar-10-batches-bin" / "data_batch_1.bin"
    batch.write_bytes(batch.read_bytes() + bytes(3073))
    assert train(root, uri) == 2
    printed = capsys.readouterr().err
    assert "was started on other images" in printed
    assert "97" in printed


def test_a_finished_run_is_told_as_finished_without_its_images(tmp_path, capsys):
    root = write_cifar10(tmp_path / "data", 96, 20)
    uri = str(tmp_path / "run")
    assert train(root, uri) == 0
    shutil.rmtree(root)
    capsys.readouterr()
    assert train(root, uri) == 0
    assert "This run is finished: 12 steps" in capsys.readouterr().out
    assert main(["show", uri]) == 0


def test_a_start_that_found_no_images_decides_nothing(root, tmp_path, capsys):
    uri = str(tmp_path / "run")
    assert main(["train", "cifar10-cpu", "--workers", "0", "--run", uri, "--data.root", str(root / "nowhere")]) == 2
    assert train(root, uri, "--data.kind", "folder") == 2
    assert train(root, uri, "--objective.temperature", "0.3") == 0
    assert train(root, uri, "--objective.temperature", "0.3", "--eval.k", "3") == 0
    assert "eval.k not applied; `instdisc knn" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "results.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"data": []}', '{"metrics": {"a": 3}}', "\xff"])
def test_a_damaged_file_of_a_run_is_named(name, text, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(text.encode("latin-1"))
    assert main(["show", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert f"{name} of run {tmp_path / 'run'} cannot be read" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(("field", "value"), [("step", [[]]), ("finished", "0"), ("summary", []), ("num_steps", None)])
def test_a_result_with_a_value_of_another_kind_is_named(field, value, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert main(["show", str(tmp_path / "run")]) == 2
    assert f"results.json: {field}: found" in capsys.readouterr().err


def test_a_configuration_of_another_network_than_the_checkpoints_is_named(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    document = json.loads(path.read_text())
    document["model"]["feature_dim"] *= 2
    path.write_text(json.dumps(document))
    assert main(["knn", str(tmp_path / "run")]) == 2
    assert "another network" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_hears_signals_while_it_is_still_being_imported(number, monkeypatch, capsys):
    def slow_import(name):
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(number)

    monkeypatch.setattr("instdisc.cli.main.import_module", slow_import)
    assert main(["status", "run"]) == 130
    printed = capsys.readouterr().err
    assert "interrupted" in printed
    assert "Traceback" not in printed


def test_moved_images_are_found_by_later_commands(tmp_path, capsys):
    root = write_cifar10(tmp_path / "data", 96, 20)
    uri = str(tmp_path / "run")
    assert train(root, uri) == 0
    (tmp_path / "run" / "results.json").unlink()
    root.rename(tmp_path / "moved")
    assert train(tmp_path / "moved", uri) == 0
    assert main(["knn", uri]) == 0
    curve = Run(uri).result().metrics["knn_top1"]
    assert len({step for step, _ in curve}) == len(curve)


def test_ranks_with_other_images_are_told(tmp_path):
    places = [str(write_cifar10(tmp_path / str(rank), 96 + rank, 20)) for rank in range(2)]
    with pytest.raises(Exception, match="rank 1 has other training images than rank 0"):
        run_local(open_own_images, 2, places)


def test_headers_are_read_by_one_rank_at_the_first_start_only(tmp_path):
    for number in range(6):
        path = tmp_path / "photos/train" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100 + number, 120)).save(path)
    for scanned in ([True, False], [False, False]):
        assert run_local(open_and_tell, 2, str(tmp_path / "photos"), str(tmp_path / "run")) == scanned
    Image.new("RGB", (99, 99)).save(tmp_path / "photos/train/7.png")
    with pytest.raises(RunError, match=r"started on other images.*1 added \(7\.png\)"):
        run_local(open_and_tell, 1, str(tmp_path / "photos"), str(tmp_path / "run"))


def open_and_tell(worker, root, uri):
    scanned = []

    def scan(*args, **more):
        scanned.append(True)
        return scan_dataset(*args, **more)

    config = instdisc.recipe("quickstart", **{"data.root": root, "data.kind": "auto"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataloading.folder.scan_dataset", scan)
        dataset = open_train_set(worker, config, Run(uri))
    assert dataset.index.widths_N.tolist() == [100, 101, 102, 103, 104, 105]
    return bool(scanned)


def test_the_help_of_train_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert "  data.train_split" in lines, "a field a line"


def test_what_is_left_out_is_told_once_at_the_start_and_a_named_split_is_never_passed_over(tmp_path):
    for place in ("train/a/1.png", "train/b/2.png", "train/banner.png", "dev/1.png", "extra/3.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / place)
    (tmp_path / "train/a/x.heic").write_bytes(b"x")
    events = []
    run_local(open_and_tell_notes, 0, str(tmp_path), on_event=events.append)
    told = [event["text"] for event in events if event["kind"] == "message"]
    assert told == [
        "training images: from the folder train; other splits: dev",
        "test images: from the folder dev; other splits: train",
        "training and test images: 1 folder not used: extra",
        "training images: 1 other file left out: 1 .heic",
        "training images: no labels: banner.png is in no class folder",
        "test images: no labels: 1.png is in no class folder",
    ]
    assert [event["note"]["images"] for event in events if "note" in event] == [
        text.partition(" images: ")[0] for text in told
    ]
    named = instdisc.recipe(
        "quickstart", **{"data.root": str(tmp_path), "data.kind": "folder", "data.test_split": "night"}
    )
    with pytest.raises(NoSplit, match=r"no night split"):
        open_test_set(named)


def open_and_tell_notes(worker, root):
    config = instdisc.recipe("quickstart", **{"data.root": root, "data.kind": "folder"})
    tell_notes(worker, open_images(config.data, "train"), open_test_set(config))


def open_own_images(worker, places):
    config = instdisc.recipe("cifar10-cpu", **{"data.root": places[worker.rank], "data.max_rows": None})
    require_same_images(worker, open_images(config.data, "train"), open_test_set(config))


def test_the_python_interface_stays_what_it_is():
    assert instdisc.fit is instdisc.fit
    assert callable(instdisc.fit)


def test_a_run_that_cannot_be_written_is_told(root, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train(root, str(tmp_path / "file" / "run")) == 2
    printed = capsys.readouterr().err
    assert str(tmp_path / "file") in printed
    assert "Traceback" not in printed


def test_features_that_are_not_finite_stop_the_run_before_anything_of_them_is_saved(root, tmp_path, capsys):
    uri = str(tmp_path / "run")
    assert train(root, uri, "--optim.lr", "1e30", "--checkpoint.every_steps", "1") == 1
    printed = capsys.readouterr().err
    assert "rank 0" in printed
    assert "not finite" in printed
    assert Run(uri).result() is None
    from cluster.checkpoint import read_latest

    checkpoint = read_latest(Run(uri).checkpoints())
    assert checkpoint is None or all(t.isfinite().all() for t in checkpoint.tensors().values())


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(root, tmp_path):
    uri = str(tmp_path / "run")
    command = [
        *(sys.executable, "-m", "instdisc.cli.main", "train", "cifar10-cpu", "--run", uri, "--launcher", "local"),
        *("--workers", "2", "--data.root", str(root), "--optim.epochs", "200", *TINY, "--eval.every_epochs", "0"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "a checkpoint is saved. Go on with" in out
    bank = instdisc.load_bank(uri)
    stopped_at = int(bank.last_step_N.max()) + 1
    assert f"Stopped at step {stopped_at:,} of 1,200" in out


def test_unknown_options_of_other_commands_are_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--objective.temperature", "1"])
    assert exit.value.code == 2
    assert "unknown arguments" in capsys.readouterr().err


def everything_in(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_a_command_that_only_reads_a_run_writes_nothing_into_it(finished, tmp_path, capsys):
    before = everything_in(Path(finished))
    for command in ("status", "show", "knn", "embed", "checkpoints"):
        words = {"embed": [finished, "--out", str(tmp_path / "f.npy")], "checkpoints": ["ls", finished]}
        assert main([command, *words.get(command, [finished])]) == 0
    assert everything_in(Path(finished)) == before
    capsys.readouterr()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_answer_is_printed_in_any_encoding(encoding, finished, monkeypatch):
    for words in (["knn", finished], ["show", finished], ["knn", "--help"]):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        with contextlib.suppress(SystemExit):  # of --help
            assert main(words) == 0
        stream.flush()
        assert len(stream.buffer.getvalue()) > 50


def test_printed_commands_can_be_pasted_whatever_the_names(root, tmp_path, capsys):
    uri = str(tmp_path / "my run #2")
    assert train(root, uri) == 0
    assert main(["status", uri]) == 0
    printed = capsys.readouterr().out
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith(("  instdisc", "  tensorboard"))]
    assert ["instdisc", "show", uri] in commands
    assert ["instdisc", "knn", uri] in commands
    assert ["tensorboard", "--logdir", f"{uri}/tensorboard"] in commands
    assert main(["show", str(tmp_path / "no run")]) == 2
    assert f"`instdisc train RECIPE --run '{tmp_path}/no run'`" in capsys.readouterr().err


def test_the_home_folder_is_meant_by_a_tilde_in_every_command(root, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(root.parent))
    place = f"~/{root.name}"
    (root.parent / "out").mkdir()
    assert main(["index", place]) == 0
    assert main(["embed", finished, place, "--split", "test", "--out", "~/out/features.npy"]) == 0
    assert (root.parent / "out/features.npy").exists()
    assert main(["pack", place, "~/packed", "--workers", "0"]) == 0
    assert main(["verify", "~/packed"]) == 0
    assert main(["status", f"~/{Path(finished).parent.name}/{Path(finished).name}"]) == 2
    assert str(root.parent) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["index", "gs://bucket/x"], "gs:// needs a package"),
        (["status", "gs://bucket/run"], "expected a folder or s3:// for a run"),
        (["train", "quickstart", "--run", "az://bucket/run", "--workers", "0"], "expected a folder or s3:// for a run"),
        (["index", "nothing://bucket/x"], "found nothing://"),
        (["train", "quickstart", "--run", "s3://me:geheim@bucket/run"], "found a user name or password"),
        (["index", "s3://me:geheim@bucket/x"], "without a user name"),
    ],
)
def test_a_uri_that_cannot_be_used_is_one_line(words, told, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert "geheim" not in line


def test_a_user_without_a_home_folder_trains_and_looks(root, tmp_path):
    """In a container that runs as a number that its list of users does not have."""
    uri = str(tmp_path / "run")
    arguments = ["train", "cifar10-cpu", "--run", uri, "--workers", "0", "--data.root", str(root), *TINY]
    script = (
        "from instdisc.cli.main import main\n"
        f"assert main({['index', str(root)]!r}) == 0\n"
        f"assert main({[*arguments, '--optim.epochs', '1']!r}) == 0\n"
        "import ray.train.constants  # which looks for the home folder\n"
    )
    as_a_number = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    without_home = ["env", "-u", "HOME", f"TMPDIR={tmp_path}", sys.executable, "-c", script]
    done = subprocess.run([*as_a_number, *without_home], capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "instdisc-home-12345").stat().st_mode & 0o777 == 0o700
