"""`NAME.settings.yaml` beside a cluster file: what a sweep wants of the cluster. Ray refuses such keys in its own file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from hamu.cli.security import check_url
from hamu.errors import ConfigError
from hamu.storage.mount import is_url
from launch.cluster_yaml import load_yaml, nearest, refusal, settings_path

AUTO = "auto"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(?:^|_)KEY(?:$|_)|APIKEY", re.IGNORECASE)
PLACES_OF_A_NODE = ("/tmp", "/var/tmp", "/dev", "/run", "/proc", "/sys")
"""Folders that each machine has of its own."""

SHARED_ROOT = "give a folder that all nodes mount, such as /shared/hamu, or a URL such as s3://bucket/hamu"
"""The mend of an artifact root that is of one node."""

_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node has that the cluster file cannot say. None: not said. gpu_memory_gib: of one GPU."""

    cpus: int | None = None
    gpus: int | None = None
    gpu_name: str | None = None
    gpu_memory_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """What is ours of a cluster.

    gpus_per_worker: GPUs of each process of a trial: 0, a share up to 1, a whole number, or "auto" (by the memory estimate).
    cpus_per_worker: cores of each. max_concurrent: trials at once. storage_path: artifact root, a folder or URL that every node
    reaches. environment: for the sweep and its trials; nothing secret. secrets_file: KEY=VALUE lines, mode 600, on the machine
    that the sweep runs on. python: interpreter of a job there. working_dir: folder that a job is sent with (default: the
    repository). address: of Ray's head, host:port. dashboard: URL that jobs are sent to. nodes, head: what a node has, for
    providers whose file does not say it; head: where it differs. None: not said.
    """

    gpus_per_worker: float | str | None = None
    cpus_per_worker: int | None = None
    max_concurrent: int | None = None
    storage_path: str | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    secrets_file: str | None = None
    python: str | None = None
    working_dir: str | None = None
    address: str | None = None
    dashboard: str | None = None
    nodes: NodeFacts = NodeFacts()
    head: NodeFacts | None = None


def read_settings(cluster_file: Path) -> ClusterSettings:
    """The settings beside a cluster file; all defaults where there is no such file.

    Raises:
        ConfigError: an unknown key, a value out of range, or a secret in it.
    """
    path = settings_path(cluster_file)
    if not path.exists():
        return ClusterSettings()
    found = load_yaml(path)
    _check_known(path, "", found, ClusterSettings)
    numbers: dict[str, Any] = {
        "gpus_per_worker": _gpus_per_worker(path, found.get("gpus_per_worker")),
        "cpus_per_worker": _whole(path, "cpus_per_worker", found.get("cpus_per_worker"), least=1),
        "max_concurrent": _whole(path, "max_concurrent", found.get("max_concurrent"), least=1),
    }
    texts: dict[str, Any] = {
        name: _text(path, name, found.get(name))
        for name in ("storage_path", "secrets_file", "python", "working_dir", "address", "dashboard")
    }
    _check_texts(path, texts)
    return ClusterSettings(
        **numbers,
        **texts,
        environment=_environment(path, found.get("environment")),
        nodes=_facts(path, "nodes", found.get("nodes")) or NodeFacts(),
        head=_facts(path, "head", found.get("head")),
    )


def check_storage(cluster_file: Path, storage_path: str | None, *, n_nodes: int) -> None:
    """Refuse an artifact root that only one of several nodes could read, or that holds a password.

    Raises:
        ConfigError: it is not given, relative, on a disk that each node has of its own, or a URL that must not be shown.
    """
    path, key = settings_path(cluster_file), "storage_path"
    if storage_path is None:
        if n_nodes > 1:
            raise refusal(path, key, f"it is missing, and up to {n_nodes} nodes must share one artifact root; {SHARED_ROOT}")
        return
    try:
        check_reached(storage_path, n_nodes=n_nodes)
    except ConfigError as error:
        raise refusal(path, key, str(error)) from None
    if n_nodes > 1 and not is_url(storage_path) and not storage_path.startswith("/"):
        raise refusal(path, key, f"{storage_path!r} is relative, so each of up to {n_nodes} nodes has its own; {SHARED_ROOT}")


def check_reached(root: str, *, n_nodes: int | None) -> None:
    """Refuse an artifact root that each node has of its own, or a URL with what must not be shown.

    n_nodes: at most; None: not known. On one node a folder of its own will do.

    Raises:
        ConfigError: as said; the message shows no password.
    """
    if is_url(root):
        check_url(root)
        parts = urlsplit(root)
        if parts.query:
            raise ConfigError(
                f"the URL {parts.scheme}://...{parts.path} has a query, which records and commands would show; give it without, "
                "and credentials as the store's own library reads them on each node (environment, role, or its own file)"
            )
    if n_nodes == 1:
        return
    if root.startswith("file:"):
        raise ConfigError(f"{root!r} is on a disk of one node; {SHARED_ROOT}")
    if any(Path(root).is_relative_to(place) for place in PLACES_OF_A_NODE):
        raise ConfigError(f"{root!r}: every node has its own {Path(*Path(root).parts[:2])}; {SHARED_ROOT}")


