"""What Ray's schema lets through, and `ray up` or a sweep would fail on, in files of its cluster launcher."""

from __future__ import annotations

import copy
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hamu.cli.security import is_loopback
from launch.cluster_yaml import nearest, refusal
from launch.node_types import node_type

RAY_PORT = 6379
MOST_NODES = 10_000
PROVIDERS = ("local", "aws", "gcp", "azure", "vsphere", "aliyun", "external")
_DEFAULT_MAX_WORKERS = 2  # of Ray's own defaults.yaml for aws and gcp
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*\.?")
_LITERAL_TOKEN = re.compile(r"RAY_AUTH_TOKEN=(?![\"']?\$)\S")
_WIDE_DASHBOARD = re.compile(r"--dashboard-host[= ](\S+)")
_COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
    "worker_start_ray_commands",
)  # fmt: skip


def max_workers(config: Mapping[str, Any]) -> int:
    """Nodes beside the head that a launcher file allows at once, as Ray counts them."""
    if config["provider"]["type"] == "local":
        n_ips = len(config["provider"]["worker_ips"])
        return min(config.get("max_workers", n_ips), n_ips)
    return config.get("max_workers", _DEFAULT_MAX_WORKERS)


def instance_name(each: Mapping[str, Any]) -> str | None:
    """The provider's name of a node type's instances."""
    config = each.get("node_config") or {}
    name = config.get("InstanceType") or config.get("machineType")
    return name if isinstance(name, str) else None


