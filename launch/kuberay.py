"""A KubeRay RayJob: its shape, what its pods have, and what would keep a sweep in it from running. Ray ships no schema for it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from launch.cluster_settings import ClusterSettings, looks_secret
from launch.cluster_yaml import nearest, refusal, settings_path
from launch.launcher_checks import MOST_NODES, check_image

API_VERSION, KIND = "ray.io/v1", "RayJob"
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode")
_ENTRY = re.compile(r"(^|[\s/])launch/sweep\.py(\s|$)")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?")  # 63 of Kubernetes less what KubeRay puts behind
_CPUS = re.compile(r"(\d+(?:\.\d+)?)(m?)")
_GPU = "nvidia.com/gpu"
_BOOK = "https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html"

# Fields of KubeRay's v1 API, as of 1.6.
_TOP = ("apiVersion", "kind", "metadata", "spec", "status")
_JOB = (
    "entrypoint", "runtimeEnvYAML", "rayClusterSpec", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "activeDeadlineSeconds", "backoffLimit", "preRunningDeadlineSeconds", "clusterSelector", "submitterPodTemplate",
    "submitterConfig", "metadata", "jobId", "suspend", "managedBy", "deletionStrategy", "entrypointNumCpus", "entrypointNumGpus",
    "entrypointResources",
)  # fmt: skip
_CLUSTER = (
    "rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions",
    "headServiceAnnotations", "gcsFaultToleranceOptions", "suspend", "managedBy", "upgradeStrategy", "networkPolicy",
)  # fmt: skip
_WORKERS = (
    "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "scaleStrategy", "numOfHosts", "suspend",
    "idleTimeoutSeconds", "resources", "labels",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PodGroup:
    """Pods of one kind. minimum, maximum: how many of them."""

    name: str
    cpus: int
    gpus: int
    minimum: int
    maximum: int
    is_head: bool = False


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What a RayJob says that a sweep goes by; the head is the first group."""

    name: str
    groups: tuple[PodGroup, ...]


def is_kubernetes(config: Mapping[str, Any]) -> bool:
    """Whether a file is Kubernetes' rather than that of Ray's cluster launcher."""
    return "apiVersion" in config or "kind" in config


def read_rayjob(path: Path, config: Mapping[str, Any], settings: ClusterSettings) -> RayJob:
    """Check a RayJob, and say what its pods have.

    Raises:
        ConfigError: with the file, the key and the mend.
    """
    _known(path, "", config, _TOP)
    for key, needed in (("apiVersion", API_VERSION), ("kind", KIND)):
        if config.get(key) != needed:
            raise refusal(path, key, f"{config.get(key)!r}; a sweep runs as a {KIND} of {API_VERSION}, so give {needed}")
    name = _mapping(path, "metadata", config.get("metadata")).get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise refusal(path, "metadata.name", f"{name!r} is no name of Kubernetes; use up to 47 of a-z, 0-9 and -")
    spec = _mapping(path, "spec", config.get("spec"))
    _known(path, "spec", spec, _JOB)
    _check_job(path, spec, settings)
    place = "spec.rayClusterSpec"
    cluster = _mapping(path, place, spec.get("rayClusterSpec"))
    _known(path, place, cluster, _CLUSTER)
    _check_cluster(path, place, cluster)
    head = _mapping(path, f"{place}.headGroupSpec", cluster.get("headGroupSpec"))
    groups = [_group(path, f"{place}.headGroupSpec", head, settings, is_head=True)]
    workers = cluster.get("workerGroupSpecs") or []
    if not isinstance(workers, list):
        raise refusal(path, f"{place}.workerGroupSpecs", "it is no list; begin each group with `- groupName:`")
    for i, each in enumerate(workers):
        key = f"{place}.workerGroupSpecs[{i}]"
        _known(path, key, _mapping(path, key, each), _WORKERS)
        groups.append(_group(path, key, each, settings, is_head=False, scales=bool(cluster.get("enableInTreeAutoscaling"))))
    names = [group.name for group in groups]
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise refusal(path, f"{place}.workerGroupSpecs", f"two groups are called {twice!r}; give each its own groupName")
    return RayJob(name=name, groups=tuple(groups))


