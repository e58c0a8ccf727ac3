"""The manifests are what Kubernetes and KubeRay accept, keep the rules that no schema knows, and fit one another."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import load_config, make_config

FOLDER = Path(__file__).parents[2] / "infra" / "kubernetes"
OLDEST, NEWEST = "1.32", "1.37"
Bytes = Annotated[str, Field(pattern=r"^\d+$")]
GIB = 2**30


# The fields of KubeRay 1.7 that we use, closed: the operator's own schema would let a misspelt one pass.
class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Named(Closed):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]


class PodTemplate(Closed):
    spec: dict[str, Any]


class AuthOptions(Closed):
    mode: Literal["token"]


class Group(Closed):
    rayStartParams: dict[Literal["num-cpus", "memory", "object-store-memory"], Bytes]
    template: PodTemplate


class WorkerGroup(Group):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class RayClusterSpec(Closed):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Closed):
    entrypoint: str
    submissionMode: Literal["K8sJobMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    preRunningDeadlineSeconds: int
    activeDeadlineSeconds: int
    backoffLimit: int
    submitterPodTemplate: PodTemplate
    rayClusterSpec: RayClusterSpec


class RayJob(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Named
    spec: RayJobSpec


class Generator(Closed):
    name: str
    files: list[str]


class Kustomization(Closed):
    apiVersion: Literal["kustomize.config.k8s.io/v1beta1"]
    kind: Literal["Kustomization"]
    labels: list[Any]
    resources: list[str]
    configMapGenerator: list[Generator]
    generatorOptions: dict[Literal["disableNameSuffixHash"], bool]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    found = documents("serviceaccounts.yaml") + documents("cronjob.yaml")
    return {document["metadata"]["name"]: document for document in found if document["kind"] == kind}


def ray_pods(rayjob: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pods that KubeRay makes from a RayJob, by their part in it."""
    spec = rayjob["spec"]
    templates = {"submitter": spec["submitterPodTemplate"], "head": spec["rayClusterSpec"]["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    return {
        part: {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": part}, "spec": template["spec"]}
        for part, template in templates.items()
    }


def validate(document: dict[str, Any]) -> None:
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(document, version, strict=True)


def restricted(pod: dict[str, Any]) -> Iterator[str]:
    """What keeps a pod from the profile `restricted` of the Pod Security Standards."""
    context = pod.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        yield "runs as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile"
    if {"hostNetwork", "hostPID", "hostIPC"} & pod.keys():
        yield "host namespaces"
    for volume in pod.get("volumes", []):
        if not volume.keys() & {"configMap", "emptyDir", "projected", "secret"}:
            yield f"volume {volume['name']}"
    for container in pod["containers"] + pod.get("initContainers", []):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"privileges of {container['name']}"


@pytest.fixture
def rayjob() -> dict[str, Any]:
    (document,) = documents("rayjob.yaml")
    return document


@pytest.fixture
def cronjob() -> dict[str, Any]:
    (document,) = documents("cronjob.yaml")
    return document


@pytest.fixture
def nightly_pod(cronjob: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return pod


def test_core_kinds_are_valid() -> None:
    found = documents("serviceaccounts.yaml") + documents("cronjob.yaml") + documents("networkpolicy.yaml")
    for document in found:
        validate(document)
    kinds = ["CronJob", "NetworkPolicy", "Role", "RoleBinding", "ServiceAccount", "ServiceAccount", "ServiceAccount"]
    assert sorted(document["kind"] for document in found) == kinds


def test_a_misspelt_key_of_a_core_kind_is_found(cronjob: dict[str, Any]) -> None:
    cronjob["spec"]["concurencyPolicy"] = cronjob["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        validate(cronjob)


def test_the_rayjob_and_its_pods_are_valid(rayjob: dict[str, Any]) -> None:
    RayJob.model_validate(rayjob)
    pods = ray_pods(rayjob)
    assert list(pods) == ["submitter", "head", "decode", "gpu"]
    for pod in pods.values():
        validate(pod)


@pytest.mark.parametrize("path", ["ttlSecondsAfterFinished", "rayClusterSpec.workerGroupSpecs.1.minReplicas"])
def test_a_misspelt_key_of_the_rayjob_is_found(rayjob: dict[str, Any], path: str) -> None:
    *above, last = path.split(".")
    place = rayjob["spec"]
    for step in above:
        place = place[int(step) if step.isdigit() else step]
    place[last + "X"] = place.pop(last)
    with pytest.raises(ValidationError, match=f"{last}X\n.*Extra inputs"):
        RayJob.model_validate(rayjob)


def test_a_misspelt_key_of_a_ray_pod_is_found(rayjob: dict[str, Any]) -> None:
    container = ray_pods(rayjob)["gpu"]["spec"]["containers"][0]
    container["resource"] = container.pop("resources")
    with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
        validate(ray_pods(rayjob)["gpu"])


def test_every_pod_is_restricted(rayjob: dict[str, Any], nightly_pod: dict[str, Any]) -> None:
    for pod in [nightly_pod, *(pod["spec"] for pod in ray_pods(rayjob).values())]:
        assert list(restricted(pod)) == []
        loose = copy.deepcopy(pod)
        del loose["containers"][0]["securityContext"]["capabilities"]
        loose["securityContext"]["runAsNonRoot"] = False
        assert len(list(restricted(loose))) == 2


def test_the_cluster_goes_when_the_job_ends(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in spec  # it excludes the line above, and leaks the cluster of a stopped job
    assert 0 < spec["ttlSecondsAfterFinished"] <= 600
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


def test_the_cluster_asks_for_the_token_and_fits_our_ray(rayjob: dict[str, Any]) -> None:
    import ray

    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}  # an empty block would switch nothing on
    assert cluster["rayVersion"] == ray.__version__


def test_nobody_outside_reaches_a_pod_but_the_operator_the_dashboard(rayjob: dict[str, Any]) -> None:
    (policy,) = documents("networkpolicy.yaml")
    spec = policy["spec"]
    assert spec["podSelector"] == {}  # every pod
    assert spec["policyTypes"] == ["Ingress"]
    inside, operator = spec["ingress"]
    assert inside == {"from": [{"podSelector": {}}]}  # without a namespaceSelector: this namespace's
    (peer,) = operator["from"]  # both selectors in one peer: or else every pod of every namespace
    assert peer["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    (head,) = ray_pods(rayjob)["head"]["spec"]["containers"]
    dashboard = {port["name"]: port["containerPort"] for port in head["ports"]}["dashboard"]
    assert operator["ports"] == [{"protocol": "TCP", "port": dashboard}]
    assert "networkpolicy.yaml" in documents("kustomization.yaml")[0]["resources"]


def test_resources_stand_in_the_limits_alone(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert list(container["resources"]) == ["limits"]
        limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * GIB
        store, heap = (int(group["rayStartParams"][key]) for key in ("object-store-memory", "memory"))
        assert 0.25 < store / limit < 0.35
        assert 0.5 < heap / limit < 0.65
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # the driver's node runs no tasks


def test_the_gpu_group_gets_gpu_nodes_and_gives_the_config_its_actors(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    gpu = cluster["workerGroupSpecs"][1]
    pod = gpu["template"]["spec"]
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["nodeSelector"] != cluster["headGroupSpec"]["template"]["spec"]["nodeSelector"]
    assert gpus * gpu["replicas"] == load_config(FOLDER / "nightly.yaml").runtime.actors


def test_fixed_sizes_are_fixed(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_pods_live_long_enough_to_drain_and_to_stop(rayjob: dict[str, Any]) -> None:
    pods = {part: pod["spec"] for part, pod in ray_pods(rayjob).items() if part != "submitter"}
    for part, pod in pods.items():
        env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        grace = pod["terminationGracePeriodSeconds"]
        assert grace >= int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) + 30
        if part == "head":
            assert grace >= int(env["RAY_JOB_STOP_WAIT_TIME_S"]) + 30


def test_every_image_is_the_same_and_has_a_version(rayjob: dict[str, Any], nightly_pod: dict[str, Any]) -> None:
    pods = [nightly_pod, *(pod["spec"] for pod in ray_pods(rayjob).values())]
    (image,) = {container["image"] for pod in pods for container in pod["containers"]}
    assert re.search(r":\d+\.\d+\.\d+$", image)


def test_the_cronjob_starts_one_night_at_a_time(cronjob: dict[str, Any], nightly_pod: dict[str, Any]) -> None:
    spec = cronjob["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert {"name": "TIME_ZONE", "value": spec["timeZone"]} in nightly_pod["containers"][0]["env"]
    assert len(cronjob["metadata"]["name"]) <= 52


def test_the_times_of_a_night_fit_into_each_other(cronjob: dict[str, Any], rayjob: dict[str, Any]) -> None:
    job, night = rayjob["spec"], cronjob["spec"]
    attempts = job["backoffLimit"] + 1
    longest = night["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    minute, hour, *_ = night["schedule"].split()
    start = int(hour) * 3600 + int(minute) * 60 + night["startingDeadlineSeconds"]
    assert longest >= attempts * job["activeDeadlineSeconds"] + 3600
    assert start + longest < 24 * 3600  # else a pod that replaces another after midnight would start a second night


def test_a_dated_name_is_short_enough(rayjob: dict[str, Any]) -> None:
    assert len(rayjob["metadata"]["name"] + "-20261231") <= 47


def test_every_account_has_its_job_and_nothing_more(rayjob: dict[str, Any], nightly_pod: dict[str, Any]) -> None:
    accounts = of_kind("ServiceAccount")
    used = {part: pod["spec"].get("serviceAccountName") for part, pod in ray_pods(rayjob).items()}
    worker = "resnet-batch-worker"
    assert used == {"submitter": None, "head": "resnet-batch-head", "decode": worker, "gpu": worker}
    assert set(accounts) == {*filter(None, used.values()), nightly_pod["serviceAccountName"]}
    assert not any(account["automountServiceAccountToken"] for account in accounts.values())
    for pod in ray_pods(rayjob).values():
        assert pod["spec"]["automountServiceAccountToken"] is False
    (role,), (binding,) = of_kind("Role").values(), of_kind("RoleBinding").values()
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [nightly_pod["serviceAccountName"]]


def test_the_base_holds_every_file_that_a_pod_reads(rayjob: dict[str, Any], nightly_pod: dict[str, Any]) -> None:
    base = Kustomization.model_validate(documents("kustomization.yaml")[0])
    assert base.generatorOptions["disableNameSuffixHash"] is True
    maps = {generator.name: generator.files for generator in base.configMapGenerator}
    for name in [*base.resources, *(file for files in maps.values() for file in files)]:
        assert (FOLDER / name).is_file()
    head = ray_pods(rayjob)["head"]["spec"]
    read = {"head": rayjob["spec"]["entrypoint"].split(), "nightly": nightly_pod["containers"][0]["command"]}
    for part, pod in {"head": head, "nightly": nightly_pod}.items():
        (volume,), (mount,) = pod["volumes"], pod["containers"][0]["volumeMounts"]
        assert volume["name"] == mount["name"]
        paths = [Path(word) for word in read[part] if word.startswith(mount["mountPath"])]
        assert paths
        assert {path.name for path in paths} <= set(maps[volume["configMap"]["name"]])


def test_the_pod_that_looks_is_the_jobs_own(rayjob: dict[str, Any]) -> None:
    (pod,) = documents("look.yaml")
    validate(pod)
    workers = ray_pods(rayjob)["gpu"]["spec"]
    assert list(restricted(pod["spec"])) == []
    for name in ("serviceAccountName", "automountServiceAccountToken", "securityContext"):
        assert pod["spec"][name] == workers[name]
    (container,), (worker,) = pod["spec"]["containers"], workers["containers"]
    assert (container["image"], container["securityContext"]) == (worker["image"], worker["securityContext"])
    dataset = load_config(FOLDER / "nightly.yaml").output.url
    assert container["command"] == [
        "resnet-batch",
        "status",
        dataset,
        "--config",
        rayjob["spec"]["entrypoint"].split()[-1],
    ]
    head = ray_pods(rayjob)["head"]["spec"]
    assert pod["spec"]["volumes"] == head["volumes"]
    assert container["volumeMounts"] == head["containers"][0]["volumeMounts"]
    assert "look.yaml" not in documents("kustomization.yaml")[0]["resources"]


def test_the_base_has_no_namespace_and_a_misspelt_key_is_found() -> None:
    (document,) = documents("kustomization.yaml")
    assert not re.search(r"^\s*namespace:", "".join(p.read_text() for p in FOLDER.glob("*.yaml")), re.MULTILINE)
    document["resource"] = document.pop("resources")
    with pytest.raises(ValidationError, match=r"resource\n.*Extra inputs"):
        Kustomization.model_validate(document)


def test_the_night_runs_a_config_that_we_accept(rayjob: dict[str, Any]) -> None:
    config = make_config(yaml.safe_load((FOLDER / "nightly.yaml").read_text()))
    assert config.runtime.device == "cuda"
    assert rayjob["spec"]["entrypoint"].split() == ["resnet-batch", "run", "/config/nightly.yaml"]


def test_ray_start_knows_every_parameter(rayjob: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        flags = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        start.make_context("ray start", [*flags, "--head", "--block"])
