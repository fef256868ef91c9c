"""Checks of a cluster-launcher file (`ray up`) beyond Ray's own, which lets misspelt keys of EC2 pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.config_document import Key, Problem, closest, unknown_key

_PROVIDER_TYPES: dict[str, type] = {
    "type": str,
    "region": str,
    "availability_zone": str,
    "cache_stopped_nodes": bool,
    "use_internal_ips": bool,
    "security_group": dict,
    "key_pair": dict,
    "aws_credentials": dict,
    "cloudwatch": dict,
    "disable_launch_config_check": bool,
    "disable_node_updaters": bool,
    "foreground_node_launch": bool,
    "worker_liveness_check": bool,
}
"""What Ray's AWS provider reads of `provider`; its schema takes any key there."""

_RAY_SETS = ("MinCount", "MaxCount", "SubnetId")
_SETS_TOKEN = re.compile(r"RAY_AUTH_MODE=token\s*(;|&&|\n|([A-Za-z_]+=\S+\s+)*ray start)")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_launcher(config: Any) -> Iterator[Problem]:
    """Yield the problems of a launcher file that Ray's own validation has taken."""
    provider = config.get("provider", {})
    if provider.get("type") != "aws":
        found = provider.get("type")
        yield Problem(("provider", "type"), f"found {found!r}, expected 'aws': other clouds are not checked here")
        return
    yield from _check_provider(provider)
    for name, node_type in config.get("available_node_types", {}).items():
        yield from _check_node_config(node_type["node_config"], ("available_node_types", name, "node_config"))
    yield from _check_texts(config)
    yield from _check_limits(config)
    yield from _check_protection(config)


def _check_provider(provider: Mapping[str, Any]) -> Iterator[Problem]:
    from cluster.ec2_shapes import check_shape, input_shape, regions

    for name, value in provider.items():
        expected = _PROVIDER_TYPES.get(name)
        if expected is None:
            yield Problem(("provider", name), unknown_key(name, _PROVIDER_TYPES))
        elif not isinstance(value, expected):
            yield Problem(("provider", name), f"found {value!r} ({type(value).__name__}), expected {expected.__name__}")
    region = str(provider.get("region"))
    if region not in regions():
        yield Problem(
            ("provider", "region"), f"found {region!r}, which EC2 is not known to have; {closest(region, regions())}"
        )
    for zone in str(provider.get("availability_zone", region)).split(","):
        if not zone.strip().startswith(region):
            what = f"found zone {zone.strip()!r}, expected zones of the region {region!r}, such as {region}a"
            yield Problem(("provider", "availability_zone"), what)
    group = provider.get("security_group")
    if isinstance(group, dict) and "IpPermissions" in group:
        shape = input_shape("AuthorizeSecurityGroupIngress", "IpPermissions")
        yield from check_shape(group["IpPermissions"], shape, ("provider", "security_group", "IpPermissions"))


def _check_node_config(node_config: dict[str, Any], key: Key) -> Iterator[Problem]:
    from cluster.ec2_shapes import check_shape, input_shape

    shape = input_shape("RunInstances")
    asked = {name: value for name, value in node_config.items() if name != "SubnetIds"}
    for problem in check_shape({"MinCount": 1, "MaxCount": 1, **asked}, shape, key):
        if problem.what.startswith("unknown key") and problem.key[-1] == "SubnetIDs":
            yield Problem(problem.key, "unknown key; did you mean 'SubnetIds'?")
        else:
            yield problem
    for name in _RAY_SETS:
        if name in node_config:
            yield Problem((*key, name), "Ray sets this itself; remove it" + (" (SubnetIds chooses)" * (name[0] == "S")))
    if "InstanceType" not in node_config:
        yield Problem((*key, "InstanceType"), "is missing, and required here")
    subnets = node_config.get("SubnetIds", [])
    if not isinstance(subnets, list) or not all(isinstance(subnet, str) for subnet in subnets):
        yield Problem((*key, "SubnetIds"), f"found {subnets!r}, expected a list of subnet ids")


def _check_texts(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Lists and maps that Ray's schema takes with anything in them, and that it joins into shell commands later."""
    docker = config.get("docker", {})
    for name in ("run_options", "head_run_options", "worker_run_options"):
        for position, option in enumerate(docker.get(name, [])):
            if not isinstance(option, str):
                yield Problem(("docker", name, position), f"found {option!r}, expected a text")
    for remote, local in config.get("file_mounts", {}).items():
        if not isinstance(local, str):
            yield Problem(("file_mounts", str(remote)), f"found {local!r}, expected the path of a file on this machine")
        if not str(remote).startswith(("/", "~/")):
            yield Problem(("file_mounts", str(remote)), "expected an absolute path on the machines, or one from ~/")


def _check_limits(config: Mapping[str, Any]) -> Iterator[Problem]:
    for name, node_type in config.get("available_node_types", {}).items():
        least, most = node_type.get("min_workers", 0), node_type.get("max_workers", config["max_workers"])
        key = ("available_node_types", name)
        if name == config["head_node_type"]:
            continue
        if not 0 <= least <= most:
            yield Problem((*key, "min_workers"), f"found {least}, expected 0 to {most} (this type's max_workers)")
        if most > config["max_workers"]:
            what = f"found {most}, expected at most the cluster's max_workers, {config['max_workers']}"
            yield Problem((*key, "max_workers"), what)


def _check_protection(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A cluster of ours starts with token authentication only, and its dashboard is for the head itself."""
    options = [str(option) for option in config.get("docker", {}).get("run_options", [])]
    is_set = any(option.endswith("RAY_AUTH_MODE=token") for option in options)
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [(n, command) for n, command in enumerate(config.get(name, [])) if "ray start" in command]
        for position, command in starts:
            if not is_set and not _SETS_TOKEN.search(command):
                what = "starts Ray without RAY_AUTH_MODE=token: whoever reaches a port of it can run code"
                yield Problem((name, position), f"{what}. Set it here, or in docker.run_options")
            words = command.replace("=", " ").split()
            host = words[words.index("--dashboard-host") + 1] if "--dashboard-host" in words[:-1] else _LOOPBACK[0]
            if host not in _LOOPBACK:
                what = f"--dashboard-host is {host}, expected 127.0.0.1: `ray dashboard FILE` forwards it through SSH"
                yield Problem((name, position), what)
