"""The keys of a RayJob (KubeRay 1.7), a NetworkPolicy and a ServiceAccount that our file uses, as JSON Schema.

Not KubeRay's whole definition (it has 25,000 lines, most of them Kubernetes' pods): a key that is missing here may be
known there, and `kubectl apply --dry-run=server` asks the cluster itself.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _keys(required: str = "", **properties: Schema) -> Schema:
    """An object of these keys and no others; required: those that must be there, separated by spaces."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(item: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": at_least}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def _whole(minimum: int = 0) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": 2**31 - 1}


_TEXT: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_QUANTITY: Schema = {"type": ["integer", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}
_QUANTITIES: Schema = {"type": "object", "additionalProperties": _QUANTITY}
_NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
_METADATA = _keys("name", name=_NAME, namespace=_NAME, labels=_TEXTS, annotations=_TEXTS)
_POD_METADATA = _keys(labels=_TEXTS, annotations=_TEXTS)

_FROM_POD = _keys("fieldRef", fieldRef=_keys("fieldPath", fieldPath=_TEXT))
_ENVIRONMENT = _list(_keys("name", name=_TEXT, value=_TEXT, valueFrom=_FROM_POD))
_RESOURCES = _keys(limits=_QUANTITIES, requests=_QUANTITIES)
_CONTAINER_SECURITY = _keys(
    allowPrivilegeEscalation=_BOOLEAN,
    capabilities=_keys(add=_list(_TEXT), drop=_list(_TEXT)),
    readOnlyRootFilesystem=_BOOLEAN,
    runAsNonRoot=_BOOLEAN,
)
_CONTAINER = _keys(
    "name image resources",
    name=_NAME,
    image={"type": "string", "minLength": 1},
    imagePullPolicy=_one_of("Always", "IfNotPresent", "Never"),
    command=_list(_TEXT),
    args=_list(_TEXT),
    ports=_list(_keys("containerPort", name=_NAME, containerPort=_whole(1), protocol=_one_of("TCP", "UDP"))),
    env=_ENVIRONMENT,
    resources=_RESOURCES,
    securityContext=_CONTAINER_SECURITY,
    volumeMounts=_list(_keys("name mountPath", name=_NAME, mountPath=_TEXT, readOnly=_BOOLEAN)),
)
_POD = _keys(
    "containers",
    serviceAccountName=_NAME,
    automountServiceAccountToken=_BOOLEAN,
    terminationGracePeriodSeconds=_whole(),
    restartPolicy=_one_of("Never"),  # KubeRay takes nothing else with autoscaler v2
    nodeSelector=_TEXTS,
    tolerations=_list(
        _keys(
            key=_TEXT,
            operator=_one_of("Exists", "Equal"),
            value=_TEXT,
            effect=_one_of("NoSchedule", "NoExecute", "PreferNoSchedule"),
        )
    ),
    securityContext=_keys(
        runAsNonRoot=_BOOLEAN,
        runAsUser=_whole(),
        runAsGroup=_whole(),
        fsGroup=_whole(),
        seccompProfile=_keys("type", type=_one_of("RuntimeDefault", "Unconfined", "Localhost")),
    ),
    containers=_list(_CONTAINER, at_least=1),
    imagePullSecrets=_list(_keys("name", name=_NAME)),
    volumes=_list(
        _keys("name emptyDir", name=_NAME, emptyDir=_keys(medium=_one_of("", "Memory"), sizeLimit=_QUANTITY)),
    ),
)
_TEMPLATE = _keys("spec", metadata=_POD_METADATA, spec=_POD)

_WORKER_GROUP = _keys(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=_NAME,
    replicas=_whole(),
    minReplicas=_whole(),
    maxReplicas=_whole(),
    idleTimeoutSeconds=_whole(),
    priority={"type": "integer"},
    resources=_TEXTS,
    labels=_TEXTS,
    rayStartParams=_TEXTS,
    template=_TEMPLATE,
    numOfHosts=_whole(1),
)
_RAY_CLUSTER = _keys(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=_keys("mode", mode=_one_of("token"), secretName=_NAME),  # "disabled" would be taken by KubeRay
    enableInTreeAutoscaling=_BOOLEAN,
    autoscalerOptions=_keys(
        version=_one_of("v1", "v2"),
        idleTimeoutSeconds=_whole(),
        upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
        imagePullPolicy=_one_of("Always", "IfNotPresent", "Never"),
        resources=_RESOURCES,
        env=_ENVIRONMENT,
        securityContext=_CONTAINER_SECURITY,
    ),
    headGroupSpec=_keys(
        "rayStartParams template",
        rayStartParams=_TEXTS,
        serviceType=_one_of("ClusterIP"),  # the other types open the dashboard to more than the cluster
        resources=_TEXTS,
        labels=_TEXTS,
        template=_TEMPLATE,
    ),
    workerGroupSpecs=_list(_WORKER_GROUP, at_least=1),
)
RAY_JOB = _keys(
    "apiVersion kind metadata spec",
    apiVersion=_one_of("ray.io/v1"),
    kind=_one_of("RayJob"),
    metadata=_METADATA,
    spec=_keys(
        "entrypoint rayClusterSpec",
        entrypoint={"type": "string", "minLength": 1},
        runtimeEnvYAML=_TEXT,
        submissionMode=_one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
        backoffLimit=_whole(),
        shutdownAfterJobFinishes=_BOOLEAN,
        ttlSecondsAfterFinished=_whole(),
        activeDeadlineSeconds=_whole(1),
        preRunningDeadlineSeconds=_whole(1),
        suspend=_BOOLEAN,
        rayClusterSpec=_RAY_CLUSTER,
    ),
)

_SELECTOR = _keys(matchLabels=_TEXTS)
_PORT = _keys("port", port=_whole(1), protocol=_one_of("TCP", "UDP"), endPort=_whole(1))
_PEER = _keys(podSelector=_SELECTOR, namespaceSelector=_SELECTOR)
NETWORK_POLICY = _keys(
    "apiVersion kind metadata spec",
    apiVersion=_one_of("networking.k8s.io/v1"),
    kind=_one_of("NetworkPolicy"),
    metadata=_METADATA,
    spec=_keys(
        "podSelector policyTypes ingress",
        podSelector=_SELECTOR,
        policyTypes=_list(_one_of("Ingress", "Egress"), at_least=1),
        # "from" cannot be the name of a Python argument. One without peers would let everybody in.
        ingress=_list(_keys("from", **{"from": _list(_PEER, at_least=1)}, ports=_list(_PORT))),
    ),
)

SERVICE_ACCOUNT = _keys(
    "apiVersion kind metadata",
    apiVersion=_one_of("v1"),
    kind=_one_of("ServiceAccount"),
    metadata=_METADATA,
    automountServiceAccountToken=_BOOLEAN,
)

KINDS: dict[str, Schema] = {
    "RayJob": RAY_JOB,
    "NetworkPolicy": NETWORK_POLICY,
    "ServiceAccount": SERVICE_ACCOUNT,
}
