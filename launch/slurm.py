"""A sweep as a Slurm batch script: the committed `launch/clusters/slurm.sbatch` with a site's settings filled in.

    python launch/submit.py --slurm --nodes 2 --gpus-per-node 4 --dry-run -- --space cifar/grid --name run1

The text is made purely, text out; `sbatch` is called by `submit_to_slurm` alone.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hamu.errors import ConfigError
from launch.cluster_settings import looks_secret
from launch.cluster_yaml import load_yaml, nearest, refusal

TEMPLATE = "launch/clusters/slurm.sbatch"
SETTINGS = "launch/clusters/slurm.settings.yaml"
_WORD = re.compile(r"[A-Za-z0-9_.,:=+@%/~&|*()\[\]-]+")
_TIME = re.compile(r"\d+|(\d+-)?\d{1,2}(:\d{2}){0,2}")
_BEGIN, _END = "# settings: begin\n", "# settings: end\n"


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What sbatch is asked for, and what the job does first. None: left to Slurm.

    array: tasks of one node each that share the trials of one sweep. signal_before_s: seconds before the time limit at which the
    trials are saved. output: name of the log, as sbatch writes it. storage_path: artifact root. repository: where the nodes see
    this checkout. python: the interpreter, after the lines of setup. environment: nothing secret. extra: more flags of sbatch.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time: str | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    array: int | None = None
    exclusive: bool = False
    requeue: bool = True
    signal_before_s: int = 180
    output: str = "%x-%j.log"
    storage_path: str | None = None
    repository: str | None = None
    python: str = "python"
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


_WORDS = ("time", "mem", "partition", "account", "qos", "constraint", "output")
_COUNTS = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "array": 1, "signal_before_s": 30}


def add_flags(group: Any) -> None:
    """The flags of `python launch/submit.py` that are for Slurm."""
    add = group.add_argument
    add("--slurm", action="store_true", help="submit a batch script with sbatch; with --dry-run: print it")
    add("--settings", metavar="FILE", help=f"your site's settings (default {SETTINGS})")
    add("--nodes", type=int, metavar="N", help="nodes: several make one Ray cluster")
    add("--gpus-per-node", type=int, metavar="N")
    add("--cpus-per-task", type=int, metavar="N", help="cores of each node for the sweep")
    add("--time", metavar="TIME", help="limit, such as 12:00:00; the trials are saved before and the job goes on in a new turn")
    for name in ("mem", "partition", "account", "qos", "constraint"):
        add(f"--{name}", metavar=name.upper())
    add("--array", type=int, metavar="N", help="N sweeps of one node each, which share the trials and the results folder")
    add("--exclusive", action=argparse.BooleanOptionalAction, default=None, help="have the nodes alone")
    add("--requeue", action=argparse.BooleanOptionalAction, default=None, help="go on in a new turn when the time is over")


def read_slurm_settings(path: Path) -> SlurmSettings:
    """The settings of a site.

    Raises:
        ConfigError: it names the file, the key and the mend.
    """
    found = load_yaml(path)
    known = [each.name for each in fields(SlurmSettings)]
    for name in found:
        if name not in known:
            raise refusal(path, name, f"no such setting; {nearest(name, known)}")
    given = {name: value for name, value in found.items() if value is not None}
    for name in ("setup", "extra"):
        if not isinstance(given.get(name, []), list) or not all(isinstance(each, str) for each in given.get(name, [])):
            raise refusal(path, name, f'{given[name]!r} is no list of texts; write ["..."]')
        given[name] = tuple(given.get(name, ()))
    environment = given.setdefault("environment", {})
    if not isinstance(environment, dict):
        raise refusal(path, "environment", f"{environment!r} is no mapping; write NAME: value")
    given["environment"] = {str(name): str(value) for name, value in environment.items()}
    try:
        settings = SlurmSettings(**given)
        check_settings(settings)
    except ConfigError as error:
        raise refusal(path, "", str(error)) from None
    return settings


def seconds_of(time: str) -> int:
    """Seconds of a time limit as sbatch reads it: minutes, MM:SS, HH:MM:SS, or DAYS-HH[:MM[:SS]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(each) for each in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def check_settings(settings: SlurmSettings) -> None:
    """Refuse what sbatch would misread: #SBATCH lines know no quotes.

    Raises:
        ConfigError: it names the setting and the mend.
    """
    for name, least in _COUNTS.items():
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name} {value!r}: it is a whole number of {least} or more")
    for name in _WORDS:
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, str) or not _WORD.fullmatch(value)):
            raise ConfigError(f"{name} {value!r}: sbatch takes one word here, in quotes in YAML; blanks and quotes are refused")
    if settings.time is not None and not _TIME.fullmatch(settings.time):
        raise ConfigError(f"time {settings.time!r}: give minutes, HH:MM:SS or DAYS-HH:MM:SS, in quotes in YAML")
    if settings.time is not None and seconds_of(settings.time) <= settings.signal_before_s:
        raise ConfigError(
            f"time {settings.time!r}: the signal to save comes {settings.signal_before_s} s before its end, so before the sweep "
            "has begun; give more time, or a smaller signal_before_s"
        )
    for name in ("exclusive", "requeue"):
        if not isinstance(getattr(settings, name), bool):
            raise ConfigError(f"{name} {getattr(settings, name)!r}: give true or false")
    for flag in settings.extra:
        if not flag.startswith("--") or not _WORD.fullmatch(flag):
            raise ConfigError(f"extra {flag!r}: a flag of sbatch is --NAME or --NAME=VALUE, without blanks")
    for line in settings.setup:
        if "\n" in line:
            raise ConfigError(f"setup {line!r}: one command an entry")
    for name, value in settings.environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"environment.{name}: that is no name of a variable; use letters, digits and _")
        if looks_secret(name):
            raise ConfigError(f"environment.{name}: a script is no place for a secret; put it into a file that setup reads")
        if "\n" in value:
            raise ConfigError(f"environment.{name}: a value of several lines; give one")
    if settings.array is not None and settings.nodes > 1:
        raise ConfigError(f"array {settings.array} with nodes {settings.nodes}: an array's tasks have one node each; drop one")


