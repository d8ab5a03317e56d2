"""Where the trials of a sweep run: a Ray of this process's own, or a cluster that a flag, a cluster file or a job names.

Imports no Ray: what is wrong is said before anything is contacted. `launch/joining.py` does the contacting.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from hamu.cli.ray_environment import temporary_folder
from hamu.cli.security import check_token, check_url, keep_secret, read_secrets
from hamu.errors import ConfigError, HamuError
from hamu.storage.mount import is_url, mount, shown
from hamu.training.inputs import is_local_path
from hamu.training.run_settings import ADDRESS
from launch.cluster import Cluster, read_cluster
from launch.cluster_checks import check_filled_in
from launch.cluster_settings import check_reached
from launch.plan import Plan

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the entrypoint of a submitted job."""

AUTO = "auto"
_ADDRESS = "RAY_ADDRESS"
_ROOT = "artifacts"
_ONE_SLASH = re.compile(r"([a-z][a-z0-9+]+):/?(?!/)")
_PATHS = ("model_name", "dataset_name", "forget_dataset_name", "duplicate_dataset_name", "test_dataset_name", "retain_reference")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sweep runs.

    address: of the Ray cluster to join, `host:port` or "auto"; None: a Ray of this process's own. is_job: this process is the
    entrypoint of a submitted job, in a copy of the repository that is thrown away. cluster: what a cluster file says.
    n_nodes: to wait for before the start; None: as many as are there.
    """

    address: str | None = None
    is_job: bool = False
    cluster: Cluster | None = None
    n_nodes: int | None = None

    @property
    def is_joined(self) -> bool:
        """Whether the cluster is somebody else's."""
        return self.address is not None


def find_place(args: argparse.Namespace, environment: Mapping[str, str]) -> Place:
    """Read where a sweep is to run: `--address`, `--cluster`, the job that this process is in, else this machine.

    A cluster that merely stands in RAY_ADDRESS is not joined: nobody has named it. What "auto" stands for is found out, and
    checked, by whoever joins it.

    Raises:
        ConfigError: the cluster file is wrong, or the cluster does not ask for a token though others reach it.
    """
    cluster = read_cluster(Path(args.cluster)) if args.cluster is not None else None
    is_job = JOB in environment
    address = args.address
    if address is None and is_job:
        address = environment.get(_ADDRESS) or AUTO
    if address is None and cluster is not None:
        address = cluster.address
    if args.wait_for_nodes is not None and address is None and not args.dry_run:
        raise ConfigError(f"--wait-for-nodes {args.wait_for_nodes}: a sweep on this machine alone has one; give --address too")
    if address is not None and not ADDRESS.fullmatch(address):
        raise ConfigError(f"--address {address!r}: it is host:port of the head's Ray, such as 10.0.0.1:6379, or auto")
    if cluster is not None and not args.dry_run:
        check_filled_in(cluster)
    if address not in (None, AUTO) and not args.dry_run:
        check_token(address, environment, Path.home())
    return Place(address=address, is_job=is_job, cluster=cluster, n_nodes=args.wait_for_nodes)


def root_of(args: argparse.Namespace, environment: Mapping[str, str], cluster: Cluster | None) -> Path:
    """The artifact root: of the flag, else of the cluster's settings, else of the environment, else `artifacts`.

    A URL becomes its mirror on this machine.

    Raises:
        ConfigError: the store cannot be used, or a password stands in the URL.
    """
    of_cluster = cluster.settings.storage_path if cluster is not None else None
    if args.storage_path is not None and not args.storage_path.strip():
        raise ConfigError("--storage-path '' is empty; give a folder or a URL, or leave the flag out")
    text = args.storage_path or of_cluster or environment.get("ARTIFACT_ROOT", "").strip() or _ROOT
    if (slash := _ONE_SLASH.match(text)) is not None:
        raise ConfigError(f"--storage-path {text!r} is no URL and hardly a folder; a URL is {slash[1]}://bucket/hamu")
    if cluster is not None and args.storage_path:
        check_reached(args.storage_path, n_nodes=cluster.n_nodes.maximum)
    if not is_url(text):
        return Path(text).expanduser()
    check_url(text)
    try:
        # A dry run contacts nothing, a store neither.
        return mount(text, temporary_folder() / "stores", asks_store=not args.dry_run)
    except HamuError:
        raise
    except Exception as error:  # of as many kinds as there are stores
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--storage-path {text}: the store does not answer ({type(error).__name__}: {why}); check the URL, the credentials "
            "and the endpoint as its own library reads them (s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        ) from None


def check_root(root: Path, place: Place) -> None:
    """Refuse a root that other nodes, or whoever looks when the job is over, will not find.

    Raises:
        ConfigError: a relative path where a cluster is joined, or one in the copy that a job runs in.
    """
    if not place.is_joined:
        return
    where = "the job's working directory, which is thrown away" if place.is_job else "the working directory of one machine"
    if not root.is_absolute():
        raise ConfigError(
            f"--storage-path {str(root)!r} is relative to {where}; give an absolute path on storage that all nodes share, "
            "or a URL such as s3://bucket/hamu"
        )
    if place.is_job and root.resolve().is_relative_to(Path.cwd().resolve()):
        raise ConfigError(f"--storage-path {shown(root)} lies in {where}; give a path on storage that all nodes share, or a URL")


def check_paths(plan: Plan, place: Place) -> None:
    """Refuse relative folders of models and data where workers have a working directory of their own.

    Raises:
        ConfigError: one is relative.
    """
    if not place.is_joined:
        return
    settings = [config.to_flat() for config in plan.configs.values()]
    for name, value in {(name, flat[name]) for flat in settings for name in _PATHS if name in flat}:
        if isinstance(value, str) and is_local_path(value) and not Path(value).expanduser().is_absolute():
            raise ConfigError(
                f"{name} {value!r} is relative to the working directory of one machine; on a cluster give an absolute path on "
                "storage that all nodes share, or a name on the hub"
            )


def take_settings(args: argparse.Namespace, cluster: Cluster, environment: MutableMapping[str, str]) -> None:
    """Let a cluster's settings stand where no flag says otherwise, and put its environment and its secrets into this process's.

    Raises:
        ConfigError: the secrets are readable by others, or a value does not fit.
    """
    settings = cluster.settings
    if args.max_concurrent is None:
        args.max_concurrent = settings.max_concurrent
    if args.gpus is None and args.gpus_per_worker is None and settings.gpus_per_worker is not None:
        args.gpus_per_worker = str(settings.gpus_per_worker)
    for name, value in settings.environment.items():
        environment.setdefault(name, value)
    if settings.secrets_file is not None and not args.dry_run:
        secrets = read_secrets(Path(settings.secrets_file))
        keep_secret(secrets)
        for name, value in secrets.items():
            environment.setdefault(name, value)
