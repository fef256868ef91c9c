"""What this machine has for training, what is missing, and what to do about it.

Neither Ray nor DALI nor torch is imported into this process: versions come from the installed packages' metadata, and
what only an import can tell is asked of a child process with a deadline. No secret is read further than to know that
it is there, and none is shown.
"""

from __future__ import annotations

import configparser
import glob
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.credentials import without_credentials
from cluster.worker import threads_for
from instdisc.doctor_ray import ray_findings
from instdisc.findings import Finding

UNTESTED_ON_GPU = (
    "DALI's mixed (GPU) decoding, and the self-test that chooses between windows and whole images",
    "colour augmentation and normalisation of images on CUDA",
    "bfloat16 autocast on CUDA",
    "NCCL collectives of the memory bank, of its statistics and of DDP, each in a group of its own",
    "a memory bank in page-locked host memory or a mapped file beside a GPU (bank.device cpu, mapped)",
    "checkpoints of weights and rows on a GPU: their copies to page-locked memory, and rows read back",
    "CUDA and NCCL in workers that were forked, before any use of CUDA, from a process that has imported torch",
)
"""Parts that exist for GPUs but that this version was never run with: its tests ran on CPUs."""

DISTRIBUTIONS = (
    "torch",
    "torchvision",
    "ray",
    "nvidia-dali",
    "nvidia-nvimgcodec",
    "fsspec",
    "s3fs",
    "tensorboard",
    "pyarrow",
)
"""Packages whose versions are told; those of NVIDIA carry the CUDA version in their names."""

PROBE_TIMEOUT_S = 30.0
_MIN_SHM_BYTES = 1 << 30
_GIB = float(1 << 30)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "KMP_AFFINITY")
_CUDA_ENDINGS = ("-cuda130", "-cuda120", "-cu13", "-cu12")

_DALI_PROBE = "import nvidia.dali as dali; print(dali.__version__)"
_GPU_PROBE = """
import json, torch
count = torch.cuda.device_count()
found = [torch.cuda.get_device_properties(number) for number in range(count)]
print(json.dumps({"cuda": torch.version.cuda, "gpus": [[g.name, g.total_memory] for g in found]}))
"""


def findings() -> list[Finding]:
    """Return what was found, in the order in which a person reads it. Takes a few seconds; raises nothing."""
    gpu_probe = _start_probe(_GPU_PROBE) if _has_gpu_device() else None
    dali_probe = _start_probe(_DALI_PROBE)
    environment = os.environ
    return [
        Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *versions(),
        *processors(),
        *memory(),
        *threads(environment),
        *gpus(gpu_probe),
        dali(dali_probe),
        *s3(environment),
        *ray_findings(environment),
    ]


def versions() -> Iterator[Finding]:
    """Tell the versions of instdisc and of what it needs, against the bounds that instdisc was installed with."""
    own = _version("instdisc")
    yield Finding("instdisc", own or "not installed", own is not None, "" if own else "install it: uv sync")
    bounds = _bounds()
    for base in DISTRIBUTIONS:
        name = next((n for n in (base, *(base + end for end in _CUDA_ENDINGS)) if _version(n)), None)
        if name is None:
            yield Finding(base, "not installed", False, "install it: uv sync")
            continue
        version = _version(name) or ""
        bad = [bound for bound in bounds.get(name, ()) if not _satisfies(version, bound)]
        shown = version if name == base else f"{version} ({name})"
        yield Finding(base, shown, not bad, f"expected {', '.join(bad)}: uv sync" if bad else "")


def processors() -> Iterator[Finding]:
    """Tell the cores that this process may use, and whether the container allows less time than that."""
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _cpu_quota()
    value = f"{usable} usable of {present}"
    if quota is not None and quota < usable:
        advice = "threads beyond the quota slow each other down: start with taskset on that many cores, or raise it"
        yield Finding("CPU cores", f"{value}, but the container's quota is {quota:.1f}", False, advice)
    else:
        yield Finding("CPU cores", value)


def memory() -> Iterator[Finding]:
    """Tell the main memory, within the container's limit, and /dev/shm, over which processes share tensors."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE))
    total, available = (int(fields.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    value = f"{total / _GIB:.1f} GiB, {available / _GIB:.1f} GiB of it free"
    if limit.isdigit() and int(limit) < total:
        value += f"; the container's limit is {int(limit) / _GIB:.1f} GiB"
    yield Finding("memory", value)
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        yield Finding("/dev/shm", "missing", False, "mount it as tmpfs; Ray's object store lives there")
        return
    size, free = shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize
    advice = "" if size >= _MIN_SHM_BYTES else "start the container with --shm-size=8g: Ray and NCCL need it"
    yield Finding("/dev/shm", f"{size / _GIB:.1f} GiB, {free / _GIB:.1f} GiB of it free", not advice, advice)


def threads(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Tell how the cores are divided among workers, and the OpenMP settings that change it."""
    here, one, two = (threads_for(num_workers) for num_workers in (0, 1, 2))
    yield Finding("threads", f"{here} with workers=0 (this process), {one} with 1 worker, {two} each with 2 workers")
    found = [f"{name}={environment[name]}" for name in _THREAD_VARIABLES if name in environment]
    advice = "local worker processes set OMP_NUM_THREADS and OMP_WAIT_POLICY themselves" if found else ""
    yield Finding("OpenMP settings", ", ".join(found) or "none set", True, advice)


