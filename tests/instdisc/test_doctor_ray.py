"""What the doctor tells of Ray: authentication, the token's file, what runs, which ports are open."""

import os
import socket
import subprocess
import sys

import pytest

from cluster.open_ports import OpenPort, environment_of, open_ports
from instdisc.doctor_ray import authentication, reachable, running
from instdisc.findings import as_table

SECRET = "0123456789abcdef-not-a-token-but-never-to-be-shown"


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "auth_token"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def told(environment, path):
    """The findings by name, of an environment whose token file is ours."""
    found = list(authentication({"RAY_AUTH_TOKEN_PATH": str(path), **environment}))
    assert SECRET not in as_table(found)
    return {finding.name: finding for finding in found}


def test_authentication_is_on_with_a_token_in_a_file_or_in_the_environment(tmp_path, token_file):
    found = told({"RAY_AUTH_MODE": "token"}, token_file)
    assert found["Ray authentication"].ok
    assert found["Ray token"].value == f"{token_file} (rights 600)"
    found = told({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRET}, tmp_path / "none")
    assert found["Ray authentication"].ok
    assert found["Ray token"].value == "environment: RAY_AUTH_TOKEN"


def test_a_missing_token_and_authentication_that_is_off_are_pointed_out(tmp_path, token_file):
    missing = told({"RAY_AUTH_MODE": "token"}, tmp_path / "none")["Ray authentication"]
    assert not missing.ok
    assert "ray get-auth-token --generate" in missing.advice
    off = told({"RAY_AUTH_MODE": "disabled"}, token_file)["Ray authentication"]
    assert (off.ok, off.value) == (False, "off (RAY_AUTH_MODE=disabled)")
    unset = told({}, tmp_path / "none")["Ray authentication"]
    assert "starts open to everybody" in unset.advice
    assert told({}, token_file)["Ray authentication"].value == "on where there is a token"


@pytest.mark.parametrize(("mode", "is_fine"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False)])
def test_a_token_that_others_can_read_is_pointed_out(token_file, mode, is_fine):
    token_file.chmod(mode)
    found = told({"RAY_AUTH_MODE": "token"}, token_file)["Ray token"]
    assert found.ok is is_fine
    assert is_fine or "chmod 600" in found.advice


def test_an_empty_token_file_is_pointed_out(token_file):
    token_file.write_text("")
    assert not told({"RAY_AUTH_MODE": "token"}, token_file)["Ray token"].ok


def test_a_cluster_without_a_token_is_pointed_out_with_its_processes():
    processes = {10: "gcs_server", 11: "raylet", 12: "ray::IDLE"}
    assert running({}, {}).value == "nothing"
    safe = running(processes, {10: "token", 11: "token"})
    assert safe.ok
    assert safe.value == "1 heads, 1 nodes, 3 processes; all with token authentication"
    unsafe = running(processes, {10: "token", 11: None})
    assert not unsafe.ok
    assert "pids 11 without a token" in unsafe.value


def test_ports_that_other_machines_reach_are_listed_and_those_on_loopback_counted():
    ports = [
        OpenPort(1, "gcs_server", "0.0.0.0", 6379),
        OpenPort(1, "gcs_server", "::", 6380),
        OpenPort(2, "dashboard", "127.0.0.1", 8265),
        OpenPort(2, "dashboard", "::1", 8266),
        OpenPort(3, "ray::Train", "10.0.0.7", 41000),
    ]
    (found,) = reachable(ports, True)
    assert found.ok
    assert found.value == "gcs_server *:6379, *:6380; ray::Train 10.0.0.7:41000 (2 more on loopback)"
    assert "security group" in found.advice
    (found,) = reachable(ports, False)
    assert not found.ok
    assert "without a token" in found.advice
    assert [finding.value for finding in reachable(ports[2:4], True)] == ["none (2 on loopback)"]
    assert list(reachable([], True)) == []


SERVER = """
import socket, sys
servers = [socket.create_server((host, 0), family=family) for host, family in
           (("127.0.0.7", socket.AF_INET), ("::1", socket.AF_INET6)) if family != socket.AF_INET6 or socket.has_ipv6]
connected = socket.create_connection(servers[0].getsockname())
print(*[server.getsockname()[1] for server in servers], flush=True)
sys.stdin.read()
"""


def test_the_ports_of_a_process_are_those_on_which_it_listens():
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"RAY_AUTH_MODE": "token"},
    ) as process:
        expected = [int(port) for port in process.stdout.readline().split()]
        found = open_ports({process.pid: "server"})
        assert sorted(port.port for port in found) == sorted(expected)
        assert {port.host for port in found} <= {"127.0.0.7", "::1"}
        assert all(port.is_loopback() and port.role == "server" for port in found)
        assert environment_of(process.pid, "RAY_AUTH_MODE") == "token"
        assert environment_of(process.pid, "RAY_AUTH_TOKEN") is None
        process.stdin.close()
    assert open_ports({process.pid: "server"}) == []
    assert environment_of(process.pid, "RAY_AUTH_MODE") is None


def test_a_socket_of_two_processes_is_listed_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.set_inheritable(True)
        child = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
        number = server.getsockname()[1]
        with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as process:
            process.stdout.readline()
            ports = open_ports({process.pid: "child", os.getpid(): "parent"})
            process.stdin.close()
    assert len([port for port in ports if port.port == number]) == 1
