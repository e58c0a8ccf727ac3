"""The launcher's file is what Ray and EC2 accept and leaves nothing to unsafe defaults; the policies fit it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.stub import Stubber
from botocore.validate import ParamValidator

from pipeline.config import load_config

INFRA = Path(__file__).parents[2] / "infra"
POLICIES = INFRA / "aws" / "iam"
Statement = tuple[set[str], set[str]]


@pytest.fixture
def cluster() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())
    return document


def node_configs(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind["node_config"] for name, kind in cluster["available_node_types"].items()}


def validate_with_ray(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(cluster)  # without it, validation refuses every user's file
    validate_config(prepared)
    return prepared


def what_ec2_refuses(node_config: dict[str, Any]) -> str:
    """Botocore's report on the request that Ray makes of a node_config; Ray itself lets any key pass."""
    session = botocore.session.get_session()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    request = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    request |= {"SubnetId": node_config["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}
    report: str = ParamValidator().validate(request, shape).generate_report()
    return report


def test_ray_accepts_the_cluster_as_it_stands(cluster: dict[str, Any]) -> None:
    prepared = validate_with_ray(cluster)
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"):
        assert prepared[key] == []
    assert {key: prepared[key] for key in cluster} == cluster


def test_ray_finds_a_misspelt_key(cluster: dict[str, Any]) -> None:
    kind = cluster["available_node_types"]["gpu"]
    kind["max_worker"] = kind.pop("max_workers")
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_with_ray(cluster)


def test_ec2_accepts_every_node(cluster: dict[str, Any]) -> None:
    for node_config in node_configs(cluster).values():
        assert what_ec2_refuses(node_config) == ""


def test_ec2_finds_a_misspelt_key(cluster: dict[str, Any]) -> None:
    node_config = node_configs(cluster)["gpu"]
    node_config["MetadataOption"] = node_config.pop("MetadataOptions")
    assert "MetadataOption" in what_ec2_refuses(node_config)


def test_every_node_is_closed_and_encrypted(cluster: dict[str, Any]) -> None:
    for node_config in node_configs(cluster).values():
        assert node_config["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 2}
        assert all(disk["Ebs"]["Encrypted"] for disk in node_config["BlockDeviceMappings"])
        assert {"ImageId", "KeyName", "SubnetIds", "SecurityGroupIds", "IamInstanceProfile"} <= node_config.keys()
    assert cluster["provider"]["use_internal_ips"] is True
    assert "security_group" not in cluster["provider"]  # it would only add rules to a group open to the world on 22


def test_the_head_is_on_demand_and_runs_no_tasks(cluster: dict[str, Any]) -> None:
    head, gpu = (cluster["available_node_types"][name] for name in ("head", "gpu"))
    assert cluster["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["resources"]["GPU"] == 1
    assert 0 < gpu["max_workers"] <= cluster["max_workers"]


def test_the_gpus_of_a_night_are_there_before_it_asks(cluster: dict[str, Any]) -> None:
    """A run that wants cuda is refused where there is no GPU, before Ray is asked to start a node."""
    runtime, gpu = load_config(INFRA / "kubernetes" / "nightly.yaml").runtime, cluster["available_node_types"]["gpu"]
    assert runtime.device == "cuda"
    assert runtime.actors == gpu["min_workers"] * gpu["resources"]["GPU"]
    assert gpu["min_workers"] <= gpu["max_workers"]


def test_ray_creates_no_group_key_or_role_of_its_own(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's bootstrap against stubbed clients: two look-ups, and any other call would raise."""
    aws: Any = importlib.import_module("ray.autoscaler._private.aws.config")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    prepared = validate_with_ray(cluster)
    named = node_configs(cluster)["gpu"]
    group = {"GroupId": named["SecurityGroupIds"][0], "VpcId": "vpc-1"}
    subnet = {"SubnetId": named["SubnetIds"][0], "State": "available", "VpcId": "vpc-1"}
    subnet["AvailabilityZone"] = cluster["provider"]["availability_zone"]
    with Stubber(aws._resource("ec2", prepared).meta.client) as ec2, Stubber(aws._client("iam", prepared)):
        ec2.add_response("describe_security_groups", {"SecurityGroups": [group]})
        for _ in range(2):  # all of them, then the one that we name
            ec2.add_response("describe_subnets", {"Subnets": [subnet]})
        bootstrapped = aws.bootstrap_aws(prepared)
        ec2.assert_no_pending_responses()
    assert bootstrapped["available_node_types"] == prepared["available_node_types"]
    assert bootstrapped["head_node"] == {}


def test_the_cluster_asks_for_the_token(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    (token,) = [option.partition("PATH=")[2] for option in options if "RAY_AUTH_TOKEN_PATH" in option]
    assert str(Path(token).parent) in cluster["file_mounts"]


def test_ray_starts_with_flags_that_it_knows_and_a_private_dashboard(cluster: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    parsed = {}
    for part in ("head", "worker"):
        stop, command = cluster[f"{part}_start_ray_commands"]
        assert stop == "ray stop"
        ray, verb, *flags = shlex.split(command)
        assert (ray, verb) == ("ray", "start")
        parsed[part] = start.make_context("ray start", flags).params
    assert parsed["head"]["dashboard_host"] == "127.0.0.1"
    assert parsed["head"]["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert parsed["worker"]["address"] == f"$RAY_HEAD_IP:{parsed['head']['port']}"


@pytest.fixture
def parliament(monkeypatch: pytest.MonkeyPatch) -> Any:
    """parliament 1.6 asks pkg_resources, which setuptools 82 dropped, for the folder that it lies in."""
    if importlib.util.find_spec("pkg_resources") is None:
        spec = importlib.util.find_spec("parliament")
        assert spec
        assert spec.origin
        folder = Path(spec.origin).parent
        stand_in = types.ModuleType("pkg_resources")
        stand_in.resource_filename = lambda package, name: str(folder / name)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pkg_resources", stand_in)
    import parliament

    return parliament


def findings(parliament: Any, policy: str) -> Counter[str]:
    analysed = parliament.analyze_policy_string(policy, include_community_auditors=True)
    return Counter(finding.issue for finding in analysed.findings)


def statements(name: str) -> dict[str, dict[str, Any]]:
    return {statement["Sid"]: statement for statement in json.loads((POLICIES / name).read_text())["Statement"]}


def as_set(value: str | list[str]) -> set[str]:
    return {value} if isinstance(value, str) else set(value)


def test_the_policies_are_what_iam_knows(parliament: Any) -> None:
    assert findings(parliament, (POLICIES / "job-policy.json").read_text()) == {}
    # Known: RunInstances names its parts in three statements, each incomplete alone (the next test adds them up), and
    # passing a role to an instance is what a launcher does; the role is the workers', which holds less than the head's.
    assert findings(parliament, (POLICIES / "head-policy.json").read_text()) == {
        "RESOURCE_MISMATCH": 3,
        "PERMISSIONS_MANAGEMENT_ACTIONS": 1,
        "PRIVILEGE_ESCALATION": 1,
    }


@pytest.mark.parametrize(
    ("right", "wrong", "issue"),
    [
        ('"s3:GetObject"', '"s3:GetObjekt"', "UNKNOWN_ACTION"),
        ("s3:prefix", "s3:prefx", "UNKNOWN_CONDITION_FOR_ACTION"),
        ('"s3:GetObject"', '"s3:ListAllMyBuckets"', "RESOURCE_MISMATCH"),
    ],
)
def test_a_mistake_in_a_policy_is_found(parliament: Any, right: str, wrong: str, issue: str) -> None:
    policy = (POLICIES / "job-policy.json").read_text()
    assert issue in findings(parliament, policy.replace(right, wrong))


def test_the_job_may_read_its_input_and_write_its_output() -> None:
    config = load_config(INFRA / "kubernetes" / "nightly.yaml")
    raw, labels = (url.removeprefix("s3://").partition("/")[::2] for url in (config.input.urls[0], config.output.url))
    raw_prefix, labels_prefix = raw[1].partition("/")[0], labels[1]
    found = statements("job-policy.json")
    assert {sid: (as_set(s["Action"]), as_set(s["Resource"])) for sid, s in found.items()} == {
        "ListInput": ({"s3:ListBucket"}, {f"arn:aws:s3:::{raw[0]}"}),
        "ReadInput": ({"s3:GetObject"}, {f"arn:aws:s3:::{raw[0]}/{raw_prefix}/*"}),
        "ListOutput": ({"s3:ListBucket"}, {f"arn:aws:s3:::{labels[0]}"}),
        "WriteOutput": (
            {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"},
            {f"arn:aws:s3:::{labels[0]}/{labels_prefix}/*"},
        ),
        # A folder that is named without a slash may be a file.
        "LookUpNamedFolder": ({"s3:GetObject"}, {f"arn:aws:s3:::{raw[0]}/{raw_prefix}"}),
    }
    prefixes = {"ListInput": [raw_prefix, f"{raw_prefix}/*"], "ListOutput": f"{labels_prefix}/*"}
    for sid, prefix in prefixes.items():
        assert found[sid]["Condition"] == {"StringLike": {"s3:prefix": prefix}}


def test_the_head_may_launch_these_workers_and_nothing_else(cluster: dict[str, Any]) -> None:
    gpu = node_configs(cluster)["gpu"]
    region = cluster["provider"]["region"]
    profile = gpu["IamInstanceProfile"]["Name"]
    found = statements("head-policy.json")
    account = found["GiveWorkersTheirRole"]["Resource"].split(":")[4]
    here = f"arn:aws:ec2:{region}:{account}:"
    assert {sid: (as_set(s["Action"]), as_set(s["Resource"])) for sid, s in found.items()} == {
        "SeeInstances": ({"ec2:DescribeInstances"}, {"*"}),
        "LaunchWorkers": ({"ec2:RunInstances"}, {f"{here}instance/*"}),
        "WithEncryptedDisks": ({"ec2:RunInstances"}, {f"{here}volume/*"}),
        "FromTheseParts": (
            {"ec2:RunInstances"},
            {
                f"{here}key-pair/{gpu['KeyName']}",
                f"{here}network-interface/*",
                f"{here}spot-instances-request/*",
                f"arn:aws:ec2:{region}::image/{gpu['ImageId']}",
                *(f"{here}security-group/{group}" for group in gpu["SecurityGroupIds"]),
                *(f"{here}subnet/{subnet}" for subnet in gpu["SubnetIds"]),
            },
        ),
        "TagAtLaunch": ({"ec2:CreateTags"}, {f"{here}instance/*"}),
        "TagAndStopOwnWorkers": ({"ec2:CreateTags", "ec2:TerminateInstances"}, {f"{here}instance/*"}),
        "GiveWorkersTheirRole": ({"iam:PassRole"}, {f"arn:aws:iam::{account}:role/{profile}"}),
    }
    assert found["LaunchWorkers"]["Condition"] == {
        "StringEquals": {
            "aws:RequestTag/ray-cluster-name": cluster["cluster_name"],
            "aws:RequestTag/ray-node-type": "worker",
            "ec2:InstanceMarketType": gpu["InstanceMarketOptions"]["MarketType"],
            "ec2:InstanceType": gpu["InstanceType"],
            "ec2:MetadataHttpTokens": gpu["MetadataOptions"]["HttpTokens"],
        },
        "ArnEquals": {"ec2:InstanceProfile": f"arn:aws:iam::{account}:instance-profile/{profile}"},
    }
    assert all("Condition" in statement for sid, statement in found.items() if sid != "FromTheseParts")


def test_the_tags_are_those_that_ray_sets(cluster: dict[str, Any]) -> None:
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND

    tags = {TAG_RAY_CLUSTER_NAME: cluster["cluster_name"], TAG_RAY_NODE_KIND: NODE_KIND_WORKER}
    own = statements("head-policy.json")["TagAndStopOwnWorkers"]["Condition"]["StringEquals"]
    assert own == {f"aws:ResourceTag/{tag}": value for tag, value in tags.items()}
