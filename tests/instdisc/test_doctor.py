"""What the doctor finds, against what this machine says in other ways."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from instdisc import doctor
from instdisc.doctor import findings
from instdisc.doctor_ray import ray_address
from instdisc.findings import Finding, as_document, as_table

SECRET = "not-a-real-secret-but-must-not-be-shown"


@pytest.fixture(scope="module")
def found():
    started_s = time.monotonic()
    result = {finding.name: finding for finding in findings()}
    result["seconds"] = Finding("seconds", str(time.monotonic() - started_s))
    return result


@pytest.fixture
def no_aws(tmp_path):
    """An environment in which AWS's files are ours, so that those of the person who tests are not looked at."""
    return {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"), "AWS_CONFIG_FILE": str(tmp_path / "config")}


def test_versions_are_those_of_the_installed_packages(found):
    for name in ("instdisc", "torch", "torchvision", "ray", "fsspec", "s3fs", "tensorboard", "pyarrow"):
        assert found[name].value == importlib.metadata.version(name)
        assert found[name].ok, found[name]
    assert "nvidia-dali-cuda1" in found["nvidia-dali"].value


def test_cores_memory_and_threads_are_those_of_this_machine(found):
    assert found["CPU cores"].value.startswith(f"{len(os.sched_getaffinity(0))} usable")
    total_gib = float(found["memory"].value.split(" GiB")[0])
    assert total_gib == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.06)
    assert found["threads"].value.startswith(f"{len(os.sched_getaffinity(0))} with workers=0")
    assert "GiB" in found["/dev/shm"].value


def test_dali_is_tried_and_what_was_never_tried_on_a_gpu_is_told(found):
    assert found["DALI import"] == Finding("DALI import", "works")
    for part in doctor.UNTESTED_ON_GPU:
        assert part in found["untested on GPUs"].value
    assert len(doctor.UNTESTED_ON_GPU) == 7
    assert "GPU" in found


def test_it_answers_soon(found):
    # A few seconds on an idle machine; the bound leaves room for one on which other tests run.
    assert float(found["seconds"].value) < 15