def gpus(probe: subprocess.Popen[str] | None) -> Iterator[Finding]:
    """Tell the GPUs as torch sees them, and what was never tried on one; probe: None where there is no device."""
    if probe is None:
        yield Finding("GPU", "none", True, "a CPU is enough for the quickstart; large data sets want GPUs")
    else:
        answer, error = _finish_probe(probe)
        try:
            seen = json.loads(answer)
        except ValueError:
            seen = {"gpus": [], "cuda": None}
        driver = re.search(r"Kernel Module\D+([\d.]+)", _text("/proc/driver/nvidia/version"))
        versions = f"driver {driver[1] if driver else 'unknown'}, torch's CUDA {seen['cuda'] or 'none'}"
        for name, num_bytes in seen["gpus"]:
            yield Finding("GPU", f"{name}, {num_bytes / _GIB:.0f} GiB, {versions}")
        if not seen["gpus"]:
            advice = f"{error or 'torch finds no GPU'}: check the driver, CUDA_VISIBLE_DEVICES and torch's CUDA version"
            yield Finding("GPU", f"a device is there that torch cannot use; {versions}", False, advice)
    yield Finding("untested on GPUs", "; ".join(UNTESTED_ON_GPU), True, "this version was tested on CPUs only")


def dali(probe: subprocess.Popen[str]) -> Finding:
    """Tell whether DALI can be imported."""
    answer, error = _finish_probe(probe)
    if answer.strip():
        return Finding("DALI import", "works")
    return Finding(
        "DALI import", "fails", False, f"{error}. Only GPUs need it; there data.backend=nvimgcodec trains without"
    )


def s3(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Tell where S3 credentials would come from, and which server is asked."""
    key, secret = (bool(environment.get(name)) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    asked = environment.get("AWS_PROFILE") or "default"
    profiles = _profiles(environment)
    if key != secret:
        there, missing = sorted(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), key=lambda n: not environment.get(n))
        yield Finding("S3 credentials", f"{there} without {missing}", False, f"set {missing} too, or unset {there}")
    elif key:
        yield Finding("S3 credentials", "environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    elif asked in profiles:
        yield Finding("S3 credentials", f"profile {asked!r}")
    elif environment.get("AWS_PROFILE"):
        known = ", ".join(sorted(profiles)) or "none"
        advice = f"set AWS_PROFILE to a profile that is there ({known}), or unset it"
        yield Finding("S3 credentials", f"AWS_PROFILE names {asked!r}, which is in no file", False, advice)
    elif environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        yield Finding("S3 credentials", "environment: AWS_WEB_IDENTITY_TOKEN_FILE")
    else:
        advice = "not needed without s3:// URIs; on AWS the machine's role is used, which is not asked here"
        yield Finding("S3 credentials", "none found", True, advice)
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    yield Finding("S3 endpoint", without_credentials(endpoint) if endpoint else "AWS (no AWS_ENDPOINT_URL)")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bounds() -> dict[str, list[str]]:
    """Return the version bounds of instdisc's installed metadata by package, such as {"ray": ["<2.61", ">=2.60"]}."""
    try:
        required = importlib.metadata.requires("instdisc") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in required:
        name = re.match(r"[\w.-]+", line)
        if name:
            found[name[0]] = re.findall(r"(?:<|>=)[\d.]+", line.split(";")[0])
    return found


def _satisfies(version: str, bound: str) -> bool:
    """Whether a version is within ">=1.2" or "<3", the two kinds of bounds in use; local parts (+cu130) are ignored."""
    limit = [int(part) for part in re.findall(r"\d+", bound)]
    numbers = [int(part) for part in re.findall(r"\d+", version.split("+")[0])][: len(limit)]
    return numbers >= limit if bound.startswith(">=") else numbers < limit


def _cpu_quota() -> float | None:
    """Return the cores' worth of time that the container may use, None where it is not limited (cgroup v2)."""
    match = re.match(r"(\d+) (\d+)", _text("/sys/fs/cgroup/cpu.max"))
    return int(match[1]) / int(match[2]) if match else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _has_gpu_device() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")


def _start_probe(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)


def _finish_probe(probe: subprocess.Popen[str]) -> tuple[str, str]:
    """Return what a probe printed and, where it failed, its last line of error; "" for what there is not."""
    try:
        answer, errors = probe.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return "", f"no answer within {PROBE_TIMEOUT_S:.0f} s"
    if probe.returncode == 0:
        return answer, ""
    last = errors.strip().splitlines()[-1:] or [f"exit code {probe.returncode}"]
    return "", last[0]


def _profiles(environment: Mapping[str, str]) -> set[str]:
    """Return the names of the profiles in AWS's two files; their contents are not looked at."""
    names: set[str] = set()
    for variable, default in (
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        ("AWS_CONFIG_FILE", "~/.aws/config"),
    ):
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read(os.path.expanduser(environment.get(variable) or default))
        except (configparser.Error, UnicodeDecodeError):
            continue
        names |= {section.removeprefix("profile ") for section in parser.sections()}
    return names
