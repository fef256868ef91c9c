"""Checks of our KubeRay file: keys and values, and what fits together only as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator

from cluster.config_document import Key, Problem, closest
from cluster.kuberay_schema import KINDS
from cluster.schema_problems import problems_of

DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_CLUSTER: Key = ("spec", "rayClusterSpec")


def check_manifest(manifest: Any) -> Iterator[Problem]:
    """Yield the problems of one document by itself."""
    kind = manifest.get("kind") if isinstance(manifest, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        yield Problem(("kind",), f"found {kind!r}, expected one of {', '.join(KINDS)}; {closest(kind, KINDS)}")
        return
    found = list(problems_of(Draft202012Validator(KINDS[kind]).iter_errors(manifest)))
    yield from found
    if kind == "RayJob" and not found:
        yield from _check_ray_job(manifest)


def check_isolation(ray_job: Mapping[str, Any], policies: list[Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield the pods of a RayJob that no NetworkPolicy of the file protects."""
    for key, template in _pod_templates(ray_job):
        labels = template.get("metadata", {}).get("labels", {})
        if not any(_selects(policy, labels) for policy in policies):
            what = f"no NetworkPolicy of this file selects these pods (labels {labels}): their ports are open"
            yield Problem((*key, "metadata", "labels"), what)


def _check_ray_job(job: Mapping[str, Any]) -> Iterator[Problem]:
    cluster = job["spec"]["rayClusterSpec"]
    if not cluster.get("enableInTreeAutoscaling") or cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield Problem(
            (*_CLUSTER, "autoscalerOptions", "version"), "expected enableInTreeAutoscaling: true, and v2 here"
        )
    if str(cluster["headGroupSpec"]["rayStartParams"].get("num-cpus")) != "0":
        key = (*_CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus")
        yield Problem(key, "expected '0': workers on the head would end the run when they run out of memory")
    for position, group in enumerate(cluster["workerGroupSpecs"]):
        key = (*_CLUSTER, "workerGroupSpecs", position)
        if group["minReplicas"] > group["maxReplicas"]:
            what = f"found {group['minReplicas']}, expected at most maxReplicas, {group['maxReplicas']}"
            yield Problem((*key, "minReplicas"), what)
        yield from _check_grace(group["template"]["spec"], (*key, "template", "spec"))
    for key, template in _pod_templates(job):
        yield from _check_mounts(template["spec"], (*key, "spec"))


def _check_grace(pod: Mapping[str, Any], key: Key) -> Iterator[Problem]:
    """Kubernetes kills a pod at the end of its grace period; Ray has to have drained it before."""
    grace_s = pod.get("terminationGracePeriodSeconds", 30)
    variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0].get("env", [])}
    drain = variables.get(DRAIN_VARIABLE, "30")
    if not str(drain).isdigit():
        yield Problem((*key, "containers", 0, "env"), f"{DRAIN_VARIABLE} is {drain!r}, expected whole seconds")
    elif int(drain) >= grace_s:
        what = f"found {grace_s}, expected more than {DRAIN_VARIABLE}, {drain}: the pod is killed before it is drained"
        yield Problem((*key, "terminationGracePeriodSeconds"), what)


def _check_mounts(pod: Mapping[str, Any], key: Key) -> Iterator[Problem]:
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for number, container in enumerate(pod["containers"]):
        for position, mount in enumerate(container.get("volumeMounts", [])):
            if mount["name"] not in volumes:
                place = (*key, "containers", number, "volumeMounts", position, "name")
                yield Problem(place, f"found {mount['name']!r}, which is no volume; {closest(mount['name'], volumes)}")


def _pod_templates(job: Mapping[str, Any]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield (*_CLUSTER, "headGroupSpec", "template"), cluster["headGroupSpec"]["template"]
    for position, group in enumerate(cluster["workerGroupSpecs"]):
        yield (*_CLUSTER, "workerGroupSpecs", position, "template"), group["template"]


def _selects(policy: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = policy["spec"]["podSelector"].get("matchLabels", {})
    return "Ingress" in policy["spec"]["policyTypes"] and wanted.items() <= labels.items()
