"""The flags of `python launch/sweep.py`, and what of them may go together."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from hamu.errors import ConfigError
from hamu.training.inputs import is_local_path
from hamu.training.probe import N_PAIRS
from launch.pairing import Pairing
from launch.plan import search_of
from tune_spaces.goals import CLOSENESS
from tune_spaces.scale import SCALES
from tune_spaces.search import SCHEDULERS, SEARCHES, SearchSettings
from tune_spaces.space import Space

DEFAULT_SPACE = "digits/quickstart"
AUTO = "auto"
_OF_EXTENSION = ("set", "seeds", "trials")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
_NONE = "none"

# What a plan has once it is written: a resumed sweep goes by its own.
_OF_THE_PLAN = (
    "set",
    "name",
    "scale",
    "seeds",
    "search",
    "trials",
    "until",
    "target",
    "keep",
    "scheduler",
    "score",
    "with_reference",
)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The flags of a sweep."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; see python launch/sweep.py --help")

    parser = Parser(
        prog="python launch/sweep.py", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_trials(parser.add_argument_group("which trials"))
    _add_search(parser.add_argument_group("which of them, in which order, and how long"))
    _add_hardness(parser.add_argument_group("what the gradients allow"))
    _add_machine(parser.add_argument_group("where"))
    return parser


def _add_trials(group: Any) -> None:
    add = group.add_argument
    add("--list", action="store_true", help="list the spaces and stop")
    add("--space", metavar="NAME", help=f"space to run, <task>/<sweep> (default {DEFAULT_SPACE})")
    add("--task", metavar="TASK", help="look for the space in this task only")
    add("--set", metavar="KEY=VALUE", action="append", default=[],
        help="set a flag of hamu.cli.train, with commas as an axis, low..high:n as n values between (default 9; by ratio where "
        "they span much); original.KEY is for training the original")  # fmt: skip
    add("--seeds", metavar="N,N", help="run every trial with each of these seeds, such as 41,42,43 (as --set seed=)")
    add("--scale", metavar="NAME", help=f"{', '.join(SCALES)}: small runs any space on embedded data, in minutes on 2 cores")
    add("--with-reference", action=argparse.BooleanOptionalAction, default=None,
        help="train retain-only models too, and measure how close the trials come to them (default: as the space)")  # fmt: skip
    add("--name", help="name of the sweep and its results folder (default: space and time)")
    add("--resume", metavar="NAME", help="go on with a sweep: its unfinished trials run, its finished ones do not")
    add(
        "--extend",
        action="store_true",
        help="with --resume: add the trials that the space, --set or --seeds give now and the sweep lacks",
    )
    add("--dry-run", action="store_true", help="print what would run, on what, and stop")
    add("--fetch", action="store_true", help="bring the models and datasets from the hub into the cache, once, and stop")


def _add_search(group: Any) -> None:
    add = group.add_argument
    add("--search", metavar="NAME", help=f"{', '.join(SEARCHES)}: how trials are picked from the space (default: as it says)")
    add("--trials", type=int, metavar="N", help="how many to run (default: grid all, a search half of them)")
    add("--until", metavar="RULE", help="stop early: no-gain:10 when the front's hypervolume has not grown over 10 trials")
    add("--target", metavar="RULE", action="append", default=[],
        help='search for a trial with e.g. "forget_accuracy<=retrained" (original, or a number); the first ends it')  # fmt: skip
    add("--keep", metavar="RULE", action="append", default=[],
        help='what has to hold besides --target, e.g. "retain_accuracy>=original-0.01"')  # fmt: skip
    add("--scheduler", metavar="NAME",
        help=f"{', '.join(SCHEDULERS)}, or {_NONE}: end bad trials early (asha), hand good weights on (pbt)")  # fmt: skip
    add("--score", metavar="METRIC", help="what the scheduler goes by: balance (default), a metric, or -metric for less of it")


def _add_hardness(group: Any) -> None:
    add = group.add_argument
    add("--probe", type=int, metavar="N", nargs="?", const=N_PAIRS,
        help=f"measure kappa, the angle and the largest feasible constraint ratio on N batches first (default {N_PAIRS}); "
        "with --dry-run: train the originals that are missing, measure, print and stop")  # fmt: skip
    add("--prune-infeasible", action="store_true",
        help="measure so, and drop the trials that no measured batch allows; with --dry-run: say which")  # fmt: skip


def _add_machine(group: Any) -> None:
    add = group.add_argument
    add("--max-concurrent", type=int, metavar="N", help="trials at once (default: one a core, or as many as the GPUs hold)")
    add("--gpus", type=float, metavar="SHARE", help="GPUs a trial, such as 0.5 (default: 1 where there are GPUs); 0: cores only")
    add("--gpus-per-worker", metavar=f"SHARE|{AUTO}",
        help=f"the same for each process of a trial; {AUTO}: as many trials on a GPU as the memory estimate allows")  # fmt: skip
    add("--storage-path", metavar="DIR|URL",
        help="artifact root: checkpoints, results, caches (default artifacts); on several nodes a folder that all share, or a "
        "URL such as s3://bucket/hamu")  # fmt: skip
    add("--cluster", metavar="FILE", help="a cluster file such as launch/clusters/onprem.yaml, with its settings beside it; with "
        "--dry-run nothing is contacted")  # fmt: skip
    add("--address", metavar="HOST:PORT|auto", help="join the Ray cluster whose head is there; auto: the one of this machine")
    add("--wait-for-nodes", type=int, metavar="N", help="begin when the cluster has N nodes")
    add("--part", metavar="I/N", help="run the I-th of N shares of the trials, beside other processes that run the others in the "
        "same results folder; the same command goes on with them")  # fmt: skip
    add("--dashboard", action="store_true", help="start Ray's dashboard on the loopback")
    add("--debug", action="store_true", help="show tracebacks")


def parse(argv: Sequence[str], description: str) -> argparse.Namespace:
    """Read the flags.

    Raises:
        ConfigError: a flag is unknown (the nearest is named), or two do not go together.
    """
    parser = build_parser(description)
    args, rest = parser.parse_known_args(argv)
    if rest:
        known = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
        if not rest[0].startswith("--"):
            raise ConfigError(f"{rest[0]!r} is not a flag; a space is given with --space, a setting with --set KEY=VALUE")
        near = difflib.get_close_matches(rest[0][2:].split("=")[0], known, n=1, cutoff=0.5)
        hint = f"did you mean '--{near[0]}'? " if near else ""
        raise ConfigError(f"unknown flag {rest[0]!r}; {hint}Known: {', '.join('--' + name for name in known)}")
    if args.resume is not None:
        for name in _OF_THE_PLAN:
            if getattr(args, name) not in (None, []) and not (args.extend and name in _OF_EXTENSION):
                mend = "give --extend to add trials" if name in _OF_EXTENSION else "leave it out, or start a new sweep"
                raise ConfigError(f"--resume {args.resume} runs its own plan, so --{name.replace('_', '-')} is of no use; {mend}")
    elif args.extend:
        raise ConfigError("--extend adds trials to a sweep that is there; give --resume NAME too")
    if args.part is not None and args.extend:
        raise ConfigError(f"--part {args.part} and --extend: a sweep is extended as a whole; leave one of them out")
    if args.part is not None and args.name is None and args.resume is None:
        raise ConfigError(f"--part {args.part}: the shares of a sweep find each other by its name; give --name")
    if args.dry_run and (args.probe is not None or args.prune_infeasible) and (args.cluster or args.address):
        raise ConfigError("--dry-run with --probe measures on this machine; leave out --cluster and --address, or --dry-run")
    if args.wait_for_nodes is not None and args.wait_for_nodes < 1:
        raise ConfigError(f"--wait-for-nodes {args.wait_for_nodes}: it is a number of nodes; give 1 or more")
    if args.name is not None and not _NAME.fullmatch(args.name):
        raise ConfigError(
            f"--name {args.name!r}: a name is 1 to 100 of A-Z a-z 0-9 _ . + -, and begins with a letter, digit or _"
        )
    if args.probe is not None and args.probe < 1:
        raise ConfigError(f"--probe {args.probe}: it is the number of batches to measure; give 1 or more")
    if args.gpus is not None and args.gpus_per_worker is not None:
        raise ConfigError(f"--gpus {args.gpus:g} and --gpus-per-worker {args.gpus_per_worker} say the same twice; give one")
    return args


def search_settings(args: argparse.Namespace, space: Space) -> SearchSettings:
    """How the trials of a space are picked: by the flags, else as the space says.

    Raises:
        ConfigError: a name is unknown, or a rule cannot be read.
    """
    own = search_of(space)
    scheduler = args.scheduler if args.scheduler is not None else own.scheduler
    return replace(
        own,
        name=args.search or own.name,
        trials=args.trials,
        until=args.until,
        target=tuple(args.target),
        keep=tuple(args.keep),
        scheduler=None if scheduler == _NONE else scheduler,
        score=args.score or own.score,
    )


def wants_references(args: argparse.Namespace, space: Space, models: Iterable[str]) -> bool:
    """Whether retain-only models are made: by the flag, else as the space says or a rule needs.

    models: names of models that the user gives. A folder is the original itself, and how it was trained is not known, so a
    space alone does not ask for the retain-only model then.

    Raises:
        ConfigError: a rule needs them, and the flag forbids them.
    """
    rules = [rule for rule in (*args.target, *args.keep) if "retrained" in rule or CLOSENESS in rule]
    if rules and args.with_reference is False:
        raise ConfigError(f"{rules[0]!r} compares with the retrained model, which --no-with-reference leaves out; drop that flag")
    if rules or args.with_reference is not None:
        return bool(rules) or bool(args.with_reference)
    return space.with_reference and not any(map(is_local_path, models))


def gpu_share(args: argparse.Namespace, pairing: Pairing) -> tuple[float | None, bool]:
    """GPUs a trial as asked for (None: not said), and whether the memory estimate is to decide.

    Raises:
        ConfigError: neither a number nor auto, or a share of a GPU for the workers of a split pair.
    """
    given = args.gpus_per_worker
    if given is None:
        return args.gpus, False
    try:
        share = None if given == AUTO else float(given)
    except ValueError:
        raise ConfigError(f"--gpus-per-worker {given!r}: give a share such as 0.5, a whole number, or {AUTO}") from None
    if pairing.is_split and (share is None or share not in (0.0, 1.0)):
        raise ConfigError(
            f"--gpus-per-worker {given}: the workers of a split pair have a whole GPU each (NCCL refuses two on one); give 1, 0 "
            "for the cores, or --set gradient_pairing=sequential"
        )
    return (None if share is None else share * pairing.n_workers), share is None
