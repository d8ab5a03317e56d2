"""Joins the Ray cluster that a sweep was told to use: what it has, and the proof that its nodes share the artifact root."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hamu.cli.ray_environment import temporary_folder, tune_folder, worker_environment
from hamu.cli.security import check_token
from hamu.errors import ConfigError
from hamu.storage.mount import fetch, is_url, mount, publish, remove, shown, url_of
from hamu.training.ray_workers import check_address, found_address
from launch.cluster import Cluster, cluster_machine
from launch.machine import Machine
from launch.place import Place
from launch.words import Words
from launch.working_dir import staged

_PROOF_S = 120.0
_MOST_NODES = 1000  # of a group without a limit
_NODES_S = 1800.0


@contextlib.contextmanager
def joined(place: Place, *, repository: Path, words: Words, offline: Mapping[str, str]) -> Iterator[Machine]:
    """Join a cluster, wait for as many nodes as were asked for, give what they have (or what there can be, where nodes are
    added when they are asked for), and leave it running.

    The cluster's processes get this repository's code: from the job that this is, else sent along.

    Args:
        place: of the sweep.
        repository: the folder of `hamu`, `tune_spaces` and `launch`.
        words: told while it takes long.
        offline: environment of workers for models of the hub, where there are some.

    Raises:
        ConfigError: nothing answers there, or too few nodes come.
    """
    assert place.address is not None
    address = found_address(place.address)
    check_token(address, os.environ, Path.home())
    check_address(address)
    of_cluster = dict(place.cluster.settings.environment) if place.cluster is not None else {}
    with contextlib.ExitStack() as stack:
        runtime_env: dict[str, Any] = {"env_vars": {**worker_environment(), **of_cluster, **offline}}
        if place.is_job:
            os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # else Ray refuses a name that the job was given too
        else:
            runtime_env["working_dir"] = str(stack.enter_context(staged(repository)))
        with words.busy(f"joining the Ray cluster at {address}"):
            try:
                ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, configure_logging=False)
            except (OSError, ValueError, RuntimeError) as error:
                text = " ".join(str(error).split())
                raise ConfigError(
                    f"no Ray cluster at {address!r} that takes this process ({text}); give that cluster's own token "
                    "(RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH), and run this on one of its machines, or send it there with "
                    "python launch/submit.py"
                ) from error
        stack.callback(shutil.rmtree, tune_folder(), ignore_errors=True)
        stack.callback(ray.shutdown)
        if place.n_nodes is not None:
            _wait_for_nodes(place.n_nodes, words)
        live = machine_of(alive_nodes())
        yield largest(live, *_said_by(place.cluster), *_announced())


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that answer, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def machine_of(nodes: list[dict[str, Any]]) -> Machine:
    """All that some nodes have, as one machine whose `nodes` says where it lies."""
    resources = [node["Resources"] for node in nodes]
    kinds = sorted({key.partition(":")[2] for each in resources for key in each if key.startswith("accelerator_type:")})
    parts = tuple((int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources)
    return Machine(
        cpus=sum(cpus for cpus, _ in parts),
        cpu_name=f"{len(nodes)} node{'s' * (len(nodes) != 1)} of a Ray cluster",
        memory_bytes=int(sum(each.get("memory", 0) for each in resources)),
        gpus=sum(gpus for _, gpus in parts),
        gpu_name=", ".join(kinds) or None,
        nodes=parts,
    )


def largest(live: Machine, *planned: Machine) -> Machine:
    """What to plan for: what a cluster can grow to, where it grows with what is asked of it, else what it has.

    Args:
        live: of the nodes that are there.
        planned: what a cluster file, or Ray's own record of it, says that there can be.
    """
    for machine in planned:
        if (machine.gpus, machine.cpus) > (live.gpus, live.cpus):
            return machine
    return live


def _said_by(cluster: Cluster | None) -> list[Machine]:
    """What a cluster file says that there can be; nothing where it has no nodes to add."""
    if cluster is None or cluster.is_this_machine or cluster.n_nodes.minimum == cluster.n_nodes.maximum:
        return []
    return [cluster_machine(cluster)]


def _announced() -> list[Machine]:
    """What the cluster can grow to, as its autoscaler has told Ray; nothing where there is none."""
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = [] if config is None else list(config.node_group_configs)
    nodes = [{"Resources": dict(group.resources)} for group in groups for _ in range(min(group.max_count, _MOST_NODES))]
    return [machine_of(nodes)] if nodes else []


def prove_root(root: Path, words: Words) -> None:
    """Have every node read what this process writes into the artifact root, and this process what they write.

    Raises:
        ConfigError: a node does not see it; the message names the node.
    """
    url, name, text = url_of(root), f".seen-{secrets.token_hex(6)}", secrets.token_hex(8)
    root.mkdir(parents=True, exist_ok=True)
    nodes, remote = alive_nodes(), cast(Any, ray.remote)(_answer)
    replies = {node["NodeID"]: root / f"{name}-{node['NodeID'][:12]}" for node in nodes}
    with words.busy(f"looking at {shown(root)} from {len(nodes)} node{'s' * (len(nodes) != 1)}"):
        try:
            (root / name).write_text(text)
            publish(root / name)
            tasks = {
                node["NodeID"]: remote.options(
                    num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), max_retries=1
                ).remote(url or str(root), name, replies[node["NodeID"]].name)
                for node in nodes
            }
            deadline = time.monotonic() + _PROOF_S
            for node in nodes:
                seen = _result(tasks[node["NodeID"]], deadline - time.monotonic())
                fetch(replies[node["NodeID"]])
                is_answered = replies[node["NodeID"]].exists() and replies[node["NodeID"]].read_text() == text
                if seen != text or not is_answered:
                    why = f" ({seen})" if seen != text and seen else ""
                    raise ConfigError(
                        f"--storage-path {shown(root)}: node {node['NodeManagerAddress']} does not share it with this one{why}; "
                        "give a folder on storage that all nodes mount at the same path, or a URL such as s3://bucket/hamu"
                    )
        finally:
            for path in (root / name, *replies.values()):
                with contextlib.suppress(OSError):
                    remove(path)


def _answer(root: str, name: str, reply: str) -> str:
    """On a node: read what the driver has written, and write it back beside it."""
    place = mount(root, temporary_folder() / "stores") if is_url(root) else Path(root)
    if not place.is_dir() and not is_url(root):
        return "no such folder there"
    fetch(place / name)
    text = (place / name).read_text() if (place / name).exists() else ""
    (place / reply).write_text(text)
    publish(place / reply)
    return text or "it is another folder there"


def _result(task: Any, timeout_s: float) -> str:
    try:
        return str(ray.get(task, timeout=max(1.0, timeout_s)))
    except ray.exceptions.GetTimeoutError:
        return f"no answer within {_PROOF_S:.0f} s"
    except ray.exceptions.RayError as error:
        return " ".join(str(error).split())[-300:]


def _wait_for_nodes(n_nodes: int, words: Words) -> None:
    deadline = time.monotonic() + _NODES_S
    said = -1
    while (found := len(alive_nodes())) < n_nodes:
        if found != said:
            words.say(f"{found} of {n_nodes} nodes are there; waiting for the others")
            said = found
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--wait-for-nodes {n_nodes}: {found} came within {_NODES_S / 60:.0f} minutes; start the others with `ray start "
                "--address`, or ask for fewer"
            )
        time.sleep(1.0)
