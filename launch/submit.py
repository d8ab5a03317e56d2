"""Submit a sweep to a Ray cluster as a job, or to Slurm as a batch script, and look after it.

    python launch/submit.py --cluster FILE -- --space cifar/grid --name run1     send it, and follow its log (Ctrl-C: look away)
    python launch/submit.py --cluster FILE --dry-run -- --space cifar/grid       what would be sent; nothing is contacted
    python launch/submit.py --cluster FILE --no-wait -- --resume run1            go on with a sweep, and do not wait for it
    python launch/submit.py list --cluster FILE                                  the jobs of the cluster
    python launch/submit.py status run1-3fa9c1 --cluster FILE
    python launch/submit.py logs run1-3fa9c1 --follow --cluster FILE
    python launch/submit.py stop run1-3fa9c1 --cluster FILE                      its trials save their checkpoints first
    python launch/submit.py --slurm --nodes 2 --gpus-per-node 4 --time 12:00:00 -- --space cifar/grid --name run1
    python launch/submit.py --slurm --array 4 --dry-run -- --space cifar/grid --name run1 --storage-path /shared/hamu

What stands behind the -- are the flags of launch/sweep.py. They are checked here first, the trials too, so that a typo is
refused in a second and not in an hour. The job gets hamu/, tune_spaces/, launch/ and pyproject.toml, about a megabyte; results
lie under the artifact root (--storage-path, or storage_path in the cluster's settings), which all nodes must share. Its
interpreter is the one that Ray's nodes run, or `python` of the settings. Secrets are never sent: put them into the settings'
secrets_file on the cluster.

A cluster that is not on the loopback asks for a token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token
(mode 600).

Exit codes: 0 the job succeeded (or was submitted, with --no-wait), 1 it failed, or runs on after `stop`, 2 bad input or no
cluster there, 130 detached from a job that runs on, 143 the job was stopped; else that of the sweep.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

_ROOT = Path(__file__).resolve().parents[1]
# As a script, Python puts launch/ first on the path: its modules would hide others of their names.
sys.path[:] = [str(_ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (_ROOT, _ROOT / "launch"))]

from hamu.cli.security import MODE, check_dashboard, check_token, find_token  # noqa: E402
from hamu.errors import ConfigError, HamuError, unknown  # noqa: E402
from launch.cluster import Cluster, read_cluster  # noqa: E402
from launch.cluster_checks import check_filled_in  # noqa: E402
from launch.submit_checks import Asked, check_sweep  # noqa: E402
from launch.working_dir import cluster_in_job, measure, megabytes, staged  # noqa: E402

if TYPE_CHECKING:
    from launch.jobs import Jobs

ACTIONS = {"status": True, "logs": True, "stop": True, "list": False}
"""What is done with jobs, and whether it takes the id of one."""

DETACHED, STOPPED = 130, 143
_PYTHON = "python"


def build_parser() -> argparse.ArgumentParser:
    """The flags before the `--`."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            hint = "; the flags of the sweep stand behind a --" if "unrecognized" in message else ""
            raise ConfigError(f"{message}{hint}; see python launch/submit.py --help")

    parser = Parser(
        prog="python launch/submit.py", description=str(__doc__), allow_abbrev=False,
        usage="%(prog)s [flags] -- [flags of sweep.py]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("what", nargs="*", metavar="status|logs|stop ID, list", help="look after a job that was submitted")
    add("--cluster", metavar="FILE", help="the cluster file, such as launch/clusters/onprem.yaml, with its settings beside it")
    add("--address", metavar="URL", help="of Ray's dashboard, such as http://127.0.0.1:8265 (default: that of the cluster file)")
    add("--dry-run", action="store_true", help="print what would be submitted and stop; nothing is contacted")
    add("--no-wait", action="store_true", help="submit, print the job's id and stop")
    add("--follow", action="store_true", help="with logs: go on until the job ends")
    add("--debug", action="store_true", help="show tracebacks")
    from launch.slurm import add_flags

    add_flags(parser.add_argument_group("Slurm"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python launch/submit.py`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, None)
    job = None
    try:
        args = build_parser().parse_intermixed_args(own)
        if args.slurm:
            from launch.slurm import submit_to_slurm

            return submit_to_slurm(args, flags, root=_ROOT, environment=os.environ)
        cluster = read_cluster(Path(args.cluster)) if args.cluster else None
        action, job = _action(args, flags)
        if action is None:
            return _submit(args, flags or [], cluster)
        jobs = _connect(_url(args, cluster))
        return _look_after(jobs, action, job, args)
    except HamuError as error:
        if "--debug" in own:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return DETACHED
    except Exception as error:
        if type(error).__name__ != "LostError" or "--debug" in own:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1


def _action(args: argparse.Namespace, flags: list[str] | None) -> tuple[str | None, str]:
    """What is to be done, and with which job; None: submit."""
    if not args.what:
        if flags is None:
            raise ConfigError(
                "nothing to submit: the flags of the sweep stand behind a --, such as -- --space cifar/grid --name run1"
            )
        return None, ""
    action, *rest = args.what
    if action not in ACTIONS:
        raise ConfigError(unknown("word", action, ACTIONS) + "; the flags of a sweep stand behind a --")
    if flags is not None:
        raise ConfigError(f"{action} takes no flags of a sweep; leave out the -- and what follows")
    if len(rest) != ACTIONS[action]:
        raise ConfigError(
            f"{action} takes {'the id of one job' if ACTIONS[action] else 'no job'}, got {' '.join(rest) or 'none'}"
        )
    return action, rest[0] if rest else ""


def _submit(args: argparse.Namespace, flags: list[str], cluster: Cluster | None) -> int:
    settings = cluster.settings if cluster else None
    asked = check_sweep(flags, environment=os.environ, cluster=cluster)
    if args.follow:
        raise ConfigError("--follow belongs to logs; a submission is followed unless --no-wait is given")
    url = _url(args, cluster)
    file = cluster.path if cluster else None
    environment = {**(settings.environment if settings else {}), **asked.environment}
    python = settings.python if settings else None
    root = Path(settings.working_dir).expanduser() if settings and settings.working_dir else _ROOT
    sent = (*(("--cluster", cluster_in_job(file, root)) if file else ()), *asked.flags)
    with staged(root, cluster_file=file) as folder:
        n_files, n_bytes = measure(folder)
        print(_what(asked))
        print(f"working directory: {n_files} files, {megabytes(n_bytes)}")
        print(f"environment: {', '.join(sorted(environment)) or 'nothing is sent'}")
        if args.dry_run:
            print(f"entrypoint: {entrypoint(python or _PYTHON, sent)}")
            print(f"python: {python or 'that which the nodes of Ray run, else the one on their path'}")
            print(f"dry run: it would be submitted to {url}; nothing was contacted")
            return 0
        if cluster is not None:
            check_filled_in(cluster)
        jobs = _connect(url)
        python = python or jobs.node_python() or _PYTHON
        job = f"{''.join(c if c.isalnum() or c in '-_.' else '-' for c in asked.name)}-{secrets.token_hex(3)}"
        metadata = {"sweep": asked.name, "space": asked.space, "storage": asked.storage}
        if asked.n_trials is not None:
            metadata["trials"] = str(asked.n_trials)
        jobs.submit(
            entrypoint=entrypoint(python, sent), submission_id=job, folder=folder, environment=environment, metadata=metadata
        )
    print(f"submitted to {url} as {job}, on {python}", flush=True)
    if args.no_wait:
        print(_next_steps(job, args))
        return 0
    return _follow(jobs, job, args)


def entrypoint(python: str, flags: Sequence[str]) -> str:
    """The command of the job: a look whether the interpreter has our packages, then the sweep in the shell's own process, so that
    a signal to the job reaches it."""
    quoted = f"~/{shlex.quote(python[2:])}" if python.startswith("~/") else shlex.quote(python)
    return f"{quoted} launch/interpreter.py && exec {quoted} launch/sweep.py {shlex.join(flags)}"


def _what(asked: Asked) -> str:
    trials = "its trials that are left" if asked.n_trials is None else f"{asked.n_trials} trials"
    space = f" of {asked.space}" if asked.space else ""
    return f"sweep {asked.name}: {trials}{space}, artifact root {asked.storage}"


def _url(args: argparse.Namespace, cluster: Cluster | None) -> str:
    """Of the job server.

    Raises:
        ConfigError: nobody has named one, or it asks for no token though others reach it.
    """
    if args.address is None and cluster is None:
        raise ConfigError(
            "no cluster: give --cluster FILE, or --address with the URL of Ray's dashboard, such as http://127.0.0.1:8265"
        )
    if args.address is None and cluster is not None and cluster.dashboard is None:
        raise ConfigError(f"{args.cluster} is this machine, which needs no job: use launch/sweep.py, or give --address URL")
    url = str(args.address or (cluster.dashboard if cluster else ""))
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ConfigError("--address: the URL of Ray's dashboard is http(s)://HOST:PORT, with no name or password")
    return url.rstrip("/")


def _connect(url: str) -> Jobs:
    """Reach the job server with the token of this user.

    Raises:
        ConfigError: it may not be used without a token, has none, or does not answer.
    """
    parts = urlsplit(url)
    check_token(f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname), os.environ, Path.home())
    token = find_token(os.environ, Path.home())
    check_dashboard(url, token)
    if token is not None:
        os.environ.setdefault(MODE, "token")  # the near end of a tunnel to a cluster that asks for it
    from launch.jobs import Jobs

    return Jobs(url)


def _look_after(jobs: Jobs, action: str, job: str, args: argparse.Namespace) -> int:
    from launch.jobs import STOPPED_WITHIN_S, has_failed
    from launch.jobs_text import job_line, jobs_table

    if action == "list":
        print(jobs_table(jobs.all()))
        return 0
    if action == "logs" and args.follow:
        jobs.details(job)
        return _follow(jobs, job, args)
    if action == "logs":
        sys.stdout.write(jobs.logs(job))
        return 0
    if action == "stop" and (before := jobs.details(job)).status.is_terminal():
        print(job_line(before))
        print(f"{job} had ended already; nothing was stopped")
        return 0
    details = jobs.stop(job, say=_say) if action == "stop" else jobs.details(job)
    print(job_line(details))
    if action == "stop" and not details.status.is_terminal():
        _say(f"{job} still runs, {STOPPED_WITHIN_S} s after it was asked to stop; look at its log, then ask again")
        return 1
    known = details.metadata or {}
    if action == "stop" and (name := known.get("sweep")):
        root = f" --storage-path {known['storage']}" if known.get("storage") else ""
        print(f"go on with it by {_command(args)} -- --resume {name}{root}")
    return 1 if action == "status" and has_failed(details) else 0


def _follow(jobs: Jobs, job: str, args: argparse.Namespace) -> int:
    from launch.jobs import LostError
    from launch.jobs_text import ended_line, exit_code

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        details = jobs.follow(job, write=write, say=_say)
    except KeyboardInterrupt:
        print(f"\ndetached: {job} goes on\n{_next_steps(job, args)}", file=sys.stderr)
        return DETACHED
    except LostError as error:
        print(f"{error}\ndetached: {job} goes on, if its cluster does\n{_next_steps(job, args)}", file=sys.stderr)
        return DETACHED
    print(ended_line(details), file=sys.stderr)
    return exit_code(details)


def _next_steps(job: str, args: argparse.Namespace) -> str:
    where = _where(args)
    return "\n".join(
        f"  python launch/submit.py {each} {where}" for each in (f"logs {job} --follow", f"status {job}", f"stop {job}")
    )


def _command(args: argparse.Namespace) -> str:
    return f"python launch/submit.py {_where(args)}"


def _where(args: argparse.Namespace) -> str:
    given = [("--cluster", args.cluster), ("--address", args.address)]
    return shlex.join(part for flag, value in given if value for part in (flag, value))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
