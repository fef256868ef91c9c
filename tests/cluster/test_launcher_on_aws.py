"""What `ray up` does with ray_config.yaml, by Ray's own code, on an EC2 that runs in this process (moto)."""

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import utils
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from test_cluster_files import LAUNCHER_FILE


@pytest.fixture
def ec2(monkeypatch, tmp_path):
    """An account with the two instance profiles that the file names; Ray's key pair goes to a home of its own."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()
    with mock_aws():
        iam = boto3.client("iam")
        for name in ("instdisc-head", "instdisc-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2", region_name="us-west-2")


def test_ray_launches_the_machines_that_are_meant_behind_a_closed_security_group(ec2):
    config = prepare_config(yaml.safe_load(LAUNCHER_FILE.read_text()))
    validate_config(config)
    config = bootstrap_aws(config)

    groups = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["instdisc-cluster"]}])
    (group,) = groups["SecurityGroups"]
    inside, ssh = group["IpPermissions"]
    assert inside["IpProtocol"] == "-1"
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group["GroupId"]]
    assert inside["IpRanges"] == []
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpProtocol"]) == (22, 22, "tcp")

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        assert node_type["node_config"]["SecurityGroupIds"] == [group["GroupId"]]
        zones = ec2.describe_subnets(SubnetIds=node_type["node_config"]["SubnetIds"])["Subnets"]
        assert {zone["AvailabilityZone"] for zone in zones} == {"us-west-2a", "us-west-2b", "us-west-2c"}
        provider.create_node(node_type["node_config"], {"ray-user-node-type": name}, 1)
    machines = {}
    for reservation in ec2.describe_instances()["Reservations"]:
        for machine in reservation["Instances"]:
            machines[{tag["Key"]: tag["Value"] for tag in machine["Tags"]}["ray-user-node-type"]] = machine
    assert machines.keys() == {"head", "gpu-spot", "gpu-on-demand"}
    assert machines["gpu-spot"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in machines["head"]
    assert "InstanceLifecycle" not in machines["gpu-on-demand"]
    for name, machine in machines.items():
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert machine["MetadataOptions"]["HttpPutResponseHopLimit"] == 2
        profile = machine["IamInstanceProfile"]["Arn"]
        assert profile.endswith("instdisc-head" if name == "head" else "instdisc-worker")
