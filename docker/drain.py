"""Have the trials of this machine's Ray node save themselves and leave it, before the machine or the container goes.

    python docker/drain.py 45          waits until the node is idle, or 45 s are over

What knows beforehand that the machine goes calls it: a preStop hook of Kubernetes, a shutdown script of a cloud. The node is
marked as one that is to be taken away; its trials save, leave, and go on where there is room. Nothing new begins on it: it cannot
be used afterwards. Standard library alone, and `ray` from the PATH with the token in the environment.

Exit codes: 0 the node is idle and has ended, or there is none here; 1 the seconds are over, or it could not be told.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

_POLL_S = 0.5
_SECONDS = 45


def raylets(proc: Path = Path("/proc")) -> dict[int, tuple[str, str]]:
    """Process id of each Ray node here -> address of its head, and its own id."""
    found = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if Path(command[0]).name != "raylet":
            continue
        flags = dict(word.removeprefix("--").partition("=")[::2] for word in command[1:] if "=" in word)
        if "gcs-address" in flags and "node_id" in flags:
            found[int(folder.name)] = flags["gcs-address"], flags["node_id"]
    return found


def drain(seconds: int, proc: Path = Path("/proc")) -> int:
    """Drain the nodes of this machine and wait for them; returns the exit code."""
    deadline = time.monotonic() + seconds
    here = raylets(proc)
    asked = {}
    for pid, (address, node_id) in here.items():
        command = [
            "ray", "drain-node", f"--address={address}", f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=its machine goes", f"--deadline-remaining-seconds={seconds}",
        ]  # fmt: skip
        asked[pid] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        refused = [pid for pid, each in asked.items() if each.wait(max(1.0, deadline - time.monotonic()))]
    except subprocess.TimeoutExpired:
        refused = list(asked)
    if refused:
        sys.stderr.write("the head could not be told that this node goes; its trials go on from their last checkpoints\n")
        return 1
    while here.keys() & raylets(proc).keys():
        if time.monotonic() >= deadline:
            sys.stderr.write(f"the node is not idle after {seconds} s; what runs on it goes on from its last checkpoint\n")
            return 1
        time.sleep(_POLL_S)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    sys.exit(drain(int(sys.argv[1]) if len(sys.argv) > 1 else _SECONDS))
