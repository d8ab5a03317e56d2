"""Run a sweep: every trial of a space, on this machine or a Ray cluster, with a report at the end.

    python launch/sweep.py                                   digits/quickstart, about two minutes
    python launch/sweep.py --list
    python launch/sweep.py --space cifar/constraint_sweep --set dataset_name=../cifar10 --dry-run
    python launch/sweep.py --set method=hamu-q,gdiff --set lr=0.01,0.1 --name mine
    python launch/sweep.py --resume mine                                       finished trials do not run again
    python launch/sweep.py --resume mine --extend --set lr=0.2                 and some more
    python launch/sweep.py --space cifar/grid --scale small --seeds 41,42      on embedded data, in minutes
    python launch/sweep.py --set lr=0.005..0.08:9 --search tpe --trials 24 --until no-gain:10
    python launch/sweep.py --probe --prune-infeasible                          what the gradients allow, before and instead
    python launch/sweep.py --target "forget_accuracy<=retrained" --keep "retain_accuracy>=original-0.01"
    python launch/sweep.py --cluster launch/clusters/aws-a100.yaml --space cifar/grid --dry-run
    python launch/sweep.py --address auto --storage-path /shared/hamu          on a machine of a Ray cluster

From elsewhere a cluster is reached by `python launch/submit.py`, or `ray job submit`: inside a job this command joins the job's
cluster by itself. No other cluster is joined unless a flag names it.

Exit codes: 0 all trials ended without error, 1 some failed, 2 bad input, 128 + n stopped by signal n (resume it).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).resolve().parents[1]
# As a script, Python puts launch/ first on the path: its modules would hide others of their names.
sys.path[:] = [str(_ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (_ROOT, _ROOT / "launch"))]

from hamu.cli.ray_environment import prepare_environment  # noqa: E402
from hamu.cli.security import without_secrets  # noqa: E402
from hamu.errors import ConfigError, HamuError, LeaseError  # noqa: E402
from hamu.storage import files  # noqa: E402
from hamu.storage.mount import remove, shown  # noqa: E402
from launch.checks import is_on_hub, missing_models  # noqa: E402
from launch.cluster import cluster_machine, with_cores  # noqa: E402
from launch.cluster_checks import check_asks  # noqa: E402
from launch.flags import AUTO, gpu_share, parse  # noqa: E402
from launch.machine import Machine, Slots, choose_slots, this_machine  # noqa: E402
from launch.pairing import pairing_of  # noqa: E402
from launch.place import Place, find_place, root_of, take_settings  # noqa: E402
from launch.plan import said_once  # noqa: E402
from launch.plan_text import plan_text, spaces_text  # noqa: E402
from launch.prepare import Prepared, new_plan, prepare  # noqa: E402
from launch.signals import Interrupted, Signals  # noqa: E402
from launch.standing import left_words, resume_command, standing  # noqa: E402
from tune_spaces.space import find_space, list_spaces, load_space  # noqa: E402

if TYPE_CHECKING:
    import argparse

    from launch.words import Words


def run(
    prepared: Prepared,
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    is_joined: bool = False,
    **more: Any,
) -> int:
    """Run what was prepared; returns the exit code. more: of `launch.runner.run_sweep`."""
    plan, folder = prepared.plan, prepared.folder
    try:
        plan.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--storage-path {shown(plan.root)} cannot be made ({error}); give a folder that you may write"
        ) from None
    with folder.lease(None if prepared.part is None else prepared.part.name, say=words.say) as lease:
        prepared.write_plan()
        left = left_words(plan, standing(plan, folder.rows()))
        of_part = "" if prepared.part is None else f", part {prepared.part.index} of {prepared.part.count}"
        words.say(f"sweep {plan.name}: {plan.space}{of_part}, {left}, {slots.describe()}; {shown(folder.path)}")
        for line in (*said_once(plan), *([slots.warning] if slots.warning else [])):
            print(f"warning: {line}", file=sys.stderr)
        try:
            with signals.taken():
                from launch.runner import run_sweep

                summary = run_sweep(
                    plan, folder, slots=slots, machine=machine, words=words, signals=signals, is_joined=is_joined, lease=lease,
                    whole=prepared.whole, part=prepared.part, **more,
                )  # fmt: skip
        except LeaseError:
            raise  # the folder is another process's now
        except HamuError:
            if prepared.is_new and prepared.part is None and not any(folder.trials.iterdir()):
                remove(folder.path)  # nothing has run, and the plan cannot be mended: its name is free again
            raise
        except Interrupted as interrupted:
            folder.write_trials()
            stand = standing(plan, folder.rows())
            print(
                f"stopped by {signal.Signals(interrupted.number).name}: {stand.n_ended} of {stand.n_total} trials finished "
                f"and kept; go on with: {resume_command(plan)}",
                file=sys.stderr,
            )
            return 128 + interrupted.number
    from launch.summary import summary_text

    rows = folder.write_trials()
    print("\n" + summary_text(summary, rows, folder.report))
    own = {trial.trial_id for trial in plan.trials}
    failed = sum(row["status"] == "failed" and row["trial_id"] in own for row in rows)
    if failed:
        print(f"{failed} trials failed; try them again with: {resume_command(plan)}", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def machine_for(prepared: Prepared, place: Place, words: Words) -> Iterator[Machine]:
    """What the trials run on: this machine, or the cluster that is joined here and left at the end.

    Raises:
        ConfigError: the cluster cannot be joined, or does not share the artifact root.
    """
    prepare_environment(_ROOT, joins_cluster=place.is_joined)
    if not place.is_joined:
        yield machine_of_plan(place)
        return
    from hamu.hub import offline_environment
    from launch.joining import joined, prove_root

    offline = offline_environment() if any(map(is_on_hub, prepared.plan.configs.values())) else {}
    with joined(place, repository=_ROOT, words=words, offline=offline) as machine:
        prove_root(prepared.plan.root, words)
        yield machine


def machine_of_plan(place: Place) -> Machine:
    """What a sweep is planned for without contacting anything: as a cluster file says, else this machine."""
    if place.cluster is None or place.cluster.is_this_machine:
        return this_machine(os.environ)
    return cluster_machine(place.cluster)


def slots_for(args: argparse.Namespace, prepared: Prepared, place: Place, machine: Machine) -> tuple[Slots, bool]:
    """How many trials at once, on what, and whether their memory is to decide how many share a GPU.

    Raises:
        ConfigError: it cannot be had.
    """
    pairing, cluster = pairing_of(prepared.plan), place.cluster
    share, fit_gpus = gpu_share(args, pairing)
    if cluster is not None:
        check_asks(cluster, pairing, AUTO if fit_gpus else None if share is None else share / pairing.n_workers)
    slots = choose_slots(
        machine, n_trials=prepared.plan.n_to_run, max_concurrent=args.max_concurrent, gpus=share, pairing=pairing,
        shares_gpus=fit_gpus,
    )  # fmt: skip
    if cluster is not None:
        slots = with_cores(slots, machine, cluster.settings.cpus_per_worker)
    return slots, fit_gpus


def _dry_run(args: argparse.Namespace, prepared: Prepared, place: Place) -> int:
    """Print what would run, and where; measure what the gradients allow, if that is asked for."""
    plan, folder, machine = prepared.plan, prepared.folder, machine_of_plan(place)
    slots, _ = slots_for(args, prepared, place, machine)
    if place.cluster is not None:
        from launch.cluster_text import cluster_text

        print(cluster_text(place.cluster, plan=plan, slots=slots) + "\n")
    stand = standing(plan, folder.rows())
    print(plan_text(plan, machine=machine, slots=slots, folder=shown(folder.path), stand=stand))
    for line in missing_models(plan):
        print(f"warning: {line}; fetch it first, with --fetch", file=sys.stderr)
    if args.probe is not None or args.prune_infeasible:
        from rich.console import Console

        from launch.words import Words

        prepare_environment(_ROOT)
        words, signals = Words(Console(file=sys.stdout)), Signals()
        with signals.taken():
            from launch.runner import probe_sweep

            probe_sweep(plan, slots=slots, machine=machine, words=words, signals=signals, n_probe=args.probe)
        print(f"\ntrials: {plan.n_to_run}")
    return 0


def _run(args: argparse.Namespace, prepared: Prepared, place: Place) -> int:
    from rich.console import Console

    from launch.words import Words

    words, signals = Words(Console(file=sys.stdout)), Signals()

    def wait(line: str) -> None:
        words.say(line)
        signals.check()

    files.on_wait(wait)
    try:
        with machine_for(prepared, place, words) as machine:
            slots, fit_gpus = slots_for(args, prepared, place, machine)
            return run(
                prepared, slots=slots, machine=machine, words=words, signals=signals, is_joined=place.is_joined,
                dashboard=args.dashboard, fit_gpus=fit_gpus, n_probe=args.probe, prune_infeasible=args.prune_infeasible,
            )  # fmt: skip
    finally:
        files.on_wait(None)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python launch/sweep.py`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv, str(__doc__))
        if args.list:
            names = [name for name in list_spaces() if args.task is None or name.startswith(f"{args.task}/")]
            if args.task is not None and not names:
                find_space(None, args.task)
            print(spaces_text(load_space(name) for name in names))
            return 0
        place = find_place(args, os.environ)
        if place.cluster is not None:
            take_settings(args, place.cluster, os.environ)
        if args.fetch:
            from hamu.cli.fetch import fetch_for

            return fetch_for(new_plan(args, root_of(args, os.environ, place.cluster)).configs.values(), say=print)
        prepared = prepare(args, place)
        return _dry_run(args, prepared, place) if args.dry_run else _run(args, prepared, place)
    except HamuError as error:
        if "--debug" in argv:
            print(without_secrets(traceback.format_exc()), file=sys.stderr)
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        return 128 + interrupted.number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
        print(f"error: the sweep failed: {type(error).__name__}: {without_secrets(str(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
