"""A cluster as a sweep sees it: where it is, how many nodes of which kind, and what is ours to say about it.

    read_cluster(Path("launch/clusters/onprem.yaml"))

reads a file of Ray's cluster launcher (`ray up`) or a KubeRay RayJob, and NAME.settings.yaml beside it. Nothing is contacted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hamu.cli.security import is_loopback
from hamu.errors import ConfigError
from launch.cluster_settings import ClusterSettings, NodeFacts, check_storage, read_settings
from launch.cluster_yaml import ask_ray, check_schema, load_yaml, refusal, settings_path
from launch.kuberay import is_kubernetes, read_rayjob
from launch.launcher_checks import RAY_PORT, check_launcher, filled_resources, instance_name, max_workers
from launch.machine import Machine, Slots, this_machine
from launch.node_types import node_type

AUTO = "auto"
DASHBOARD = "http://127.0.0.1:8265"
_GIB = 2**30


class Span(NamedTuple):
    """A number at the cluster's smallest and at its largest."""

    minimum: int
    maximum: int

    def describe(self, unit: str) -> str:
        """In a few words, such as "1 to 5 nodes"."""
        plural = unit + "s" * (self.maximum != 1)
        return f"{self.maximum} {plural}" if self.minimum == self.maximum else f"{self.minimum} to {self.maximum} {plural}"


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Nodes of one kind. minimum, maximum: how many of them there are; the head counts as one of its group.

    cpus, gpus: that Ray gives to trials on each. gpu_memory_bytes: of one GPU; None: not known.
    """

    name: str
    cpus: int
    gpus: int = 0
    gpu_name: str | None = None
    gpu_memory_bytes: int | None = None
    minimum: int = 0
    maximum: int = 0
    is_head: bool = False

    def describe(self) -> str:
        """In a few words, for a terminal."""
        gpus = f", {self.gpus} x {self.gpu_name or 'GPU'}" if self.gpus else ""
        return f"{Span(self.minimum, self.maximum).describe('node')} {self.name}: {self.cpus} cores{gpus}"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster file and its settings say.

    Attributes:
        path: of the cluster file.
        name: of the cluster.
        provider: "local", "aws", "gcp", "kuberay", ...
        address: host:port of Ray's head; "auto": the cluster whose node the sweep runs on, as the head has no address before it
            is up; None: this machine, with a Ray of the sweep's own.
        dashboard: URL that jobs are sent to; None: nowhere, as it is this machine. On the loopback it is the near end of a
            tunnel (`ray dashboard FILE`).
        groups: kinds of nodes, the head's first.
        most_nodes: as many at once as the cluster may have; less than the groups' maxima where the file limits their sum.
        settings: ours.
    """

    path: Path
    name: str
    provider: str
    address: str | None
    dashboard: str | None
    groups: tuple[NodeGroup, ...]
    most_nodes: int
    settings: ClusterSettings

    @property
    def is_this_machine(self) -> bool:
        """Whether it is no cluster at all: the sweep starts a Ray of its own here."""
        return self.address is None

    @property
    def n_nodes(self) -> Span:
        """Nodes."""
        return Span(len(self.nodes(at_most=False)), len(self.nodes()))

    @property
    def n_cpus(self) -> Span:
        """Cores for trials."""
        return Span(*(sum(node.cpus for node in self.nodes(at_most=most)) for most in (False, True)))

    @property
    def n_gpus(self) -> Span:
        """GPUs."""
        return Span(*(sum(node.gpus for node in self.nodes(at_most=most)) for most in (False, True)))

    def nodes(self, *, at_most: bool = True) -> tuple[NodeGroup, ...]:
        """One entry a node, of its group: those that are always there, or all there can be, the largest kind added first."""
        found = [group for group in self.groups for _ in range(group.minimum)]
        for group in sorted(self.groups, key=lambda each: (-each.gpus, -each.cpus)) if at_most else ():
            found += [group] * min(group.maximum - group.minimum, self.most_nodes - len(found))
        return tuple(found)


