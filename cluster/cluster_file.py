"""`check_cluster_file`: is a launcher file (`ray up`) or a KubeRay file as it should be? No cloud is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.config_document import Document, Problem, raise_problems, read_documents

LAUNCHER, KUBERAY = "cluster launcher file of AWS", "KubeRay file"


def check_cluster_file(path: str | Path) -> str:
    """Check a file and return which kind it is.

    A launcher file is held against Ray's own validation and EC2's model of RunInstances, a KubeRay file against the
    keys that ours uses; both against what has to fit together. Nothing is started or asked of a cloud.

    Raises:
        ConfigProblems: a ValueError that lists every problem with line and key.
        OSError: the file cannot be read.
    """
    path = Path(path)
    documents = read_documents(path)
    is_kuberay = any(isinstance(document.value, Mapping) and "apiVersion" in document.value for document in documents)
    if is_kuberay:
        raise_problems(path, _kuberay_problems(documents))
        return KUBERAY
    raise_problems(path, _launcher_problems(documents))
    return LAUNCHER


def _launcher_problems(documents: list[Document]) -> Iterator[tuple[Document, Problem]]:
    if len(documents) != 1 or not isinstance(documents[0].value, dict) or "provider" not in documents[0].value:
        document = documents[0] if documents else Document(None)
        what = "expected the keys of a cluster launcher file (cluster_name, provider, …), or a KubeRay file"
        yield document, Problem((), what)
        return
    document = documents[0]
    config: dict[str, Any] = document.value
    yield from ((document, problem) for problem in document.problems)
    if not isinstance(config["provider"], dict) or "type" not in config["provider"]:
        yield document, Problem(("provider",), "expected keys with values, type: aws among them")
        return
    from cluster.ray_launcher import check_with_ray  # late: Ray takes a second to import

    found = list(check_with_ray(config))
    if not found:
        from cluster.launcher_file import check_launcher

        found = list(check_launcher(config))
    yield from ((document, problem) for problem in found)


def _kuberay_problems(documents: list[Document]) -> Iterator[tuple[Document, Problem]]:
    from cluster.kuberay_file import check_isolation, check_manifest

    is_sound = True
    for document in documents:
        found = [*document.problems, *check_manifest(document.value)]
        is_sound = is_sound and not found
        yield from ((document, problem) for problem in found)
    jobs = [document for document in documents if is_sound and document.value["kind"] == "RayJob"]
    policies = [document.value for document in documents if is_sound and document.value["kind"] == "NetworkPolicy"]
    for job in jobs:
        yield from ((job, problem) for problem in check_isolation(job.value, policies))