def looks_secret(name: str) -> bool:
    """Whether a variable of that name probably holds what must not be seen.

    >>> looks_secret("WANDB_API_KEY"), looks_secret("HF_TOKEN"), looks_secret("TOKENIZERS_PARALLELISM"), looks_secret("KEYBOARD")
    (True, True, False, False)
    """
    return bool(_SECRET.search(name.upper().replace("TOKENIZERS", "")))


def _check_known(path: Path, prefix: str, found: Mapping[str, Any], of: type) -> None:
    known = of.__dataclass_fields__  # type: ignore[attr-defined]
    for name in found:
        if name not in known:
            raise refusal(path, f"{prefix}{name}", f"no such setting; {nearest(name, known)}")


def _whole(path: Path, key: str, value: Any, *, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refusal(path, key, f"{value!r} is no whole number of {least} or more; give e.g. {max(least, 1)}, or leave it out")
    return value


def _gpus_per_worker(path: Path, value: Any) -> float | str | None:
    if value is None or value == AUTO:
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < float("inf") or (value > 1 and value != int(value)):
        raise refusal(
            path, "gpus_per_worker", f"{value!r} is neither 0, a share up to 1, a whole number nor {AUTO!r}; give e.g. 0.5 or 1"
        )
    return float(value)


def _text(path: Path, key: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise refusal(path, key, f"{value!r} is no text; give one, or leave it out")
    return value.strip()


def _check_texts(path: Path, texts: Mapping[str, str | None]) -> None:
    address, dashboard, secrets_file = texts["address"], texts["dashboard"], texts["secrets_file"]
    if address is not None and address != AUTO and not re.fullmatch(r"\S+:\d{1,5}", address):
        raise refusal(path, "address", f"{address!r} is no host:port; give that of Ray's head, such as 192.168.1.10:6379")
    if dashboard is not None and not re.match(r"https?://\S+$", dashboard):
        raise refusal(path, "dashboard", f"{dashboard!r} is no URL; give e.g. http://127.0.0.1:8265")
    if dashboard is not None and "@" in dashboard:
        raise refusal(path, "dashboard", "there is a user name or password in it; the token comes from ~/.ray/auth_token alone")
    if secrets_file is not None and not secrets_file.startswith(("/", "~")):
        raise refusal(path, "secrets_file", f"{secrets_file!r} is relative to nothing in a job; give a path with / or ~ in front")


def _environment(path: Path, value: Any) -> Mapping[str, str]:
    if value is None:
        return _NOTHING
    if not isinstance(value, dict):
        raise refusal(path, "environment", f"{value!r} is no mapping; write lines of NAME: value under it")
    found: dict[str, str] = {}
    for name, given in value.items():
        key = f"environment.{name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise refusal(path, key, "that is no name of a variable; use letters, digits and _")
        if looks_secret(name):  # the value is not repeated: this is what must not be seen
            raise refusal(
                path, key, "a secret does not stand in a settings file, which is shared and shown; put the line "
                f"{name}=... into a file of mode 600 and name that as secrets_file"
            )  # fmt: skip
        if name.startswith("RAY_AUTH"):
            raise refusal(path, key, "authentication is not set per job; see security in the README")
        if isinstance(given, bool) or not isinstance(given, (str, int, float)):
            raise refusal(path, key, f"{given!r} is no text; put it in quotes")
        found[name] = str(given)
    return MappingProxyType(found)


def _facts(path: Path, key: str, value: Any) -> NodeFacts | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise refusal(path, key, f"{value!r} is no mapping; write e.g. {key}: {{cpus: 32, gpus: 4}}")
    _check_known(path, f"{key}.", value, NodeFacts)
    memory = value.get("gpu_memory_gib")
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, (int, float)) or not 0 < memory < 10_000):
        raise refusal(path, f"{key}.gpu_memory_gib", f"{memory!r} is no number of GiB; give that of one GPU, such as 40")
    return NodeFacts(
        cpus=_whole(path, f"{key}.cpus", value.get("cpus"), least=1),
        gpus=_whole(path, f"{key}.gpus", value.get("gpus"), least=0),
        gpu_name=_text(path, f"{key}.gpu_name", value.get("gpu_name")),
        gpu_memory_gib=None if memory is None else float(memory),
    )
