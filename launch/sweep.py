"""Run a sweep: every trial of a space, on this machine, with a report at the end.

    python launch/sweep.py                                   digits/quickstart, about two minutes
    python launch/sweep.py --list
    python launch/sweep.py --space cifar/constraint_sweep --set dataset_name=../cifar10 --dry-run
    python launch/sweep.py --set method=hamu-q,gdiff --set lr=0.01,0.1 --name mine
    python launch/sweep.py --resume mine

Exit codes: 0 all trials ended without error, 1 some failed, 2 bad input, 128 + n stopped by signal n (resume it).
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_ROOT = Path(__file__).resolve().parents[1]
# As a script, Python puts launch/ first on the path: its modules would hide others of their names.
sys.path[:] = [str(_ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (_ROOT, _ROOT / "launch"))]

from hamu.cli.environment import read_environment  # noqa: E402
from hamu.errors import ConfigError, HamuError  # noqa: E402
from launch.checks import check_plan, missing_models  # noqa: E402
from launch.machine import Machine, Slots, choose_slots, this_machine  # noqa: E402
from launch.pairing import pairing_of  # noqa: E402
from launch.plan import Plan, make_plan, read_overrides, said_once  # noqa: E402
from launch.plan_text import plan_text, spaces_text  # noqa: E402
from launch.results import SweepFolder, check_free, find_sweep, has_ended  # noqa: E402
from launch.signals import Interrupted, Signals  # noqa: E402
from tune_spaces.space import find_space, list_spaces, load_space  # noqa: E402

DEFAULT_SPACE = "digits/quickstart"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def build_parser() -> argparse.ArgumentParser:
    """The flags of a sweep."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; see python launch/sweep.py --help")

    parser = Parser(
        prog="python launch/sweep.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--list", action="store_true", help="list the spaces and stop")
    add("--space", metavar="NAME", help=f"space to run, <task>/<sweep> (default {DEFAULT_SPACE})")
    add("--task", metavar="TASK", help="look for the space in this task only")
    add("--set", metavar="KEY=VALUE", action="append", default=[],
        help="set a flag of hamu.cli.train, with commas as an axis; original.KEY is for training the original")  # fmt: skip
    add("--name", help="name of the sweep and its results folder (default: space and time)")
    add("--resume", metavar="NAME", help="go on with a sweep: its unfinished trials run, its finished ones do not")
    add("--dry-run", action="store_true", help="print what would run, on what, and stop")
    add("--fetch", action="store_true", help="bring the models and datasets from the hub into the cache, once, and stop")
    add("--max-concurrent", type=int, metavar="N", help="trials at once (default: one a core, or as many as the GPUs hold)")
    add("--gpus", type=float, metavar="SHARE", help="GPUs a trial, such as 0.5 (default: 1 where there are GPUs); 0: cores only")
    add("--storage-path", metavar="DIR", help="artifact root: checkpoints, results, caches (default artifacts)")
    add("--dashboard", action="store_true", help="start Ray's dashboard on the loopback")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags.

    Raises:
        ConfigError: a flag is unknown (the nearest is named), or two do not go together.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        known = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
        if not rest[0].startswith("--"):
            raise ConfigError(f"{rest[0]!r} is not a flag; a space is given with --space, a setting with --set KEY=VALUE")
        near = difflib.get_close_matches(rest[0][2:].split("=")[0], known, n=1, cutoff=0.5)
        hint = f"did you mean '--{near[0]}'? " if near else ""
        raise ConfigError(f"unknown flag {rest[0]!r}; {hint}Known: {', '.join('--' + name for name in known)}")
    if args.resume is not None:
        for flag, value in (("--set", args.set), ("--name", args.name)):
            if value:
                raise ConfigError(
                    f"--resume {args.resume} runs its own plan, so {flag} is of no use; leave it out, or start a new sweep"
                )
    if args.name is not None and not _NAME.fullmatch(args.name):
        raise ConfigError(
            f"--name {args.name!r}: a name is 1 to 100 of A-Z a-z 0-9 _ . + -, and begins with a letter, digit or _"
        )
    return args


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
    name = args.name or f"{space.sweep}-{time.strftime('%Y%m%d-%H%M%S')}"
    return make_plan(space, name=name, overrides=read_overrides([*below, *args.set]), root=root)


def run(plan: Plan, folder: SweepFolder, *, slots: Slots, machine: Machine, is_new: bool, dashboard: bool) -> int:
    """Run a checked plan; returns the exit code."""
    from rich.console import Console

    from hamu.cli.ray_environment import prepare_environment
    from launch.words import Words

    words, signals = Words(Console(file=sys.stdout)), Signals()
    with folder.lease():
        if is_new:
            check_free(folder, space=plan.space, root=plan.root)
            folder.start(plan)
        prepare_environment(_ROOT)
        left = len(folder.unfinished(plan))
        words.say(
            f"sweep {plan.name}: {plan.space}, {left} of {len(plan.trials)} trials to run, {slots.describe()}; {folder.path}"
        )
        for line in (*said_once(plan), *([slots.warning] if slots.warning else [])):
            print(f"warning: {line}", file=sys.stderr)
        try:
            with signals.taken():
                from launch.runner import run_sweep

                summary = run_sweep(plan, folder, slots=slots, machine=machine, words=words, signals=signals, dashboard=dashboard)
        except HamuError:
            if is_new and not folder.rows():
                shutil.rmtree(folder.path)  # nothing has run, and the plan cannot be mended: its name is free again
            raise
        except Interrupted as interrupted:
            rows = folder.write_trials()
            finished = sum(map(has_ended, rows))
            print(
                f"stopped by {signal.Signals(interrupted.number).name}: {finished} of {len(plan.trials)} trials finished "
                f"and kept; go on with: {_resume_command(plan)}",
                file=sys.stderr,
            )
            return 128 + interrupted.number
    from launch.summary import summary_text

    rows = folder.write_trials()
    print("\n" + summary_text(summary, rows, folder.report))
    failed = summary["trials"]["failed"]
    if failed:
        print(f"{failed} trials failed; try them again with: {_resume_command(plan)}", file=sys.stderr)
    return 1 if failed else 0


def _resume_command(plan: Plan) -> str:
    place = "" if plan.root == Path("artifacts") else f" --storage-path {plan.root}"
    return f"python launch/sweep.py --resume {plan.name}{place}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python launch/sweep.py`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
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
        machine = this_machine(os.environ)
        left = folder.unfinished(plan)
        slots = choose_slots(
            machine,
            n_trials=len(plan.trials),
            max_concurrent=args.max_concurrent,
            gpus=args.gpus,
            pairing=pairing_of(plan),
        )
        if args.dry_run:
            finished = len(plan.trials) - len(left)
            print(plan_text(plan, machine=machine, slots=slots, folder=str(folder.path), finished=finished))
            for line in missing_models(plan):
                print(f"warning: {line}; fetch it first, with --fetch", file=sys.stderr)
            return 0
        return run(plan, folder, slots=slots, machine=machine, is_new=args.resume is None, dashboard=args.dashboard)
    except HamuError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"error: the sweep failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
