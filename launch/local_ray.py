"""A Ray of this process's own, on this machine: it joins no cluster, asks for a token, and dies with the sweep."""

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

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean here
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process that was given no GPU sees none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are ours
    "TUNE_WARN_THRESHOLD_S": "1000000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # sweep.json and row.json are what a sweep resumes from
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
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


def prepare_environment(root: Path) -> None:
    """Set what Ray reads; call it before the first `import ray`. What the user has set stays, unless it would join a cluster.

    Workers import this repository's packages, installed or not, through PYTHONPATH.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("RAY_ADDRESS", None)
    if "RAY_AUTH_MODE" not in os.environ:
        # A token in memory: nobody else can use this Ray, and none is written to the home folder.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


@contextlib.contextmanager
def local_ray(*, cpus: int, gpus: int, shared_bytes: int, dashboard: bool) -> Iterator[str | None]:
    """Start Ray, give the dashboard's address (None without one), and stop Ray.

    Args:
        cpus, gpus: what trials may take.
        shared_bytes: size of what is put into the object store.
        dashboard: start it, on the loopback.
    """
    import ray

    folder = temporary_folder()
    _remove_dead_sessions(folder)
    context = ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=dashboard,
        dashboard_host="127.0.0.1",
        object_store_memory=256 * 2**20 + 2 * shared_bytes,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(folder / "ray"),  # Ray opens this one to all users, so it lies in one that is closed
    )
    try:
        token = os.environ.get("RAY_AUTH_TOKEN")
        asks = f" (it asks for the token {token})" if token and os.environ.get("RAY_AUTH_MODE") == "token" else ""
        yield f"http://{context.dashboard_url}{asks}" if context.dashboard_url else None
    finally:
        ray.shutdown()
        _remove_own(folder)


def tune_folder() -> Path:
    """Where Tune keeps its own state while this process runs; nothing reads it, `local_ray` removes it."""
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


def _remove_own(folder: Path) -> None:
    for session in (*folder.glob(f"ray/session_*_{os.getpid()}"), tune_folder()):
        shutil.rmtree(session, ignore_errors=True)
