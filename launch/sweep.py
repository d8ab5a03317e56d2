"""Run a sweep: every trial of a space, on this machine, with a report at the end.

    python launch/sweep.py                                   digits/quickstart, about two minutes
    python launch/sweep.py --list
    python launch/sweep.py --space cifar/constraint_sweep --set dataset_name=../cifar10 --dry-run
    python launch/sweep.py --set method=hamu-q,gdiff --set lr=0.01,0.1 --name mine
    python launch/sweep.py --resume mine
    python launch/sweep.py --space cifar/grid --scale small --seeds 41,42      on embedded data, in minutes
    python launch/sweep.py --set lr=0.005..0.08:9 --search tpe --trials 24 --until no-gain:10
    python launch/sweep.py --probe --prune-infeasible                          what the gradients allow, before and instead
    python launch/sweep.py --target "forget_accuracy<=retrained" --keep "retain_accuracy>=original-0.01"

Exit codes: 0 all trials ended without error, 1 some failed, 2 bad input, 128 + n stopped by signal n (resume it).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
# As a script, Python puts launch/ first on the path: its modules would hide others of their names.
sys.path[:] = [str(_ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (_ROOT, _ROOT / "launch"))]

from hamu.cli.environment import read_environment  # noqa: E402
from hamu.errors import ConfigError, HamuError  # noqa: E402
from launch.checks import check_plan, missing_models  # noqa: E402
from launch.flags import DEFAULT_SPACE, gpu_share, parse, search_settings, wants_references  # noqa: E402
from launch.machine import Machine, Slots, choose_slots, this_machine  # noqa: E402
from launch.pairing import pairing_of  # noqa: E402
from launch.plan import Plan, make_plan, read_overrides, said_once  # noqa: E402
from launch.plan_text import plan_text, spaces_text  # noqa: E402
from launch.results import SweepFolder, check_free, find_sweep  # noqa: E402
from launch.scheduling import check_schedule  # noqa: E402
from launch.search_checks import check_search  # noqa: E402
from launch.signals import Interrupted, Signals  # noqa: E402
from launch.standing import left_words, resume_command, standing  # noqa: E402
from tune_spaces.scale import FULL  # noqa: E402
from tune_spaces.space import find_space, list_spaces, load_space  # noqa: E402


def prepare(args: argparse.Namespace) -> tuple[Plan, SweepFolder]:
    """Make the plan, or read the one to resume, and check all that it points to. Nothing is written.

    Raises:
        HamuError: the input is wrong.
    """
    root = root_of(args)
    if args.resume is not None:
        folder = find_sweep(root, args.resume)
        plan = folder.read_plan(root)
        if args.space or args.task:
            wanted = find_space(args.space, args.task) if args.space else f"{args.task}/"
            if not plan.space.startswith(wanted):
                raise ConfigError(f"{folder.path} belongs to a sweep of space {plan.space!r}, not {wanted!r}; leave out --space")
    else:
        plan = new_plan(args, root)
        folder = SweepFolder(root / "results" / plan.task / plan.name)
        check_free(folder, space=plan.space, root=root)
    check_plan(plan, asks_hub=not args.dry_run)
    check_schedule(plan)
    check_search(plan)
    return plan, folder


def root_of(args: argparse.Namespace) -> Path:
    """The artifact root: of the flag, else of the environment, else `artifacts`."""
    return Path(args.storage_path or os.environ.get("ARTIFACT_ROOT", "").strip() or "artifacts").expanduser()


def new_plan(args: argparse.Namespace, root: Path) -> Plan:
    """Make the plan of the space that the flags and the environment name.

    Raises:
        ConfigError: there is no such space, or a setting does not fit.
    """
    space = load_space(find_space(args.space or (None if args.task else DEFAULT_SPACE), args.task))
    environment = read_environment(os.environ, modality=str(space.base.get("modality", "vision")))
    for line in environment.warnings:
        print(f"warning: {line}", file=sys.stderr)
    below = [f"{key}={value}" for key, value in environment.settings.items() if key not in ("artifact_root", "ray_address")]
    seeds = [f"seed={args.seeds}"] if args.seeds is not None else []
    if seeds and (twice := [each for each in args.set if each.split("=")[0].strip() == "seed"]):
        raise ConfigError(f"--seeds {args.seeds} and --set {twice[-1]} say the same twice; give one")
    overrides = read_overrides([*below, *args.set, *seeds])
    return make_plan(
        space,
        name=args.name or f"{space.sweep}-{time.strftime('%Y%m%d-%H%M%S')}",
        overrides=overrides,
        root=root,
        scale=args.scale or FULL,
        search=search_settings(args, space),
        with_reference=wants_references(args, space, overrides.get("model_name", ())),
    )


def run(
    plan: Plan,
    folder: SweepFolder,
    *,
    slots: Slots,
    machine: Machine,
    is_new: bool,
    dashboard: bool = False,
    fit_gpus: bool = False,
    n_probe: int | None = None,
    prune_infeasible: bool = False,
) -> int:
    """Run a checked plan; returns the exit code. The last arguments are those of `launch.runner.run_sweep`."""
    from rich.console import Console

    from hamu.cli.ray_environment import prepare_environment
    from launch.words import Words

    words, signals = Words(Console(file=sys.stdout)), Signals()
    with folder.lease():
        if is_new:
            check_free(folder, space=plan.space, root=plan.root)
            folder.start(plan)
        prepare_environment(_ROOT)
        left = left_words(plan, standing(plan, folder.rows()))
        words.say(f"sweep {plan.name}: {plan.space}, {left}, {slots.describe()}; {folder.path}")
        for line in (*said_once(plan), *([slots.warning] if slots.warning else [])):
            print(f"warning: {line}", file=sys.stderr)
        try:
            with signals.taken():
                from launch.runner import run_sweep

                summary = run_sweep(
                    plan, folder, slots=slots, machine=machine, words=words, signals=signals, dashboard=dashboard,
                    fit_gpus=fit_gpus, n_probe=n_probe, prune_infeasible=prune_infeasible,
                )  # fmt: skip
        except HamuError:
            if is_new and not folder.rows():
                shutil.rmtree(folder.path)  # nothing has run, and the plan cannot be mended: its name is free again
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
    failed = summary["trials"]["failed"]
    if failed:
        print(f"{failed} trials failed; try them again with: {resume_command(plan)}", file=sys.stderr)
    return 1 if failed else 0


def _probe(plan: Plan, *, slots: Slots, machine: Machine, n_probe: int | None) -> None:
    """Measure what the first gradients allow, and say it; trains the originals that are missing, and writes no results."""
    from rich.console import Console

    from hamu.cli.ray_environment import prepare_environment
    from launch.words import Words

    prepare_environment(_ROOT)
    words, signals = Words(Console(file=sys.stdout)), Signals()
    with signals.taken():
        from launch.runner import probe_sweep

        probe_sweep(plan, slots=slots, machine=machine, words=words, signals=signals, n_probe=n_probe)


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
        if args.fetch:
            from hamu.cli.fetch import fetch_for

            return fetch_for(new_plan(args, root_of(args)).configs.values(), say=print)
        plan, folder = prepare(args)
        machine, pairing = this_machine(os.environ), pairing_of(plan)
        share, fit_gpus = gpu_share(args, pairing)
        slots = choose_slots(
            machine, n_trials=plan.n_to_run, max_concurrent=args.max_concurrent, gpus=share, pairing=pairing, shares_gpus=fit_gpus
        )
        hardness = {"n_probe": args.probe, "prune_infeasible": args.prune_infeasible}
        if args.dry_run:
            stand = standing(plan, folder.rows())
            print(plan_text(plan, machine=machine, slots=slots, folder=str(folder.path), stand=stand))
            for line in missing_models(plan):
                print(f"warning: {line}; fetch it first, with --fetch", file=sys.stderr)
            if args.probe is not None or args.prune_infeasible:
                _probe(plan, slots=slots, machine=machine, n_probe=args.probe)
                print(f"\ntrials: {plan.n_to_run}")
            return 0
        is_new = args.resume is None
        return run(
            plan, folder, slots=slots, machine=machine, is_new=is_new, dashboard=args.dashboard, fit_gpus=fit_gpus, **hardness
        )
    except HamuError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        return 128 + interrupted.number
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"error: the sweep failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
