"""What a submission refuses before anything is contacted: flags of the sweep, its trials, and where it would keep its results."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hamu.cli.environment import SETTINGS_BY_NAME, TEXT_NAMES
from hamu.errors import ConfigError
from hamu.storage.mount import is_url
from hamu.tasks.catalog import modality_of
from hamu.training.inputs import is_local_path
from launch.checks import check_model_name, check_references
from launch.cluster import Cluster, cluster_machine
from launch.cluster_checks import check_asks
from launch.cluster_settings import SHARED_ROOT, check_reached
from launch.flags import AUTO, DEFAULT_SPACE, gpu_share, parse
from launch.machine import choose_slots
from launch.pairing import pairing_of
from launch.part import read_part
from launch.plan import Plan
from launch.prepare import new_plan
from launch.scheduling import check_schedule
from launch.search_checks import check_search
from tune_spaces.space import find_space

_NOT_SENT = frozenset({"RAY_ADDRESS", "ARTIFACT_ROOT"})  # the cluster's own; a flag says it instead
_HERE_ONLY = {
    "list": "it lists spaces, for which no cluster is needed; run python launch/sweep.py --list",
    "dry_run": "put it before the --, and nothing is contacted",
    "cluster": "put it before the --",
    "address": "the job joins the cluster that it runs on; put --cluster or --address before the --",
    "dashboard": "the cluster has one already; leave it out",
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A sweep that was looked at.

    flags: of sweep.py as they will be run, with the name and the artifact root in them. n_trials: None where the sweep is on the
    cluster already (`--resume`). environment: names of the published scripts that are set here and count there.
    """

    flags: tuple[str, ...]
    name: str
    space: str
    n_trials: int | None
    storage: str
    is_resumed: bool
    environment: Mapping[str, str]


def check_sweep(
    flags: Sequence[str], *, environment: Mapping[str, str], storage: str | None = None, cluster: Cluster | None = None
) -> Asked:
    """Look at a sweep that is to run elsewhere: as `sweep.py` would, less what only that machine can tell.

    Args:
        flags: of sweep.py.
        environment: of this process.
        storage: artifact root of a site's settings, where there is no cluster file; a flag of the sweep goes before it,
            ARTIFACT_ROOT behind.
        cluster: to run it; its settings stand where no flag says otherwise. None: not known, and no plan is held against it.

    Raises:
        HamuError: one line with the value, the rule and the mend.
    """
    args = parse(list(flags), "The flags of python launch/sweep.py, which stand behind the -- of python launch/submit.py.")
    for name, mend in _HERE_ONLY.items():
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} behind the --: {mend}")
    of_settings = cluster.settings.storage_path if cluster else storage
    root = args.storage_path or of_settings or environment.get("ARTIFACT_ROOT", "").strip() or None
    root = check_place(root, n_nodes=cluster.n_nodes.maximum if cluster else None)
    more = [] if args.storage_path else ["--storage-path", root]
    if args.resume is not None:
        space = find_space(args.space, args.task) if args.space else ""
        return Asked(
            flags=(*flags, *more), name=args.resume, space=space, n_trials=None, storage=root, is_resumed=True, environment={}
        )
    if args.name is None:
        wanted = find_space(args.space or (None if args.task else DEFAULT_SPACE), args.task)
        args.name = f"{wanted.rpartition('/')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
        more += ["--name", args.name]
    with tempfile.TemporaryDirectory(prefix="hamu-plan-") as place:  # the root is the cluster's, and may not be here
        plan = new_plan(args, Path(place))
    check_here(plan)
    if args.part is not None:
        plan = read_part(args.part).plan(plan)
    if cluster is not None:
        _check_fits(args, plan, cluster)
    return Asked(
        flags=(*flags, *more), name=plan.name, space=plan.space, n_trials=plan.n_to_run, storage=root, is_resumed=False,
        environment=environment_to_send(environment),
    )  # fmt: skip


def check_here(plan: Plan) -> None:
    """Check of a plan what can be told on another machine than the one that runs it: local data and models are not looked for.

    Raises:
        HamuError: as said.
    """
    pairing_of(plan)
    check_references(plan)
    seen = set()
    for config in plan.configs.values():
        data, name = config.data, config.run.model_name
        if (key := (data.dataset_name, data.forget_class, name)) in seen:
            continue
        seen.add(key)
        if not is_local_path(data.dataset_name):
            modality_of(config).check_rows(config)
        check_model_name(name, modality_of(config).models)
    check_schedule(plan)
    check_search(plan)


def check_place(root: str | None, *, n_nodes: int | None = None) -> str:
    """The artifact root of a job, if others will find there what it leaves.

    n_nodes: of the cluster; on one node a folder of its own will do.

    Raises:
        ConfigError: there is none, it is relative, a password stands in it, or each node has its own.
    """
    if root is None:
        why = "no artifact root: a job's working directory is thrown away"
        raise ConfigError(f"{why}; {SHARED_ROOT}, as --storage-path behind the --")
    if not is_url(root) and not root.startswith("/"):
        why = f"--storage-path {root!r} is relative to the job's working directory, which is thrown away"
        raise ConfigError(f"{why}; {SHARED_ROOT}")
    try:
        check_reached(root, n_nodes=n_nodes)
    except ConfigError as error:
        raise ConfigError(f"--storage-path: {error}") from None
    return root


def environment_to_send(environment: Mapping[str, str]) -> dict[str, str]:
    """The names of the published scripts that are set here: the same command means the same there."""
    names = [name for name in (*SETTINGS_BY_NAME, *TEXT_NAMES) if name not in _NOT_SENT]
    return {name: environment[name].strip() for name in names if environment.get(name, "").strip()}


def _check_fits(args: argparse.Namespace, plan: Plan, cluster: Cluster) -> None:
    """Refuse trials that no node could run."""
    pairing, settings = pairing_of(plan), cluster.settings
    asked, _ = gpu_share(args, pairing)
    check_asks(cluster, pairing, AUTO if args.gpus_per_worker == AUTO else asked and asked / pairing.n_workers)
    if args.gpus is None and args.gpus_per_worker is None and settings.gpus_per_worker is not None:
        args.gpus_per_worker = str(settings.gpus_per_worker)
    gpus, shares = gpu_share(args, pairing)
    choose_slots(
        cluster_machine(cluster),
        n_trials=plan.n_to_run,
        max_concurrent=args.max_concurrent or settings.max_concurrent,
        gpus=gpus,
        pairing=pairing,
        shares_gpus=shares,
    )
