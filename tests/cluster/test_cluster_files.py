"""The files that start a cluster: ours are sound, and a mistake in them is told with its key and line.

Most mistakes here are ones that Ray and KubeRay would let pass, to fail or to be ignored hours later.
"""

import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from cluster.cluster_file import KUBERAY, LAUNCHER, check_cluster_file
from cluster.config_document import ConfigProblems
from cluster.ray_launcher import check_with_ray
from cluster.schema_problems import problems_of
from cluster.worker_range import parse_workers
from instdisc.cli.main import build_parser, main
from instdisc.cli.overrides import split_overrides

TOP = Path(__file__).parents[2]
LAUNCHER_FILE, KUBERAY_FILE = TOP / "ray_config.yaml", TOP / "cluster" / "kuberay.yaml"
SPOT = "available_node_types.gpu-spot.node_config"
HEAD_POD = "spec.rayClusterSpec.headGroupSpec.template"
SPOT_POD = "spec.rayClusterSpec.workerGroupSpecs[0].template"


def changed(tmp_path, source, old, new, occurrence=0):
    """A copy of a file with one place changed, and the number of the line that was changed."""
    text = source.read_text()
    place = -1
    for _ in range(occurrence + 1):
        place = text.index(old, place + 1)
    path = tmp_path / source.name
    path.write_text(text[:place] + new + text[place + len(old) :])
    return path, text[:place].count("\n") + 1


def problems(path):
    with pytest.raises(ConfigProblems) as caught:
        check_cluster_file(path)
    return caught.value.lines


def test_the_files_that_we_ship_are_sound():
    assert check_cluster_file(LAUNCHER_FILE) == LAUNCHER
    assert check_cluster_file(KUBERAY_FILE) == KUBERAY


# (what is there, what stands there instead, the key, the message)
LET_PASS_BY_RAY = {
    "a key of EC2": ("InstanceType: g6", "InstanceTyp: g6", f"{SPOT}.InstanceTyp", "did you mean 'InstanceType'?"),
    "a key within": ("MarketType: spot", "MarketTyp: spot", f"{SPOT}.InstanceMarketOptions.MarketTyp", "unknown key"),
    "a value": ("MarketType: spot", "MarketType: Spot", f"{SPOT}.InstanceMarketOptions.MarketType", "one of spot"),
    "an instance type": ("g6.4xlarge", "g6.4xlage", f"{SPOT}.InstanceType", "did you mean 'g6.4xlarge'?"),
    "IMDSv2 as a wish": (
        "HttpTokens: required",
        "HttpTokens: require",
        "available_node_types.head.node_config.MetadataOptions.HttpTokens",
        "optional, required",
    ),
    "a number as a text": (
        "HttpPutResponseHopLimit: 2",
        "HttpPutResponseHopLimit: two",
        "available_node_types.head.node_config.MetadataOptions.HttpPutResponseHopLimit",
        "expected an integer",
    ),
    "a text as a number": (
        "VolumeSize: 200",
        'VolumeSize: "200"',
        "available_node_types.head.node_config.BlockDeviceMappings[0].Ebs.VolumeSize",
        "expected an integer",
    ),
    "a list that is none": (
        "IamInstanceProfile:\n",
        "IamInstanceProfile: instdisc-head\n      UserData:\n",
        "available_node_types.head.node_config.IamInstanceProfile",
        "expected keys with values",
    ),
    "a value that Ray sets": ("ImageId: *image", "SubnetId: subnet-1", f"{SPOT}.SubnetId", "SubnetIds chooses"),
    "a key of the provider": (
        "availability_zone: us",
        "availability_zones: us",
        "provider.availability_zones",
        "did you mean 'availability_zone'?",
    ),
    "a region": ("region: us-west-2 ", "region: us-wset-2 ", "provider.region", "did you mean 'us-west-2'?"),
    "a zone elsewhere": ("us-west-2b", "us-east-1b", "provider.availability_zone", "zones of the region 'us-west-2'"),
    "a rule of the security group": (
        "GroupName: instdisc-cluster",
        "GroupName: a\n    IpPermissions: [{FromPort: 22, ToPort: 22, IpProtocol: tcp, CidrIp: 10.0.0.0/8}]",
        "provider.security_group.IpPermissions[0].CidrIp",
        "unknown key",
    ),
    "limits": ("max_workers: 2 ", "max_workers: 17 ", "available_node_types.gpu-on-demand.max_workers", "at most"),
    "limits of one type": (
        "min_workers: 0\n    max_workers: 2",
        "min_workers: 3\n    max_workers: 2",
        "available_node_types.gpu-on-demand.min_workers",
        "expected 0 to 2",
    ),
    "an option of Docker": ("--gpus=all", "8", "docker.worker_run_options[0]", "expected a text"),
    "a relative path": ("~/.ray/auth_token: ~", "auth_token: ~", "file_mounts.auth_token", "absolute path"),
    "no authentication": ("--env=RAY_AUTH_MODE=token", "--init", "head_start_ray_commands[1]", "without RAY_AUTH_MODE"),
    "an open dashboard": (
        "--dashboard-host=127.0.0.1",
        "--dashboard-host 0.0.0.0",
        "head_start_ray_commands[1]",
        "127",
    ),
}
CAUGHT_BY_RAY = {
    "a key at the top": ("max_workers: 16", "max_worker: 16", "max_worker", "did you mean 'max_workers'?"),
    "a key of a node type": ("min_workers: 0", "min_worker: 0", "available_node_types.gpu-spot.min_worker", "unknown"),
    "a resource": ("CPU: 0}", 'CPU: "0"}', "available_node_types.head.resources.CPU", "expected integer"),
    "a type of the head": ("head_node_type: head", "head_node_type: haed", "the whole document", "head_node_type"),
    "a label": (
        "market-type: spot",
        "market-type: 1",
        "available_node_types.gpu-spot.labels.ray.io/market-type",
        "str",
    ),
}


