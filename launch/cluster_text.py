"""A cluster in words: what `--dry-run --cluster FILE` prints above the plan. Nothing is contacted."""

from __future__ import annotations

from hamu.errors import ConfigError
from launch.cluster import Cluster, cluster_machine, with_cores
from launch.cluster_settings import AUTO
from launch.machine import Slots, choose_slots
from launch.pairing import pairing_of
from launch.plan import Plan

__all__ = ["cluster_machine", "cluster_text", "count_at_minimum"]


def count_at_minimum(cluster: Cluster, slots: Slots, plan: Plan) -> int:
    """Trials at once on the nodes that are always there; 0 where they begin only when nodes have been added.

    slots: as planned for all the nodes that there can be.
    """
    machine = cluster_machine(cluster, at_most=False)
    if machine.cpus == 0 or (slots.gpus_per_trial and machine.gpus == 0):
        return 0
    pairing = pairing_of(plan)
    share = (None if pairing.is_split else slots.gpus_per_trial) if slots.gpus_per_trial else 0.0
    try:
        least = choose_slots(machine, n_trials=plan.n_to_run, gpus=share, pairing=pairing)
        least = with_cores(least, machine, cluster.settings.cpus_per_worker)
    except ConfigError:
        return 0
    return min(least.count, slots.count)


def cluster_text(cluster: Cluster, *, plan: Plan, slots: Slots) -> str:
    """What the cluster is, and what a sweep gets of it.

    Args:
        cluster: as read.
        plan: of the sweep.
        slots: for all the nodes that the cluster may have.
    """
    ours = cluster.settings
    least = count_at_minimum(cluster, slots, plan)
    lines = [f"cluster    {cluster.name} ({cluster.provider}), {cluster.path}", f"address    {_address(cluster)}"]
    lines += [f"nodes      {group.describe()}" for group in cluster.groups if group.maximum]
    gpus = f", {cluster.n_gpus.describe('GPU')}" if cluster.n_gpus.maximum else ", no GPU"
    lines.append(f"in all     {cluster.n_nodes.describe('node')}, {cluster.n_cpus.describe('core')}{gpus}")
    fraction = f"{slots.gpus_per_worker:g} GPU" if slots.gpus_per_trial else "no GPU"
    by = " (or less, by the memory that a trial should need)" if ours.gpus_per_worker == AUTO and slots.gpus_per_trial else ""
    cores = slots.cpus_per_worker
    lines.append(f"a trial    {_count(slots.workers_per_trial, 'worker')}, each with {_count(cores, 'core')} and {fraction}{by}")
    at_once = f"{slots.count}" if least == slots.count else f"{least} at the fewest nodes, {slots.count} at the most"
    begins = "; trials begin when nodes have been added" if least == 0 else ""
    lines.append(f"at once    {at_once}{begins}")
    lines.append(f"storage    {ours.storage_path or 'as --storage-path says'}")
    if ours.environment:
        lines.append(f"variables  {', '.join(sorted(ours.environment))}")
    if ours.secrets_file:
        lines.append(f"secrets    from {ours.secrets_file} there, mode 600; sent nowhere")
    lines.append(f"jobs       {_jobs(cluster)}")
    return "\n".join(lines)


def _address(cluster: Cluster) -> str:
    if cluster.address is None:
        return "this machine, a Ray of the sweep's own"
    return "of the head, once it is up" if cluster.address == AUTO else cluster.address


def _jobs(cluster: Cluster) -> str:
    if cluster.dashboard is None:
        return "none needed: python launch/sweep.py runs here"
    if cluster.provider == "kuberay":
        how = f"kubectl apply -f {cluster.path}; or, by kubectl port-forward, "
    elif cluster.settings.dashboard is None:
        how = f"with `ray dashboard {cluster.path}` running, "
    else:
        how = ""
    return f"{how}python launch/submit.py --cluster {cluster.path} to {cluster.dashboard}"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"
