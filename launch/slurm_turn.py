"""The flags of a turn of a Slurm job: to begin a sweep with, or to go on with the one that an earlier turn began.

    python launch/slurm_turn.py --space cifar/grid --name run1     (in the batch script) prints them, each ended by a null byte

Exit codes: 0, or 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
# As a script, Python puts launch/ first on the path: its modules would hide others of their names.
sys.path[:] = [str(_ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (_ROOT, _ROOT / "launch"))]

from hamu.errors import HamuError  # noqa: E402
from launch.extend import extended  # noqa: E402
from launch.flags import parse  # noqa: E402
from launch.place import root_of  # noqa: E402
from launch.plan import Plan  # noqa: E402
from launch.prepare import overrides_of  # noqa: E402
from launch.results import find_sweep  # noqa: E402

_KEPT = (
    "space",
    "task",
    "max_concurrent",
    "gpus",
    "gpus_per_worker",
    "probe",
    "storage_path",
    "address",
    "wait_for_nodes",
    "cluster",
)
_KEPT_BARE = ("prune_infeasible", "debug")


def next_flags(flags: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The flags of sweep.py for this turn.

    A share of a sweep goes on with the flags that it began with. An extension that an earlier turn has written into the plan is
    not asked for again. A name that is not given is made of the job's, the same in every turn.

    Raises:
        HamuError: the flags are wrong.
    """
    flags = list(flags)
    if not any(flag.partition("=")[0] in ("--name", "--resume") for flag in flags):
        flags += ["--name", f"slurm-{environment.get('SLURM_ARRAY_JOB_ID') or environment.get('SLURM_JOB_ID', 'job')}"]
    args = parse(flags, "")
    if args.part is not None or (args.resume is not None and not args.extend):
        return flags
    try:
        root = root_of(args, environment, None)
        folder = find_sweep(root, args.resume or args.name)
        if args.extend and not _is_extended(args, folder.read_plan(root)):
            return flags
    except HamuError:
        return flags  # what is wrong is said by the sweep
    print(f"sweep {args.resume or args.name} has begun: going on with it, by its own settings", file=sys.stderr)
    given = [(name, getattr(args, name)) for name in _KEPT if getattr(args, name) is not None]
    said = [part for name, value in given for part in (f"--{name.replace('_', '-')}", str(value))]
    bare = [f"--{name.replace('_', '-')}" for name in _KEPT_BARE if getattr(args, name)]
    return ["--resume", f"{folder.path.parent.name}/{folder.path.name}", *said, *bare]


def _is_extended(args: argparse.Namespace, plan: Plan) -> bool:
    """Whether all that an extension asks for is in the plan."""
    grown = extended(plan, overrides_of(args))
    is_searched_on = args.trials is not None and args.trials != plan.search.trials
    return len(grown.trials) == len(plan.trials) and grown.gone == plan.gone and not is_searched_on


def main(argv: Sequence[str]) -> int:
    """Entry of `python launch/slurm_turn.py`; returns the exit code."""
    try:
        found = next_flags(argv, os.environ)
    except HamuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write("".join(f"{flag}\0" for flag in found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