def test_neither_torch_nor_ray_nor_dali_is_imported():
    code = (
        "import json, sys, instdisc.doctor as d; list(d.versions()); list(d.threads({}));"
        "print(json.dumps([m for m in ('torch', 'ray', 'nvidia') if m in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(answer.stdout) == []


@pytest.mark.parametrize(
    ("version", "bound", "expected"),
    [
        ("2.60.0", ">=2.60", True),
        ("2.60.0", "<2.61", True),
        ("2.61.0", "<2.61", False),
        ("2.9.1", ">=2.11", False),
        ("2.11.0+cpu", ">=2.11", True),
        ("3.0.0", "<3", False),
        ("2.99.9", "<3", True),
        ("2026.9.0", ">=2026.2", True),
    ],
)
def test_versions_compare_by_number(version, bound, expected):
    assert doctor._satisfies(version, bound) is expected


def test_a_version_out_of_bounds_is_pointed_out_with_the_bound(monkeypatch):
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.58.1" if name == "ray" else installed(name))
    (ray,) = [finding for finding in doctor.versions() if finding.name == "ray"]
    assert not ray.ok
    assert ">=2.60" in ray.advice


def test_a_missing_package_is_pointed_out(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTIONS", ("no-such-package-of-ours",))
    assert [finding.ok for finding in doctor.versions()] == [True, False]


def s3_credentials(environment):
    text, endpoint = doctor.s3(environment)
    assert SECRET not in as_table([text, endpoint])
    return text


def test_credentials_in_the_environment_are_found_and_never_shown(no_aws):
    keys = {"AWS_ACCESS_KEY_ID": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET}
    assert "environment" in s3_credentials(no_aws | keys).value
    half = s3_credentials(no_aws | {"AWS_ACCESS_KEY_ID": SECRET})
    assert not half.ok
    assert half.value == "AWS_ACCESS_KEY_ID without AWS_SECRET_ACCESS_KEY"


def test_credentials_in_a_profile_are_found_and_a_missing_profile_is_pointed_out(no_aws, tmp_path):
    assert s3_credentials(no_aws).value == "none found"
    (tmp_path / "credentials").write_text(f"[default]\naws_secret_access_key = {SECRET}\n")
    (tmp_path / "config").write_text("[profile lab]\nregion = eu-central-1\n")
    assert s3_credentials(no_aws).value == "profile 'default'"
    assert s3_credentials(no_aws | {"AWS_PROFILE": "lab"}).value == "profile 'lab'"
    wrong = s3_credentials(no_aws | {"AWS_PROFILE": "lap"})
    assert not wrong.ok
    assert "default, lab" in wrong.advice


def test_files_that_cannot_be_parsed_are_survived(no_aws, tmp_path):
    (tmp_path / "credentials").write_bytes(b"\xff\xfe no section")
    (tmp_path / "config").write_text("region = nowhere\n")
    assert s3_credentials(no_aws).value == "none found"


def test_addresses_are_shown_without_a_password_in_them(no_aws):
    _, endpoint = doctor.s3(no_aws | {"AWS_ENDPOINT_URL": f"http://me:{SECRET}@minio:9000"})
    assert endpoint.value == "http://minio:9000"
    assert ray_address({"RAY_ADDRESS": "ray://head:10001"}).value == "ray://head:10001"
    assert ray_address({"RAY_ADDRESS": f"ray://me:{SECRET}@head:10001"}).value == "ray://head:10001"
    assert "not set" in ray_address({}).value


def test_thread_settings_are_told():
    _, settings = doctor.threads({"OMP_NUM_THREADS": "3", "HOME": SECRET})
    assert settings.value == "OMP_NUM_THREADS=3"


def test_a_probe_that_fails_or_hangs_is_told_in_one_line(monkeypatch):
    failed = doctor.dali(doctor._start_probe("import nvidia_dali_that_is_not_there"))
    assert not failed.ok
    assert failed.advice.startswith("ModuleNotFoundError: No module named 'nvidia_dali_that_is_not_there'")
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.2)
    hung = doctor._start_probe("import time; time.sleep(60)")
    assert "no answer" in doctor.dali(hung).advice
    assert hung.poll() is not None


def test_gpus_are_listed_and_a_device_that_torch_cannot_use_is_pointed_out():
    seen = json.dumps({"cuda": "13.0", "gpus": [["NVIDIA H100", 80 * 2**30]]})
    gpu, untested = doctor.gpus(doctor._start_probe(f"print({seen!r})"))
    assert gpu.value.startswith("NVIDIA H100, 80 GiB")
    assert untested.name == "untested on GPUs"
    none, _ = doctor.gpus(doctor._start_probe("raise OSError('libcuda.so is missing')"))
    assert not none.ok
    assert "libcuda.so is missing" in none.advice


def test_the_gpu_probe_answers_here_whether_or_not_there_is_a_gpu():
    answer, error = doctor._finish_probe(doctor._start_probe(doctor._GPU_PROBE))
    assert error == ""
    assert set(json.loads(answer)) == {"cuda", "gpus"}


def test_the_table_fits_its_width_and_marks_what_needs_attention():
    table = as_table([Finding("a", "x " * 80), Finding("long name", "bad", False, "do this " * 20)], width=60)
    lines = table.splitlines()
    assert max(len(line) for line in lines) <= 60
    assert [line for line in lines if line.startswith("!!")] == ["!!   long name  bad"]
    assert lines[-1] == "1 of 2 need attention (!!)."


def test_the_document_is_json_with_every_field():
    document = json.loads(json.dumps(as_document([Finding("a", "b", False, "c")])))
    assert document == {"findings": [{"name": "a", "value": "b", "ok": False, "advice": "c"}]}