def _check_job(path: Path, spec: Mapping[str, Any], settings: ClusterSettings) -> None:
    entry = spec.get("entrypoint")
    if not isinstance(entry, str) or not _ENTRY.search(entry):
        raise refusal(path, "spec.entrypoint", f"{entry!r} runs no sweep; give `python launch/sweep.py --space ... --name ...`")
    _check_root(path, entry, settings.storage_path)
    mode = spec.get("submissionMode", SUBMISSION_MODES[0])
    if mode not in SUBMISSION_MODES:
        raise refusal(path, "spec.submissionMode", f"there is no {mode!r}; {nearest(str(mode), SUBMISSION_MODES)}")
    for key in ("ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"):
        _whole(path, f"spec.{key}", spec.get(key, 0), least=0)
    text = spec.get("runtimeEnvYAML") or "{}"
    try:
        environment = yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError) as error:
        raise refusal(path, "spec.runtimeEnvYAML", f"not YAML: {str(error).splitlines()[0]}; mend it") from None
    environment = _mapping(path, "spec.runtimeEnvYAML", environment)
    for key in ("pip", "uv", "conda"):
        if key in environment:
            raise refusal(
                path, f"spec.runtimeEnvYAML.{key}", "it installs packages anew for each job; put them into the image "
                "(docker/Dockerfile.gpu) and leave it out"
            )  # fmt: skip
    variables = environment.get("env_vars") or {}
    for name in _mapping(path, "spec.runtimeEnvYAML.env_vars", variables):
        if looks_secret(str(name)):
            raise refusal(
                path, f"spec.runtimeEnvYAML.env_vars.{name}", "it is shown with the job to everybody; make a Secret of it, and "
                "name that under env of the containers with secretKeyRef"
            )  # fmt: skip


def _check_root(path: Path, entry: str, root: str | None) -> None:
    """The sweep of the entrypoint writes to where the settings say, which the pods share."""
    try:
        words = shlex.split(entry)
    except ValueError:
        raise refusal(path, "spec.entrypoint", "a quotation mark in it is open; close it") from None
    given = [after for word, after in pairwise(words) if word == "--storage-path"]
    given += [word.partition("=")[2] for word in words if word.startswith("--storage-path=")]
    if not given and "--cluster" not in words:
        where = root or "/shared/hamu"
        raise refusal(path, "spec.entrypoint", f"the sweep would write to a pod's own disk; add --storage-path {where}")
    if given and root is not None and given[-1] != root:
        raise refusal(
            path, "spec.entrypoint", f"--storage-path {given[-1]} is not the storage_path {root} of {settings_path(path).name}; "
            f"give {root} in both"
        )  # fmt: skip


def _check_cluster(path: Path, place: str, cluster: Mapping[str, Any]) -> None:
    here = version("ray")
    if str(cluster.get("rayVersion")) != here:
        raise refusal(
            path, f"{place}.rayVersion", f"{cluster.get('rayVersion')!r}, and the Ray installed here is {here}: versions do not "
            f"work together; give {here!r}, in the images too"
        )  # fmt: skip
    options = _mapping(path, f"{place}.authOptions", cluster.get("authOptions") or {})
    if options.get("mode") != "token":
        raise refusal(
            path, f"{place}.authOptions.mode", f"{options.get('mode')!r}, so every pod that reaches the head's port can run code "
            "there; give token (KubeRay 1.5.1 or newer)"
        )  # fmt: skip


def _group(
    path: Path, place: str, group: Mapping[str, Any], settings: ClusterSettings, *, is_head: bool, scales: bool = True
) -> PodGroup:
    containers = _mapping(path, place, group).get("template", {})
    containers = _mapping(path, f"{place}.template.spec", _mapping(path, f"{place}.template", containers).get("spec"))
    containers = containers.get("containers")
    key = f"{place}.template.spec.containers"
    if not isinstance(containers, list) or not containers:
        raise refusal(path, key, "there is no container; give the one that Ray runs in first")
    main = _mapping(path, f"{key}[0]", containers[0])
    for i, each in enumerate(containers):
        _check_variables(path, f"{key}[{i}]", _mapping(path, f"{key}[{i}]", each))
    check_image(path, f"{key}[0].image", str(main.get("image") or ""))
    _check_mount(path, f"{key}[0].volumeMounts", main, settings)
    cpus, gpus = _resources(path, f"{key}[0].resources", main)
    start = _mapping(path, f"{place}.rayStartParams", group.get("rayStartParams") or {})
    if "num-cpus" in start:
        cpus = _whole(path, f"{place}.rayStartParams.num-cpus", start["num-cpus"], least=0)
    if is_head:
        return PodGroup(name="head", cpus=cpus, gpus=gpus, minimum=1, maximum=1, is_head=True)
    name = group.get("groupName")
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise refusal(path, f"{place}.groupName", f"{name!r} is no name; give e.g. a100")
    replicas = _whole(path, f"{place}.replicas", group.get("replicas", group.get("minReplicas", 1)), least=0)
    least = _whole(path, f"{place}.minReplicas", group.get("minReplicas", 0), least=0)
    most = _whole(path, f"{place}.maxReplicas", group.get("maxReplicas", max(replicas, least)), least=0)
    if least > most:
        raise refusal(path, f"{place}.minReplicas", f"{least} is more than maxReplicas {most}; give at most {most}")
    if not least <= replicas <= most:
        raise refusal(
            path,
            f"{place}.replicas",
            f"{replicas} is not from {least} to {most}, as minReplicas and maxReplicas say; give {least}",
        )
    hosts = _whole(path, f"{place}.numOfHosts", group.get("numOfHosts", 1), least=1)
    if most * hosts > MOST_NODES:
        raise refusal(path, f"{place}.maxReplicas", f"{most} pods cannot be; give up to {MOST_NODES}")
    minimum, maximum = (least, most) if scales else (replicas, replicas)
    return PodGroup(name=name, cpus=cpus, gpus=gpus, minimum=minimum * hosts, maximum=maximum * hosts)


