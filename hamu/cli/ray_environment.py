"""What surrounds a Ray of this process's own: it joins no cluster, asks for a token, and leaves nothing behind.

Imports no Ray: `prepare_environment` is called before anything does.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hamu.training.ray_workers import RAY_TRAIN_SETTINGS

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean here
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process that was given no GPU sees none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no metrics
    "TUNE_WARN_THRESHOLD_S": "1000000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # sweep.json and row.json are what a sweep resumes from
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_task_oom_retries": "2",  # Ray's default tries a task that fills the memory for ever
}
_MADE_HERE: set[str] = set()  # tokens
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MAX_PATH = 107  # of a Unix socket
_SOCKETS = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"


def temporary_folder() -> Path:
    """A folder of this user's, short enough for the names of Ray's sockets.

    Raises:
        OSError: another user has put one of that name there.
    """
    places = [Path(tempfile.gettempdir()), Path("/tmp")]
    place = next((place for place in places if len(f"{place}/hamu-{os.getuid()}{_SOCKETS}") < _MAX_PATH), places[-1])
    folder = place / f"hamu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
    folder.chmod(0o700)
    return folder


def worker_environment() -> dict[str, str]:
    """What processes of a cluster that is joined are given: they do not inherit it, as those of a Ray of our own do."""
    return {**_SETTINGS, **RAY_TRAIN_SETTINGS}


def prepare_environment(root: Path, *, joins_cluster: bool = False) -> None:
    """Set what Ray reads; call it before the first `import ray`. What the user has set stays, unless it would join a cluster
    that no flag names.

    Workers import this repository's packages, installed or not, through PYTHONPATH.

    Args:
        root: of the repository.
        joins_cluster: a cluster that somebody else has started asks for that one's token, if any.
    """
    for name, value in (_SETTINGS | RAY_TRAIN_SETTINGS).items():
        os.environ.setdefault(name, value)
    os.environ.pop("RAY_ADDRESS", None)
    if not joins_cluster and "RAY_AUTH_MODE" not in os.environ:
        # A token in memory: nobody else can use this Ray, and none is written to the home folder.
        os.environ["RAY_AUTH_MODE"] = "token"
        _MADE_HERE.add(os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32)))
    paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """Give the folder for a Ray's temporary files, and remove what this process has left there; dead sessions' files too."""
    folder = temporary_folder()
    _remove_dead_sessions(folder)
    try:
        yield folder
    finally:
        for session in (*folder.glob(f"ray/session_*_{os.getpid()}"), tune_folder()):
            shutil.rmtree(session, ignore_errors=True)


def token_hint(*, is_terminal: bool) -> str:
    """What a user needs to open the dashboard, to be printed behind its address; empty where it asks for nothing.

    A token is shown on a terminal only, and only one that was made here for this Ray alone.
    """
    token = os.environ.get("RAY_AUTH_TOKEN")
    if not token or os.environ.get("RAY_AUTH_MODE") != "token":
        return ""
    if is_terminal and token in _MADE_HERE:
        return f" (it asks for the token {token})"
    return " (it asks for the token: set RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN of your own before)"


def tune_folder() -> Path:
    """Where Tune keeps its own state while this process runs; nothing reads it, `ray_folder` removes it."""
    return temporary_folder() / f"tune_{os.getpid()}"


def _remove_dead_sessions(folder: Path) -> None:
    """Drop logs and sockets of sweeps that were killed; a name ends with the process that it belongs to.

    Only old ones: a live process of another container may share the folder and not be seen from here.
    """
    for session in (*folder.glob("ray/session_*"), *folder.glob("tune_*")):
        match = re.search(r"_(\d+)$", session.name)
        with contextlib.suppress(OSError):
            is_old = time.time() - max(session.stat().st_mtime, *(each.stat().st_mtime for each in session.iterdir())) > 3600
            if match and is_old and not Path(f"/proc/{match[1]}").exists():
                shutil.rmtree(session, ignore_errors=True)


def usable_cores() -> int:
    """Cores that this process may use: of its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores
