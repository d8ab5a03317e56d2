"""From flags to a checked plan and its folder: a new sweep, one to go on with, or a share of either. Nothing is written here."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hamu.cli.environment import read_environment
from hamu.errors import ConfigError
from hamu.storage.lease import Lease
from launch.checks import check_plan
from launch.extend import check_unchanged, extended
from launch.flags import DEFAULT_SPACE, search_settings, wants_references
from launch.part import Part, read_part
from launch.place import Place, check_paths, check_root, root_of
from launch.plan import Plan, make_plan, read_overrides
from launch.results import SweepFolder, check_free, find_sweep
from launch.scheduling import check_schedule
from launch.search_checks import check_search
from launch.standing import standing
from tune_spaces.scale import FULL
from tune_spaces.space import find_space, load_space

_START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a process is to run.

    plan: its trials. whole: those of the sweep, of which a share has some. folder: of the results. part: which share; None: all.
    is_new: whether the plan has still to be written. base: the shorter one whose place it takes; None: it takes none.
    """

    plan: Plan
    whole: Plan
    folder: SweepFolder
    part: Part | None = None
    is_new: bool = True
    base: Plan | None = None

    def write_plan(self) -> None:
        """Write the plan down, where it is not yet; call it while holding the lease.

        Raises:
            ConfigError: somebody else has put another sweep there meanwhile.
        """
        if self.part is None:
            if self.is_new:
                check_free(self.folder, space=self.whole.space, root=self.whole.root)
            elif self.base is not None and self.folder.read_plan(self.whole.root).trials != self.base.trials:
                raise ConfigError(f"sweep {self.whole.name!r} was extended by another process just now; give the command again")
            if self.is_new or self.base is not None:
                self.folder.start(self.whole)
            return
        with Lease(self.folder.path, ".lease-start", patience_s=_START_S):  # the shares begin at the same moment
            if self.folder.has_plan():
                check_same(self.folder.read_plan(self.whole.root), self.whole)
            else:
                self.folder.start(self.whole)


def prepare(args: argparse.Namespace, place: Place) -> Prepared:
    """Make the plan, or read the one to go on with, and check all that it points to.

    Raises:
        HamuError: the input is wrong.
    """
    root = root_of(args, os.environ, place.cluster)
    if not args.dry_run:
        check_root(root, place)
    part = read_part(args.part) if args.part is not None else None
    is_new, is_longer = args.resume is None, False
    base: Plan | None = None
    if args.resume is not None:
        folder = find_sweep(root, args.resume)
        plan = folder.read_plan(root)
        _check_space(args, plan, folder)
        if args.extend:
            base, plan = plan, _extended(args, plan, folder)
            is_longer = plan.trials != base.trials or plan.gone != base.gone or plan.search != base.search
        else:
            check_unchanged(plan)
    else:
        plan = new_plan(args, root)
        folder = SweepFolder(root / "results" / plan.task / plan.name)
        if part is not None and folder.has_plan():
            stored, is_new = folder.read_plan(root), False
            check_same(stored, plan)
            plan = stored  # which may have been extended since
        else:
            check_free(folder, space=plan.space, root=root)
    check_plan(plan, asks_hub=not args.dry_run)
    check_paths(plan, place)
    check_schedule(plan)
    check_search(plan)
    own = part.plan(plan) if part is not None else plan
    return Prepared(plan=own, whole=plan, folder=folder, part=part, is_new=is_new, base=base if is_longer else None)


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
    overrides = read_overrides(below) | overrides_of(args)
    return make_plan(
        space,
        name=args.name or f"{space.sweep}-{time.strftime('%Y%m%d-%H%M%S')}",
        overrides=overrides,
        root=root,
        scale=args.scale or FULL,
        search=search_settings(args, space),
        with_reference=wants_references(args, space, overrides.get("model_name", ())),
    )


def overrides_of(args: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """What `--set` and `--seeds` say.

    Raises:
        ConfigError: a setting does not fit, or both say the seed.
    """
    seeds = [f"seed={args.seeds}"] if args.seeds is not None else []
    if seeds and (twice := [each for each in args.set if each.split("=")[0].strip() == "seed"]):
        raise ConfigError(f"--seeds {args.seeds} and --set {twice[-1]} say the same twice; give one")
    return read_overrides([*args.set, *seeds])


def check_same(stored: Plan, plan: Plan) -> None:
    """Refuse a share of a sweep whose folder holds a plan that does not begin with these trials.

    Raises:
        ConfigError: as said.
    """
    begins = [trial.trial_id for trial in stored.trials[: len(plan.trials)]]
    if begins != [trial.trial_id for trial in plan.trials] or stored.space != plan.space:
        raise ConfigError(
            f"--part: sweep {plan.name!r} has {len(stored.trials)} trials of {stored.space!r}, and the flags give "
            f"{len(plan.trials)} of {plan.space!r} that are not the same; give all shares the same flags, or "
            f"--resume {plan.name}, or another --name"
        )


def _extended(args: argparse.Namespace, plan: Plan, folder: SweepFolder) -> Plan:
    """A plan with its new trials; as it is where there are none and some have still to run, since the command may come twice.

    Raises:
        ConfigError: nothing is new and nothing is left, or the search may not try more trials.
    """
    grown = extended(plan, overrides_of(args))
    if args.trials is not None:
        grown = replace(grown, search=replace(grown.search, trials=args.trials))
    n_new = len(grown.trials) - len(plan.trials)
    left = standing(grown, folder.rows()).n_left
    if n_new == 0 and grown.gone == plan.gone and left == 0:
        raise ConfigError(
            f"--extend: sweep {plan.name!r} has all {len(plan.trials)} trials of {plan.space!r} already, and all have "
            "ended; give --set with values that it has not tried"
        )
    if n_new and left == 0:
        raise ConfigError(
            f"--extend: the search of sweep {plan.name!r} may try {plan.n_to_run} trials, and has; give "
            "--trials with more than that"
        )
    return grown


def _check_space(args: argparse.Namespace, plan: Plan, folder: SweepFolder) -> None:
    if args.space or args.task:
        wanted = find_space(args.space, args.task) if args.space else f"{args.task}/"
        if not plan.space.startswith(wanted):
            raise ConfigError(f"{folder.path} belongs to a sweep of space {plan.space!r}, not {wanted!r}; leave out --space")