def filled_resources(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the resources of AWS node types that do not say them, as `ray up` asks AWS for them.

    Raises:
        ConfigError: a node type says none, and what its instances have is not known here.
    """
    config = copy.deepcopy(dict(given))
    types, provider = config.get("available_node_types"), config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    for name, each in types.items() if isinstance(types, dict) and kind != "local" else ():
        if not isinstance(each, dict) or each.get("resources") or not isinstance(each.get("node_config") or {}, dict):
            continue
        known, instance = node_type(instance_name(each)), instance_name(each)
        if kind == "aws" and known is not None:
            each["resources"] = known.resources()
            continue
        example = known.resources() if known else {"CPU": 96, "GPU": 8}
        words = ", ".join(f"{key}: {value}" for key, value in example.items())
        why = f"what {instance} has is not known here" if instance and not known else "Ray does not look them up"
        raise refusal(path, f"available_node_types.{name}.resources", f"it is missing, and {why}; write resources: {{{words}}}")
    return config


def check_launcher(path: Path, config: Mapping[str, Any]) -> None:
    """Check a launcher file that has passed Ray's schema.

    Raises:
        ConfigError: with the file, the key and the mend.
    """
    name = config["cluster_name"]
    if not _NAME.fullmatch(name):
        raise refusal(path, "cluster_name", f"{name!r} is empty or has blanks or signs in it; use letters, digits, - and _")
    provider = config["provider"]
    kind = provider["type"]
    if kind not in PROVIDERS:
        mend = "KubeRay has files of its own, see kuberay-rayjob.yaml" if kind == "kuberay" else nearest(kind, PROVIDERS)
        raise refusal(path, "provider.type", f"Ray launches nothing on {kind!r}; {mend}")
    if config.get("idle_timeout_minutes") == 0:
        raise refusal(path, "idle_timeout_minutes", "0 takes a node away the moment it waits for a trial; give e.g. 10")
    if config.get("upscaling_speed") == 0:
        raise refusal(path, "upscaling_speed", "0 never adds a node; give e.g. 1.0")
    if kind == "local":
        _check_local(path, provider)
    else:
        _check_cloud(path, provider, kind)
        _check_node_types(path, config)
    _check_docker(path, config.get("docker") or {})
    _check_commands(path, config)


def check_image(path: Path, key: str, image: str) -> None:
    """Refuse an image that may be another one tomorrow.

    Raises:
        ConfigError: it has no tag or digest, or the tag `latest`.
    """
    last = image.rsplit("/", 1)[-1]
    if "@sha256:" in last:
        return
    _, colon, tag = last.partition(":")
    if not colon or not tag or tag == "latest":
        what = "its tag is latest" if colon and tag else "it has no tag"
        raise refusal(path, key, f"{image!r}: {what}, so nodes started on other days run other versions; give a fixed tag")


def _check_local(path: Path, provider: Mapping[str, Any]) -> None:
    if provider.get("coordinator_address"):
        raise refusal(
            path, "provider.coordinator_address", "machines are not known beforehand with it; give head_ip and worker_ips"
        )
    head, workers = provider.get("head_ip"), provider.get("worker_ips")
    if not head:
        raise refusal(path, "provider.head_ip", "it is missing; give the address of the machine that Ray's head runs on")
    if workers is None:
        raise refusal(path, "provider.worker_ips", "it is missing; list the other machines, or write [] where there are none")
    places = [("provider.head_ip", head), *((f"provider.worker_ips[{i}]", each) for i, each in enumerate(workers))]
    seen: dict[str, str] = {}
    for key, each in places:
        if not isinstance(each, str) or not _is_host(each):
            raise refusal(path, key, f"{each!r} is neither an address nor a host name; give e.g. 192.168.1.11")
        if each in seen:
            raise refusal(path, key, f"{each} is {seen[each]} too; name each machine once")
        seen[each] = key
    if workers:
        for key, each in places:
            if is_loopback(each):
                raise refusal(path, key, f"{each} is this machine to each of them; give the address that the others reach it by")


def _check_cloud(path: Path, provider: Mapping[str, Any], kind: str) -> None:
    needed = {
        "aws": {"region": "us-west-2"},
        "gcp": {"project_id": "my-project-123", "region": "us-central1", "availability_zone": "us-central1-a"},
    }.get(kind, {})
    for key, example in needed.items():
        if not provider.get(key):
            raise refusal(path, f"provider.{key}", f"it is missing, and {kind} needs it; give e.g. {example}")
    region, zones = provider.get("region"), provider.get("availability_zone")
    for zone in zones.split(",") if zones and region else ():
        if not zone.strip().startswith(region):
            raise refusal(
                path, "provider.availability_zone", f"{zone.strip()} lies outside of region {region}; give one of that region"
            )


def _check_node_types(path: Path, config: Mapping[str, Any]) -> None:
    types, head = config.get("available_node_types"), config.get("head_node_type")
    if not types:
        raise refusal(path, "available_node_types", "it is missing, so what the nodes have is not known; name their types")
    if not head:
        raise refusal(path, "head_node_type", f"it is missing; give one of {', '.join(types)}")
    if head not in types:
        raise refusal(path, "head_node_type", f"there is no node type {head!r}; {nearest(head, types)}")
    limit = max_workers(config)
    for name, each in types.items():
        place = f"available_node_types.{name}"
        least, most = each.get("min_workers", 0), each.get("max_workers", 0 if name == head else limit)
        for key, value in (("min_workers", least), ("max_workers", most)):
            if not 0 <= value <= MOST_NODES:
                raise refusal(path, f"{place}.{key}", f"{value} nodes cannot be; give 0 or more, up to {MOST_NODES}")
        for key in ("InstanceType", "machineType"):
            if key in each["node_config"] and not isinstance(each["node_config"][key], str):
                raise refusal(path, f"{place}.node_config.{key}", f"{each['node_config'][key]!r} is no text; give its name")
        if least > most:
            raise refusal(path, f"{place}.min_workers", f"{least} is more than max_workers {most}; give at most {most}")
        resources, known = each["resources"], node_type(instance_name(each))
        if resources.get("CPU", 0) < 1 and not (name == head and "CPU" in resources):
            raise refusal(
                path, f"{place}.resources.CPU", f"a node without cores runs no trial; give {known.cpus if known else 96}"
            )
        if known and resources.get("GPU", 0) > known.gpus:
            raise refusal(
                path,
                f"{place}.resources.GPU",
                f"{resources['GPU']}, but {instance_name(each)} has {known.gpus}; give {known.gpus}",
            )
    if (total := sum(each.get("min_workers", 0) for each in types.values())) > limit:
        raise refusal(path, "max_workers", f"{limit} is less than the sum of min_workers, {total}; give {total} or more")


def _check_docker(path: Path, docker: Mapping[str, Any]) -> None:
    images = {key: docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    for key, image in images.items():
        check_image(path, f"docker.{key}", image)
    if images and not docker.get("container_name"):
        raise refusal(path, "docker.container_name", "it is missing beside an image; give e.g. hamu")


def _check_commands(path: Path, config: Mapping[str, Any]) -> None:
    """Nothing secret in the commands, the dashboard on the loopback, and a token asked for wherever others can reach Ray."""
    for key in _COMMANDS:
        for i, command in enumerate(config.get(key, ())):
            place = f"{key}[{i}]"
            if _LITERAL_TOKEN.search(command):
                raise refusal(path, place, "the token stands in it for all to read; mount ~/.ray/auth_token by file_mounts")
            host = _WIDE_DASHBOARD.search(command)
            if host and not is_loopback(host[1]):
                raise refusal(
                    path, place, f"--dashboard-host {host[1]} lets others reach the job server; give 127.0.0.1, and use "
                    f"`ray dashboard {path.name}` from outside"
                )  # fmt: skip
    if config["provider"]["type"] == "local" and is_loopback(config["provider"]["head_ip"]):
        return
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(key, ()) if "ray start" in command]
        if not any("RAY_AUTH_MODE=token" in command for command in starts):
            raise refusal(
                path, key, "Ray is started without RAY_AUTH_MODE=token, and whoever reaches its port could run code there; write "
                "`export RAY_AUTH_MODE=token; ray start ...`"
            )  # fmt: skip


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.fullmatch(text) is not None and not text.replace(".", "").isdigit()  # no mistyped address
    return True