def read_cluster(path: str | Path) -> Cluster:
    """Read a cluster file and the settings beside it, and check both. Contacts nothing.

    Raises:
        ConfigError: it names the file, the key and the mend.
    """
    path = Path(path).expanduser()
    if path.name.endswith(".settings.yaml"):
        cluster_file = path.name.replace(".settings", "")
        raise refusal(path, "", f"these are the settings beside a cluster file; give {path.with_name(cluster_file)}")
    config = load_yaml(path)
    settings = read_settings(path)
    if is_kubernetes(config):
        cluster = _of_rayjob(path, config, settings)
    else:
        config = filled_resources(path, config)
        check_schema(path, config)
        check_launcher(path, config)
        ask_ray(path, config)
        cluster = _of_launcher(path, config, settings)
    check_storage(path, settings.storage_path, n_nodes=cluster.n_nodes.maximum)
    return cluster


def cluster_machine(cluster: Cluster, *, at_most: bool = True) -> Machine:
    """The nodes added up, as the planning of a sweep sees a machine; `nodes` says what each of them has.

    at_most: all the nodes that there can be; else those that are always there.
    """
    if cluster.is_this_machine:
        return this_machine(os.environ)
    nodes = cluster.nodes(at_most=at_most)
    with_gpus = [node for node in nodes if node.gpus]
    names = list(dict.fromkeys(node.gpu_name or "GPU" for node in with_gpus))
    memory = [node.gpu_memory_bytes for node in with_gpus if node.gpu_memory_bytes is not None]
    return Machine(
        cpus=sum(node.cpus for node in nodes),
        cpu_name=Span(len(nodes), len(nodes)).describe("node"),
        memory_bytes=0,  # not said in a cluster file
        gpus=sum(node.gpus for node in nodes),
        gpu_name=" or ".join(names) if names else None,
        gpu_memory_bytes=min(memory) if memory and len(memory) == len(with_gpus) else None,
        nodes=tuple((node.cpus, node.gpus) for node in nodes),
    )


def with_cores(slots: Slots, machine: Machine, cpus_per_worker: int | None) -> Slots:
    """Slots whose workers have as many cores each as the settings ask for, and so many of them as the nodes hold.

    Raises:
        ConfigError: no node has that many cores.
    """
    if cpus_per_worker is None or cpus_per_worker == slots.cpus_per_worker:
        return slots
    nodes = machine.nodes or ((machine.cpus, machine.gpus),)
    gpus = slots.gpus_per_worker
    held = 0
    for cpus, of_node in nodes:
        by_cores = cpus // cpus_per_worker
        by_gpus = by_cores if gpus == 0 else of_node * int(1 / gpus + 1e-9) if gpus <= 1 else of_node // int(gpus)
        # The workers of a split trial may lie on several nodes; one process may not.
        held += min(by_cores, by_gpus)
    fitting = held // slots.workers_per_trial
    if fitting < 1:
        most = max(cpus for cpus, _ in nodes)
        raise ConfigError(
            f"cpus_per_worker {cpus_per_worker}: nodes of up to {most} cores hold {held} workers of that, and a trial has "
            f"{slots.workers_per_trial}; give less"
        )
    return replace(slots, count=min(slots.count, fitting), cpus_per_trial=cpus_per_worker * slots.workers_per_trial)


def _of_launcher(path: Path, config: Mapping[str, Any], settings: ClusterSettings) -> Cluster:
    provider = config["provider"]
    kind = provider["type"]
    groups = _local_groups(path, provider, settings) if kind == "local" else _typed_groups(config)
    is_here = kind == "local" and is_loopback(provider["head_ip"]) and not provider["worker_ips"]
    address = settings.address or (None if is_here else f"{provider['head_ip']}:{_port(config)}" if kind == "local" else AUTO)
    head = groups[0]
    if is_here and settings.address is None:
        machine = this_machine(os.environ)
        head = replace(
            head, cpus=machine.cpus, gpus=machine.gpus, gpu_name=machine.gpu_name, gpu_memory_bytes=machine.gpu_memory_bytes
        )
    return Cluster(
        path=path,
        name=config["cluster_name"],
        provider=kind,
        address=address,
        dashboard=settings.dashboard or (None if address is None else DASHBOARD),
        groups=(head, *groups[1:]),
        most_nodes=1 + max_workers(config),
        settings=settings,
    )