def render(template: str, settings: SlurmSettings, *, name: str, flags: Sequence[str], repository: str) -> str:
    """The batch script.

    Args:
        template: text of `launch/clusters/slurm.sbatch`.
        settings: checked.
        name: of the sweep, and so of the job.
        flags: of sweep.py.
        repository: this checkout, as the nodes see it.

    Raises:
        ConfigError: a setting is not what sbatch takes.
    """
    check_settings(settings)
    if not _WORD.fullmatch(name):
        raise ConfigError(f"--name {name!r}: a job's name has no blanks or quotes")
    top, rest = template.split("#SBATCH", 1)
    body = rest[rest.rindex("#SBATCH") :].partition("\n")[2]
    before, _, tail = body.partition(_BEGIN)
    _, _, after = tail.partition(_END)
    lines = [
        f"repository={shlex.quote(repository)}",
        f"python={shlex.quote(settings.python)}",
        f"requeues={int(settings.requeue)}",
        f"n_parts={settings.array or ''}",
        "first=0",
        f"set -- {shlex.join(flags)}",
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(settings.environment.items())),
        *(("set +u # what others have written", *settings.setup, "set -u") if settings.setup else ()),
    ]
    head = "#!/bin/bash\n# Made by python launch/submit.py --slurm.\n#\n"
    return head + "\n".join(_header(settings, name)) + "\n" + before + _BEGIN + "\n".join(lines) + "\n" + _END + after


def _header(settings: SlurmSettings, name: str) -> list[str]:
    output = settings.output.replace("%j", "%A_%a") if settings.array else settings.output
    alone = settings.exclusive or settings.nodes > 1
    asked: list[tuple[str, object]] = [
        ("job-name", name),
        ("nodes", settings.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", None if alone else settings.cpus_per_task),
        ("gpus-per-node", settings.gpus_per_node or None),
        ("array", None if settings.array is None else f"0-{settings.array - 1}"),
        *((key, getattr(settings, key)) for key in ("time", "mem", "partition", "account", "qos", "constraint")),
        ("open-mode", "append"),
        ("signal", f"B:TERM@{settings.signal_before_s}"),
        ("output", output),
    ]
    bare = ["--exclusive"] * alone + ["--requeue" if settings.requeue else "--no-requeue"]
    return [
        f"#SBATCH {each}" for each in (*(f"--{key}={value}" for key, value in asked if value is not None), *bare, *settings.extra)
    ]


def submit_to_slurm(args: argparse.Namespace, flags: Sequence[str] | None, *, root: Path, environment: Mapping[str, str]) -> int:
    """Check a sweep, render its script, and give it to sbatch; with --dry-run print it. Returns the exit code.

    Raises:
        HamuError: bad input, or there is no sbatch here.
    """
    from launch.submit_checks import check_sweep

    if flags is None or args.what or args.cluster or args.address:
        mend = (
            "give the flags of the sweep behind a --"
            if flags is None
            else "leave the cluster out; squeue and scancel look after it"
        )
        raise ConfigError(f"--slurm submits a batch script; {mend}")
    settings = read_slurm_settings(Path(args.settings) if args.settings else root / SETTINGS)
    given = {each.name: getattr(args, each.name, None) for each in fields(SlurmSettings)}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    if args.time is not None or args.partition is not None:
        check_settings(settings)
    asked = check_sweep(flags, storage=settings.storage_path, environment=environment)
    if settings.array is not None and any(flag.partition("=")[0] == "--part" for flag in flags):
        raise ConfigError(f"--part behind the --: --array {settings.array} shares the trials out by itself; leave --part out")
    if settings.array is not None and asked.n_trials is not None and settings.array > asked.n_trials:
        raise ConfigError(f"--array {settings.array}: the sweep has {asked.n_trials} trials; give as many tasks at most")
    settings = replace(settings, environment={**settings.environment, **asked.environment})
    script = render(
        (root / TEMPLATE).read_text(), settings, name=asked.name, flags=asked.flags, repository=settings.repository or str(root)
    )
    if args.dry_run:
        print(script, end="")
        return 0
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("there is no sbatch on the PATH; run this on a login node, or use --dry-run > job.sbatch")
    done = subprocess.run([sbatch, "--parsable"], input=script, text=True, capture_output=True)
    if done.returncode:
        print(f"error: sbatch refuses it: {' '.join((done.stderr or done.stdout).split())}", file=sys.stderr)
        return 1
    job = done.stdout.strip().partition(";")[0]
    trials = "its trials that are left" if asked.n_trials is None else f"{asked.n_trials} trials"
    print(f"sweep {asked.name}: {trials}, artifact root {asked.storage}")
    log = settings.output.replace("%x", asked.name).replace("%j", f"{job}_*" if settings.array else job)
    print(f"submitted as Slurm job {job}; its log: {log}\n  squeue --jobs={job}\n  scancel {job}")
    return 0