@pytest.mark.parametrize(("old", "new", "key", "told"), LET_PASS_BY_RAY.values(), ids=LET_PASS_BY_RAY)
def test_a_mistake_in_the_launcher_file_that_ray_lets_pass_is_told_with_its_key(tmp_path, old, new, key, told):
    path, _ = changed(tmp_path, LAUNCHER_FILE, old, new)
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    assert list(check_with_ray(config)) == []
    assert [line for line in problems(path) if f": {key}: " in line and told in line]


@pytest.mark.parametrize(("old", "new", "key", "told"), CAUGHT_BY_RAY.values(), ids=CAUGHT_BY_RAY)
def test_a_mistake_that_ray_finds_is_told_with_its_key(tmp_path, old, new, key, told):
    path, _ = changed(tmp_path, LAUNCHER_FILE, old, new)
    (line,) = problems(path)
    assert f": {key}: " in line
    assert told in line


MISTAKES_IN_KUBERAY = {
    "a key of the job": ("submissionMode", "submitMode", "spec.submitMode", "did you mean 'submissionMode'?"),
    "a mode": ("HTTPMode", "HttpMode", "spec.submissionMode", "expected one of K8sJobMode, HTTPMode"),
    "authentication off": ("mode: token", "mode: disabled", "spec.rayClusterSpec.authOptions.mode", "of token"),
    "an old autoscaler": ("version: v2", "version: v1", "spec.rayClusterSpec.autoscalerOptions.version", "v2"),
    "no autoscaler": (
        "enableInTreeAutoscaling: true",
        "enableInTreeAutoscaling: false",
        "spec.rayClusterSpec.autoscalerOptions.version",
        "enableInTreeAutoscaling: true",
    ),
    "a number where Ray wants a text": (
        'num-cpus: "0"',
        "num-cpus: 0",
        "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus",
        "expected string",
    ),
    "training on the head": (
        'num-cpus: "0"',
        'num-cpus: "4"',
        "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus",
        "expected '0'",
    ),
    "a grace period that the drain outlasts": (
        "terminationGracePeriodSeconds: 150",
        "terminationGracePeriodSeconds: 110",
        f"{SPOT_POD}.spec.terminationGracePeriodSeconds",
        "killed before it is drained",
    ),
    "no grace period": (
        "            terminationGracePeriodSeconds: 150\n",
        "",
        f"{SPOT_POD}.spec.terminationGracePeriodSeconds",
        "found 30, expected more than",
    ),
    "a variable as a number": ('value: "110"', "value: 110", f"{SPOT_POD}.spec.containers[0].env[0].value", "string"),
    "a quantity": ("memory: 52Gi", "memory: 52GB", f"{SPOT_POD}.spec.containers[0].resources.requests.memory", "form"),
    "a key of a pod": ("tolerations:", "toleration:", f"{SPOT_POD}.spec.toleration", "did you mean 'tolerations'?"),
    "a volume that is none": ("name: shm, mountPath", "name: shn, mountPath", "volumeMounts[0].name", "no volume"),
    "no replicas": ("minReplicas: 0", "minReplicas: 17", "workerGroupSpecs[0].minReplicas", "at most maxReplicas, 16"),
    "a label that the policy does not know": (
        "labels: {app.kubernetes.io/part-of: instdisc}   #",
        "labels: {app.kubernetes.io/part-of: indistisc}   #",
        f"{HEAD_POD}.metadata.labels",
        "their ports are open",
    ),
    "a policy for nobody": ("policyTypes: [Ingress]", "policyTypes: [Egress]", f"{HEAD_POD}.metadata.labels", "open"),
    "a policy for everybody": ("    - from:\n", "    - form:\n", "spec.ingress[0].from", "is missing"),
    "a port as a text": ("port: 8265,", 'port: "8265",', "spec.ingress[1].ports[0].port", "expected integer"),
    "an open service": (
        "serviceType: ClusterIP",
        "serviceType: LoadBalancer",
        "headGroupSpec.serviceType",
        "ClusterIP",
    ),
    "a kind": ("kind: RayJob", "kind: RayJobs", "kind", "did you mean 'RayJob'?"),
}


