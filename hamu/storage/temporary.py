"""The names of files that are being written: a dot, the later name, who writes, and nothing that two writers could share."""

from __future__ import annotations

import os
import re
import socket
from functools import cache
from pathlib import Path

SUFFIX = ".tmp"


def temporary_for(path: Path) -> Path:
    """Give ".<name>.<writer>.tmp" in the folder of a path; the writer has no dot, so that the name can be read back.

    Process ids do not do: containers on several hosts of one network folder have the same ones.
    """
    return path.parent / f".{path.name}.{_host()}-{os.getpid()}-{os.urandom(4).hex()}{SUFFIX}"


def name_of(temporary: str) -> str:
    """The later name of a file that was called by `temporary_for`, "" where it was not."""
    name, _, suffix = temporary.rpartition(".")
    name, _, writer = name.rpartition(".")
    return name[1:] if f".{suffix}" == SUFFIX and writer and name.startswith(".") else ""


@cache
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:24] or "host"
