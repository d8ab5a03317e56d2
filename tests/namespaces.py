"""Network namespaces, bridges and cables of the tests: made by name, removed with the processes in them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_FIRST, _LAST = 64, 191  # of x in 10.x.0.0/24
_NAME = re.compile(r"hamu-(\d+)-(\d+)-(head|worker)")


def skip_reason() -> str | None:
    """Why no namespaces can be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2, whose `ip` is not on PATH"
    name = f"hamu-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", f"ht{os.getpid()}", "type", "bridge")
        ip("link", "add", f"hv{os.getpid()}", "type", "veth", "peer", "name", "eth0", "netns", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    finally:
        for each in (f"ht{os.getpid()}", f"hv{os.getpid()}"):
            ip("link", "delete", each, check=False)
        ip("netns", "delete", name, check=False)
    return None


def claim_subnet() -> int:
    """A subnet that no other process has; its bridge is the claim, since a second one of a name is refused."""
    n = _LAST - _FIRST + 1
    for i in range(n):
        subnet = _FIRST + (os.getpid() + i) % n
        if ip("link", "add", bridge_of(subnet), "type", "bridge", check=False).returncode == 0:
            return subnet
    raise OSError(f"all subnets from 10.{_FIRST}.0.0 to 10.{_LAST}.0.0 are taken")


def remove_orphans(owner: str | None = None) -> None:
    """Remove the namespaces and bridges of test runs that were killed; owner: of this process instead, dead or dying."""
    for name in ip("netns", "list").stdout.split():
        match = _NAME.fullmatch(name)
        if match and (match[1] == owner or not Path(f"/proc/{match[1]}").exists()):
            remove_namespace(name)
            ip("link", "delete", bridge_of(int(match[2])), check=False)
            for folder in Path("/tmp").glob(f"hn{match[2]}-*"):
                shutil.rmtree(folder, ignore_errors=True)


def remove_namespace(name: str) -> None:
    kill_all(name)
    ip("netns", "delete", name, check=False)


def kill_all(namespace: str) -> None:
    """Kill until nothing is left: a process may start another between the listing and the signal."""

    def is_empty() -> bool:
        pids = pids_in(namespace)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(is_empty, f"an empty namespace {namespace}", 20)


def pids_in(namespace: str) -> list[int]:
    """Processes in a namespace; a dead one that nobody has waited for is in none."""
    found = ip("netns", "pids", namespace, check=False)
    return [int(pid) for pid in found.stdout.split()]


def bridge_of(subnet: int) -> str:
    return f"hn{subnet}b"


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check, timeout=20)


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


if __name__ == "__main__":  # beside each cluster: its end of the pipe closes when the test run dies, however it dies
    sys.stdin.read()
    remove_orphans(owner=sys.argv[1])