@pytest.mark.parametrize(("old", "new", "key", "told"), MISTAKES_IN_KUBERAY.values(), ids=MISTAKES_IN_KUBERAY)
def test_a_mistake_in_the_kuberay_file_is_told_with_its_key(tmp_path, old, new, key, told):
    path, _ = changed(tmp_path, KUBERAY_FILE, old, new)
    assert [line for line in problems(path) if f"{key}: " in line and told in line]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file_with_their_lines(tmp_path):
    path, first = changed(tmp_path, LAUNCHER_FILE, "HttpTokens", "HttpToken")
    path, second = changed(tmp_path, path, "InstanceType: g6.4xlarge", "InstanceType: g6.5xlarge")
    path, third = changed(tmp_path, path, "InstanceType: g6.4xlarge", "InstanceType: 4")
    told = problems(path)
    assert [int(line.split(":")[0].removeprefix("line ")) for line in told] == sorted([first] * 3 + [second, third])
    assert sum("did you mean 'HttpTokens'?" in line for line in told) == 3  # of each node type that uses the anchor


def test_a_key_that_stands_twice_is_told(tmp_path):
    path, line = changed(tmp_path, LAUNCHER_FILE, "idle_timeout_minutes: 5", "idle_timeout_minutes: 5\nmax_workers: 99")
    yaml.safe_load(path.read_text())  # takes the last
    assert [f"max_workers: stands twice, again in line {line + 1}" in told for told in problems(path)].count(True) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1", "not YAML"),
        ("\x00", "not YAML"),
        ("", "expected the keys of a cluster launcher file"),
        ("- 1\n", "expected the keys of a cluster launcher file"),
        ("recipe: cifar10\n", "expected the keys of a cluster launcher file"),
        ("cluster_name: a\nprovider: {type: gcp}\n", "provider.type: found 'gcp'"),
        ("cluster_name: a\nprovider: {}\n", "provider"),
        ("cluster_name: a\nprovider: 7\n", "provider"),
        ("kind: RayJob\napiVersion: ray.io/v1\n", "metadata: is missing"),
        ("kind: [RayJob]\napiVersion: ray.io/v1\n", "kind: found ['RayJob']"),
    ],
)
def test_what_is_no_such_file_is_told(tmp_path, text, told):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    assert told in "\n".join(problems(path))