def _of_rayjob(path: Path, config: Mapping[str, Any], settings: ClusterSettings) -> Cluster:
    job = read_rayjob(path, config, settings)
    facts = settings.nodes
    groups = tuple(
        NodeGroup(
            name=each.name, cpus=each.cpus, gpus=each.gpus, minimum=each.minimum, maximum=each.maximum, is_head=each.is_head,
            gpu_name=facts.gpu_name if each.gpus else None, gpu_memory_bytes=_memory(facts) if each.gpus else None,
        )
        for each in job.groups
    )  # fmt: skip
    return Cluster(
        path=path,
        name=job.name,
        provider="kuberay",
        address=settings.address or AUTO,
        dashboard=settings.dashboard or DASHBOARD,
        groups=groups,
        most_nodes=sum(group.maximum for group in groups),
        settings=settings,
    )


def _local_groups(path: Path, provider: Mapping[str, Any], settings: ClusterSettings) -> tuple[NodeGroup, ...]:
    """The machines of provider local: their cores and GPUs stand in the settings, as Ray finds them only when it starts there."""
    workers = provider["worker_ips"]
    is_here = is_loopback(provider["head_ip"]) and not workers
    facts, head = settings.nodes, settings.head or settings.nodes
    if not is_here:
        for key, each in (("nodes", facts), ("head", head)):
            if each.cpus is None or each.gpus is None:
                raise refusal(
                    settings_path(path), key, "the file of provider local does not say what a machine has; write "
                    f"{key}: {{cpus: 32, gpus: 4}}, with the cores and GPUs of each"
                )  # fmt: skip
    elif settings.head is not None or (settings.nodes != NodeFacts()):
        key = "nodes" if settings.nodes != NodeFacts() else "head"
        raise refusal(settings_path(path), key, "the cluster is this machine, whose cores and GPUs are counted; leave it out")
    kinds = [("head", head, 1, True), *([("worker", facts, len(workers), False)] if workers else [])]
    return tuple(
        NodeGroup(
            name=name, cpus=each.cpus or 1, gpus=each.gpus or 0, gpu_name=each.gpu_name, gpu_memory_bytes=_memory(each),
            minimum=count, maximum=count, is_head=is_head,
        )
        for name, each, count, is_head in kinds
    )  # fmt: skip


def _typed_groups(config: Mapping[str, Any]) -> tuple[NodeGroup, ...]:
    head_name, limit = config["head_node_type"], max_workers(config)
    groups = []
    for name, each in config["available_node_types"].items():
        is_head = name == head_name
        known = node_type(instance_name(each))
        cpus, gpus = each["resources"].get("CPU", 0), each["resources"].get("GPU", 0)
        minimum = each.get("min_workers", 0)
        maximum = min(each.get("max_workers", 0 if is_head else limit), limit)
        groups.append(
            NodeGroup(
                name=name, cpus=cpus, gpus=gpus, is_head=is_head, minimum=minimum + is_head, maximum=maximum + is_head,
                gpu_name=known.gpu_name if known and gpus else None,
                gpu_memory_bytes=known.gpu_memory_bytes if known and gpus else None,
            )
        )  # fmt: skip
    return tuple(sorted(groups, key=lambda group: not group.is_head))


def _port(config: Mapping[str, Any]) -> int:
    """The port that the head is told to listen on."""
    for command in config.get("head_start_ray_commands", ()):
        if "ray start" in command and (match := re.search(r"--port[= ](\d+)", command)):
            return int(match[1])
    return RAY_PORT


def _memory(facts: NodeFacts) -> int | None:
    return None if facts.gpu_memory_gib is None else int(facts.gpu_memory_gib * _GIB)
