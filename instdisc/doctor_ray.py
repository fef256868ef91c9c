"""What of Ray is open: which cluster a driver would use, whether token authentication is on, which ports are reachable.

Nothing is started or asked: variables, the token's file and /proc are looked at. The token itself is not read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.credentials import without_credentials
from cluster.open_ports import OpenPort, environment_of, open_ports, ray_processes
from instdisc.findings import Finding

_MAKE_TOKEN = "`ray get-auth-token --generate > /dev/null` makes one"
_CLOSED = (
    "meant for the other machines of the cluster only: the security group of ray_config.yaml and the NetworkPolicy of "
    "cluster/kuberay.yaml let nobody else in; close them off likewise where you start Ray yourself"
)
_SERVERS = ("gcs_server", "raylet")


def ray_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Tell everything about Ray, in the order in which a person reads it."""
    yield ray_address(environment)
    yield from authentication(environment)
    processes = ray_processes()
    modes = {pid: environment_of(pid, "RAY_AUTH_MODE") for pid, role in processes.items() if role in _SERVERS}
    yield running(processes, modes)
    yield from reachable(open_ports(processes), all(mode == "token" for mode in modes.values()))


def ray_address(environment: Mapping[str, str]) -> Finding:
    """Tell which Ray cluster a driver would connect to; it is not contacted."""
    address = environment.get("RAY_ADDRESS")
    return Finding(
        "Ray address", without_credentials(address) if address else "RAY_ADDRESS not set: Ray starts on this machine"
    )


def authentication(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Tell whether a Ray that is started or talked to from here uses token authentication, and where the token is."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    path = Path(os.path.expanduser(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"))
    has_token = bool(environment.get("RAY_AUTH_TOKEN")) or path.is_file()
    name = "Ray authentication"
    if mode == "token":
        advice = "" if has_token else f"no token is here, so that no Ray can be started or reached: {_MAKE_TOKEN}"
        yield Finding(name, "on (RAY_AUTH_MODE=token)", has_token, advice)
    elif mode:
        advice = "whoever reaches a port of a cluster that is started like this can run code: unset it, or set token"
        yield Finding(name, f"off (RAY_AUTH_MODE={mode[:20]})", False, advice)
    elif has_token:
        advice = (
            "RAY_AUTH_MODE is not set: `ray start` takes the token that is here; set RAY_AUTH_MODE=token to be sure"
        )
        yield Finding(name, "on where there is a token", True, advice)
    else:
        advice = (
            "runs on this machine alone make a token of their own; before `ray start` set RAY_AUTH_MODE=token, and "
            f"{_MAKE_TOKEN}, or it starts open to everybody who reaches it"
        )
        yield Finding(name, "RAY_AUTH_MODE not set, no token", True, advice)
    if environment.get("RAY_AUTH_TOKEN"):
        yield Finding("Ray token", "environment: RAY_AUTH_TOKEN")
    elif path.exists():
        yield _token_file(path)


def _token_file(path: Path) -> Finding:
    try:
        status = path.stat()
    except OSError as error:
        return Finding("Ray token", f"{path}: {error.strerror}", False, "check its owner and rights")
    mode = stat.S_IMODE(status.st_mode)
    if status.st_size == 0:
        return Finding("Ray token", f"{path} is empty", False, f"remove it; {_MAKE_TOKEN}")
    if mode & 0o077:
        told = f"{path} (rights {mode:03o})"
        return Finding("Ray token", told, False, f"other users of this machine can read it: chmod 600 {path}")
    return Finding("Ray token", f"{path} (rights {mode:03o})")


def running(processes: Mapping[int, str], modes: Mapping[int, str | None]) -> Finding:
    """Tell the processes of Ray on this machine; modes: RAY_AUTH_MODE of its servers by pid, None where not set."""
    servers = [role for role in processes.values() if role in _SERVERS]
    if not processes:
        return Finding("Ray running here", "nothing")
    value = f"{servers.count('gcs_server')} heads, {servers.count('raylet')} nodes, {len(processes)} processes"
    without = sorted(pid for pid, mode in modes.items() if mode != "token")
    if without:
        advice = "these were started without RAY_AUTH_MODE=token: stop them, and start them with it"
        return Finding(
            "Ray running here", f"{value}; pids {', '.join(map(str, without))} without a token", False, advice
        )
    return Finding("Ray running here", value + "; all with token authentication" * bool(modes))


def reachable(ports: list[OpenPort], is_token_on: bool) -> Iterator[Finding]:
    """Tell which ports are reachable from other machines; is_token_on: of the clusters that run here."""
    beyond = [port for port in ports if not port.is_loopback()]
    if not ports:
        return
    told: dict[str, list[str]] = {}
    for port in beyond:
        host = "*" if port.host in ("0.0.0.0", "::") else port.host
        told.setdefault(port.role, []).append(f"{host}:{port.port}")
    inside = len(ports) - len(beyond)
    if not beyond:
        yield Finding("ports beyond loopback", f"none ({inside} on loopback)")
        return
    listed = "; ".join(f"{role} {', '.join(ports)}" for role, ports in told.items())
    advice = _CLOSED if is_token_on else f"open without a token. They are {_CLOSED}"
    yield Finding("ports beyond loopback", f"{listed} ({inside} more on loopback)", is_token_on, advice)
