"""Whether a cluster can run a sweep, and whether its file has been filled in."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launch.cluster_settings import AUTO
from launch.cluster_yaml import load_yaml, refusal, settings_path
from launch.pairing import Pairing

if TYPE_CHECKING:
    from launch.cluster import Cluster

_EXAMPLE = re.compile(r"\bexample\b|\bexample[-.]|[-.]example\b", re.IGNORECASE)
_EXAMPLE_NETWORKS = tuple(map(ipaddress.ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")))


def check_asks(cluster: Cluster, pairing: Pairing, gpus_per_worker: float | str | None = None) -> None:
    """Refuse a sweep whose trials no node of the cluster could run.

    Args:
        cluster: as read.
        pairing: of the sweep's trials.
        gpus_per_worker: of the flags; None: as the settings say.

    Raises:
        ConfigError: with the file, the key and the mend.
    """
    of_settings = cluster.settings.gpus_per_worker
    asked, path, key = gpus_per_worker, cluster.path, "--gpus-per-worker"
    if asked is None or asked == of_settings:
        asked, path, key = of_settings, settings_path(cluster.path), "gpus_per_worker"
    if pairing.is_split and asked is not None and asked not in (0, 1):
        raise refusal(
            path, key, f"{asked}, and the sweep is split over {pairing.n_workers} workers a trial, each with a whole GPU (NCCL "
            "refuses two on one); give 1, or 0 for the cores, or --set gradient_pairing=sequential"
        )  # fmt: skip
    wanted = 1.0 if asked == AUTO or asked is None else float(asked)
    is_asked = asked is not None and wanted > 0
    most = max((node.gpus for node in cluster.nodes()), default=0)
    if is_asked and most == 0:
        alone = " and the head is the only node, without any" if cluster.n_nodes.maximum == 1 else ""
        raise refusal(
            path, key, f"{asked} for each worker, but no node of {cluster.name} has a GPU{alone}; give 0, or add nodes with GPUs"
        )
    if is_asked and wanted > most:
        raise refusal(path, key, f"{wanted:g} GPUs for each worker, but no node has more than {most}; give at most {most}")
    if is_asked and pairing.is_split and cluster.n_gpus.maximum < pairing.n_workers:
        raise refusal(
            path, key, f"a trial of {pairing.n_workers} workers takes {pairing.n_workers} GPUs, and the cluster has at most "
            f"{cluster.n_gpus.maximum}; raise max_workers, or --set num_workers={cluster.n_gpus.maximum // 2 * 2 or 2}"
        )  # fmt: skip
    cores = cluster.settings.cpus_per_worker
    most_cores = max((node.cpus for node in cluster.nodes()), default=0)
    if cores is not None and cores > most_cores:
        raise refusal(
            settings_path(cluster.path), "cpus_per_worker", f"{cores}, but no node has more than {most_cores} cores; "
            f"give at most {most_cores}"
        )  # fmt: skip


def check_filled_in(cluster: Cluster) -> None:
    """Refuse example values that a user has to replace, before the file is used for more than a dry run.

    Raises:
        ConfigError: the first one that is left, with its key.
    """
    ours = cluster.settings
    texts = {
        name: getattr(ours, name) for name in ("storage_path", "address", "dashboard", "secrets_file", "python", "working_dir")
    }
    for path, values in ((cluster.path, load_yaml(cluster.path)), (settings_path(cluster.path), texts)):
        for key, text in _texts("", values):
            if _EXAMPLE.search(text) or _is_example_address(text):
                raise refusal(path, key, f"{text!r} is an example; replace it by your own value")


def _texts(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [found for key, each in value.items() for found in _texts(f"{prefix}.{key}" if prefix else str(key), each)]
    if isinstance(value, (list, tuple)):
        return [found for i, each in enumerate(value) for found in _texts(f"{prefix}[{i}]", each)]
    return [(prefix, value)] if isinstance(value, str) else []


def _is_example_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text.rsplit(":", 1)[0] if text.count(":") == 1 else text)
    except ValueError:
        return False
    return any(address in network for network in _EXAMPLE_NETWORKS if address.version == network.version)