def _check_variables(path: Path, place: str, container: Mapping[str, Any]) -> None:
    variables = container.get("env") or []
    if not isinstance(variables, list):
        raise refusal(path, f"{place}.env", f"{variables!r} is no list; begin each variable with `- name:`")
    for i, each in enumerate(variables):
        if isinstance(each, dict) and looks_secret(str(each.get("name", ""))) and each.get("value"):
            raise refusal(
                path, f"{place}.env[{i}].value", f"the secret {each['name']} stands in the file; make a Secret of it, and write "
                "valueFrom: {secretKeyRef: {name: ..., key: ...}}"
            )  # fmt: skip


def _check_mount(path: Path, key: str, container: Mapping[str, Any], settings: ClusterSettings) -> None:
    """The artifact root lies on a volume: what a container writes beside goes with it."""
    root = settings.storage_path
    if root is None or "://" in root:
        return
    given = container.get("volumeMounts") or []
    if not isinstance(given, list):
        raise refusal(path, key, f"{given!r} is no list; begin each mount with `- name:`")
    mounts = [str(each.get("mountPath", "")) for each in given if isinstance(each, dict)]
    if not any(mount and Path(root).is_relative_to(mount) for mount in mounts):
        listed = ", ".join(mounts) or "none"
        raise refusal(
            path, key, f"storage_path {root} of {settings_path(path).name} is on no volume (mounted: {listed}); mount a shared "
            "volume there"
        )  # fmt: skip


def _resources(path: Path, key: str, container: Mapping[str, Any]) -> tuple[int, int]:
    """Cores and GPUs of a pod, as KubeRay tells Ray: by the limits, cores by the requests where there is no limit."""
    found = _mapping(path, key, container.get("resources") or {})
    limits, requests = (_mapping(path, f"{key}.{name}", found.get(name) or {}) for name in ("limits", "requests"))
    cpu = limits.get("cpu", requests.get("cpu"))
    match = _CPUS.fullmatch(str(cpu)) if cpu is not None else None
    if match is None:
        raise refusal(path, f"{key}.limits.cpu", f"{cpu!r} is no number of cores; give e.g. 8, in requests too")
    cpus = float(match[1]) / (1000 if match[2] else 1)
    if cpus < 1:
        raise refusal(path, f"{key}.limits.cpu", f"{cpu!r} is less than a core, and Ray needs one; give 1 or more")
    if "memory" not in limits:
        raise refusal(path, f"{key}.limits.memory", "it is missing, so Ray would count the whole machine's; give e.g. 64Gi")
    gpus = _whole(path, f"{key}.limits.{_GPU}", limits.get(_GPU, 0), least=0)
    if _GPU in requests and _whole(path, f"{key}.requests.{_GPU}", requests[_GPU], least=0) != gpus:
        raise refusal(
            path, f"{key}.requests.{_GPU}", f"{requests[_GPU]}, but the limit is {gpus}, and they have to be equal; give {gpus}"
        )
    return int(cpus), gpus


def _whole(path: Path, key: str, value: Any, *, least: int) -> int:
    is_whole = not isinstance(value, bool) and re.fullmatch(r"-?\d+", str(value)) is not None
    if not is_whole or int(value) < least:
        raise refusal(path, key, f"{value!r} is no whole number of {least} or more; give e.g. {max(least, 1)}")
    return int(value)


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        what = "it is missing" if value is None else f"{value!r} is no mapping"
        raise refusal(path, key, f"{what}; write it as in launch/clusters/kuberay-rayjob.yaml, see {_BOOK}")
    return value


def _known(path: Path, place: str, found: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in found:
        if name not in known:
            raise refusal(
                path, f"{place}.{name}" if place else str(name), f"KubeRay knows no such key; {nearest(str(name), known)}"
            )
