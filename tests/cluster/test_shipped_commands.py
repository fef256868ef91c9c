"""The start commands of ray_config.yaml at work: a head and a worker in network namespaces, and what is open then."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from cluster.open_ports import open_ports, ray_processes

LAUNCHER_FILE = Path(__file__).parents[2] / "ray_config.yaml"
DOCKERFILE = LAUNCHER_FILE.parent / "cluster" / "Dockerfile"
TIMEOUT_S = 240
HOSTS = {"head": "10.203.7.1", "worker": "10.203.7.2"}
DASHBOARD_PORT, GCS_PORT = 8265, 6379

DRIVER = """
import json, os, sys, time
from cluster.ray_trainer import run_on_ray

def hold(worker, folder):
    import torch, torch.distributed as dist
    one = torch.ones(1)
    dist.all_reduce(one)
    open(f"{folder}/up-{worker.rank}", "w").write(str(int(one)))
    while not os.path.exists(f"{folder}/end"):
        time.sleep(0.1)
    return int(one)

if __name__ == "__main__":
    print(run_on_ray(hold, 2, sys.argv[2], address=sys.argv[1], threads_per_worker=1))
"""

ASK = """
import grpc, sys
from ray.core.generated import gcs_service_pb2 as service, gcs_service_pb2_grpc as stubs
with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        stubs.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(service.GetAllNodeInfoRequest(), timeout=20)
        print("answered")
    except grpc.RpcError as error:
        print(error.code().name)
"""


SUBMIT = """
import json, sys, urllib.error, urllib.request
token, entrypoint, *urls = sys.argv[1:]
for url in urls:
    body = json.dumps({"entrypoint": entrypoint}).encode()
    authorized = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **authorized})
    try:
        print(urllib.request.urlopen(request, timeout=20).status)
    except urllib.error.HTTPError as error:
        print(error.code)
    except OSError as error:
        print(type(error).__name__)
"""


def run(*command, check=True, **options):
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=TIMEOUT_S, **options)


@pytest.fixture
def hosts():
    """Two network namespaces with a link between them; whatever runs in them ends with them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = {host: f"instdisc-{host}-{os.getpid()}" for host in HOSTS}
    if run("ip", "netns", "add", names["head"], check=False).returncode != 0:
        pytest.skip("network namespaces are not allowed here")
    run("ip", "netns", "add", names["worker"])
    try:
        run("ip", "link", "add", "up0", "netns", names["head"], "type", "veth", "peer", "up0", "netns", names["worker"])
        for host, address in HOSTS.items():
            within = ("ip", "-netns", names[host])
            run(*within, "addr", "add", f"{address}/24", "dev", "up0")
            run(*within, "link", "set", "up0", "up")
            run(*within, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            for pid in run("ip", "netns", "pids", name, check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            run("ip", "netns", "delete", name, check=False)


def start(name, host, namespace, folder, environment, extra=""):
    """Run the command that starts Ray, as it stands in the file less what only AWS has."""
    (command,) = [c for c in yaml.safe_load(LAUNCHER_FILE.read_text())[name] if "ray start" in c]
    command = command.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    command += f" --node-ip-address={HOSTS[host]} --num-cpus=1 --object-store-memory={80 * 2**20} {extra}"
    # In a login shell, as `ray up` does: it sets PATH anew, and then the profile of the image counts.
    (line,) = re.findall(r"echo '(export PATH=.*)' > /etc/profile.d", DOCKERFILE.read_text())
    (folder / ".bash_profile").write_text(line.replace("/opt/instdisc/.venv/bin", str(Path(sys.executable).parent)))
    shell = ("bash", "--login", "-c", "-i")
    done = run("ip", "netns", "exec", namespace, *shell, command, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_only_ports_that_the_security_group_closes_are_open_and_the_dashboard_is_on_loopback(hosts, capfd):
    with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        (folder / ".ray" / "auth_token").chmod(0o600)
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment |= {"HOME": name, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_HEAD_IP": HOSTS["head"]}
        start("head_start_ray_commands", "head", hosts["head"], folder, environment, f"--temp-dir={name}/h")
        start("worker_start_ray_commands", "worker", hosts["worker"], folder, environment)
        (folder / "driver.py").write_text(DRIVER)
        address = f"{HOSTS['head']}:{GCS_PORT}"
        driver = subprocess.Popen(
            ["ip", "netns", "exec", hosts["head"], sys.executable, str(folder / "driver.py"), address, name],
            env={**environment, "PYTHONPATH": str(LAUNCHER_FILE.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline_s = time.monotonic() + TIMEOUT_S
        while not ((folder / "up-0").exists() and (folder / "up-1").exists()):
            assert driver.poll() is None, driver.stdout.read()
            assert time.monotonic() < deadline_s
            time.sleep(0.2)

        pids = {int(pid): host for host in HOSTS for pid in run("ip", "netns", "pids", hosts[host]).stdout.split()}
        found = open_ports({pid: role for pid, role in ray_processes().items() if pid in pids})
        with capfd.disabled():
            print()
            for port in found:
                print(json.dumps({"host": pids[port.pid], "role": port.role, "at": port.host, "port": port.port}))
        beyond = {port.port for port in found if not port.is_loopback()}
        assert GCS_PORT in beyond
        assert DASHBOARD_PORT in {port.port for port in found}
        assert DASHBOARD_PORT not in beyond
        inside = ("ip", "netns", "exec", hosts["worker"], sys.executable, "-c", ASK, address)
        without = {k: v for k, v in environment.items() if k != "RAY_AUTH_MODE"} | {"HOME": "/nowhere"}
        assert run(*inside, env=without).stdout.strip() == "UNAUTHENTICATED"
        agents = {port.role: f"http://{port.host}:{port.port}" for port in found if port.host == HOSTS["head"]}
        jobs = f"{agents['ray::DashboardAgent']}/api/job_agent/jobs/"
        environments = f"{agents['ray::RuntimeEnvAgent']}/get_or_create_runtime_env"
        ask = (*inside[:4], sys.executable, "-c", SUBMIT)
        refused = run(*ask, "", f"touch {name}/intruded", jobs, environments, env=without)
        assert refused.stdout.split() == ["401", "401"]
        token = (folder / ".ray" / "auth_token").read_text()
        assert run(*ask, token, f"touch {name}/invited", jobs, env=without).stdout.split() == ["200"]
        deadline_s = time.monotonic() + TIMEOUT_S
        while not (folder / "invited").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        assert not (folder / "intruded").exists()
        (folder / "end").touch()
        told, _ = driver.communicate(timeout=TIMEOUT_S)
        assert driver.returncode == 0, told
        assert told.strip().splitlines()[-1] == "2"