@pytest.mark.parametrize("source", [LAUNCHER_FILE, KUBERAY_FILE], ids=["launcher", "kuberay"])
def test_whatever_stands_in_place_of_any_value_is_sound_or_told(tmp_path, source):
    documents = list(yaml.safe_load_all(source.read_text()))
    path = tmp_path / source.name
    num_told = num_places = 0
    for num_places, (parent, name) in enumerate(places(documents), 1):
        kept, parent[name] = parent[name], (None, 7, ["x"], {"x": [1]})[num_places % 4]
        path.write_text(json.dumps(documents[0]) if len(documents) == 1 else yaml.safe_dump_all(documents))
        try:
            check_cluster_file(path)
        except ConfigProblems:
            num_told += 1
        parent[name] = kept
    assert num_told / num_places > 0.8  # some places take anything, such as ports and numbers of machines


def places(value):
    """Every (parent, key) below a value."""
    for name, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, name
        if isinstance(child, (dict, list)):
            yield from places(child)


def test_the_command_tells_mistakes_with_exit_code_2(tmp_path, capsys):
    path, line = changed(tmp_path, LAUNCHER_FILE, "MarketType", "MarketTyp")
    assert main(["doctor", "--config", str(path)]) == 2
    assert f"line {line}: {SPOT}.InstanceMarketOptions.MarketTyp: unknown key" in capsys.readouterr().err
    assert main(["doctor", "--config", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main(["doctor", "--config", str(LAUNCHER_FILE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_problems_can_be_pickled():
    error = pickle.loads(pickle.dumps(ConfigProblems("a.yaml", ["line 1: a: b"])))
    assert (str(error), error.lines) == ("a.yaml: one problem\n  line 1: a: b", ["line 1: a: b"])


def test_ray_makes_of_the_kuberay_file_the_node_types_that_are_meant():
    job = next(d for d in yaml.safe_load_all(KUBERAY_FILE.read_text()) if d["kind"] == "RayJob")
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": job["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert {name: (t["min_workers"], t["max_workers"], t["resources"].get("GPU")) for name, t in types.items()} == {
        config["head_node_type"]: (0, 0, None),
        "gpu-spot": (0, 16, 1),
        "gpu-on-demand": (0, 2, 1),
    }
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    assert types["gpu-spot"]["labels"]["ray.io/market-type"] == "spot"


def test_the_ray_job_fits_kuberays_own_definition():
    path = os.environ.get("INSTDISC_KUBERAY_CRD")
    if not path:
        pytest.skip(
            "INSTDISC_KUBERAY_CRD names no file: give KubeRay's ray.io_rayjobs.yaml, of which no package exists"
        )
    definition = yaml.load(Path(path).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    schema = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    validator = Draft202012Validator(strict(schema))
    job = next(d for d in yaml.safe_load_all(KUBERAY_FILE.read_text()) if d["kind"] == "RayJob")
    assert list(problems_of(validator.iter_errors(job))) == []
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["toleration"] = []
    (problem,) = problems_of(validator.iter_errors(job))
    assert problem.key[-1] == "toleration"


def strict(schema):
    """Kubernetes' schema as JSON Schema in which unknown keys are errors, as a strict API server has it."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(part) for name, part in schema.items() if not name.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not keeps:
        made.setdefault("additionalProperties", False)
    if (
        schema.get("type") == "object"
        and isinstance(made.get("properties"), dict)
        and "apiVersion" in made["properties"]
    ):
        made["properties"]["metadata"] = {"type": "object"}  # the API server checks it by itself
    made.pop("format", None)
    return made


FAKE_RAY = '#!/bin/sh\necho "$@" >> "$HOME/calls"\n'


@pytest.mark.parametrize("name", ["head_start_ray_commands", "worker_start_ray_commands"])
@pytest.mark.parametrize(("mode", "token"), [("token", ""), (None, "abc"), ("disabled", "abc"), ("token", "abc")])
def test_ray_starts_with_a_token_only(tmp_path, name, mode, token):
    """The shell runs the command as it stands in the file; in place of `ray` a script notes what it was called with."""
    command = next(c for c in yaml.safe_load(LAUNCHER_FILE.read_text())[name] if "ray start" in c)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(token)
    (tmp_path / "ray").write_text(FAKE_RAY)
    (tmp_path / "ray").chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
    environment |= {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1"}
    environment |= {"RAY_AUTH_MODE": mode} if mode else {}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    calls = tmp_path / "calls"
    if mode == "token" and token:
        assert done.returncode == 0, done.stderr
        arguments = calls.read_text().split()
        assert arguments[0] == "start"
        scripts.start.make_context("ray start", arguments[1:])  # Ray knows each option, and takes its value
    else:
        assert done.returncode == 1
        assert "refused: Ray starts with token authentication only" in done.stderr
        assert not calls.exists()


def test_the_spot_daemon_of_the_launcher_file_takes_its_options():
    commands = yaml.safe_load(LAUNCHER_FILE.read_text())["worker_start_ray_commands"]
    (command,) = [c for c in commands if "spot_watch" in c]
    words = command.split("<")[0].split()
    assert words[:4] == ["nohup", "python", "-m", "cluster.spot_watch"]
    from cluster.spot_watch import _parser

    options = _parser().parse_args([word.replace("$RAY_HEAD_IP", "10.0.0.1") for word in words[4:]])
    assert (options.address, options.cloud) == ("10.0.0.1:6379", "aws")


def test_the_training_of_the_kuberay_file_is_a_command_of_ours():
    job = next(d for d in yaml.safe_load_all(KUBERAY_FILE.read_text()) if d["kind"] == "RayJob")
    program, *arguments = job["spec"]["entrypoint"].split()
    rest, overrides = split_overrides(arguments)
    options = build_parser().parse_args(rest)
    assert (program, options.command, options.takes_overrides) == ("instdisc", "train", True)
    assert overrides
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    _, most = parse_workers(str(options.workers)) if isinstance(options.workers, str) else (0, options.workers)
    assert most <= sum(group["maxReplicas"] for group in groups)


def test_what_has_to_be_edited_is_marked():
    """Every name that stands for something of the user's is on a line, or soon below one, that says EDIT."""
    for path in (LAUNCHER_FILE, KUBERAY_FILE):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            is_comment = line.lstrip().startswith("#")
            if not is_comment and any(name in line for name in ("registry.example.com", "BUCKET", "000000000000")):
                assert "EDIT" in "".join(lines[max(0, number - 4) : number + 1]), f"{path.name}:{number + 1}"


def test_the_image_holds_what_the_files_expect():
    recipe = (TOP / "cluster" / "Dockerfile").read_text()
    lines = [line for line in recipe.splitlines() if not line.startswith("#")]
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"pyproject.toml", "cluster", "dataloading", "instdisc"} <= set(copied)
    assert all((TOP / name).exists() for name in copied)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users[-1] == "ray"
    assert "HOME=/home/ray" in recipe  # there the launcher mounts the token, and KubeRay's volumes lie
    job = next(d for d in yaml.safe_load_all(KUBERAY_FILE.read_text()) if d["kind"] == "RayJob")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
