"""Which GPUs this process may use, by what `nvidia-smi` lists and `CUDA_VISIBLE_DEVICES` lets through. Torch-free.

A GPU that is cut into MIG devices is no device itself: each of its parts is one, and is named by its UUID alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VISIBLE = "CUDA_VISIBLE_DEVICES"
_TIMEOUT_S = 20.0
_LINE = re.compile(r"\s*(?P<kind>GPU|MIG) (?P<what>.*?)\s*\(UUID:\s*(?P<uuid>[^)\s]+)\)")
_MIG_GB = re.compile(r"\.(\d+)gb")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A device of CUDA. id: what `CUDA_VISIBLE_DEVICES` calls it. memory_bytes: in all; None: not known."""

    id: str
    name: str
    memory_bytes: int | None = None
    is_mig: bool = False


def visible_gpus(environment: Mapping[str, str]) -> list[Gpu]:
    """The devices that CUDA shows to a process with this environment, in its order; none without `nvidia-smi`.

    As CUDA does, `CUDA_VISIBLE_DEVICES` is read up to the first entry that names no device: an index, a UUID or its beginning,
    a MIG device's UUID. An index or UUID of a GPU that is cut up means the first of its MIG devices.
    """
    cards = _cards()
    given = environment.get(VISIBLE)
    if given is None:
        return [device for card in cards for device in card.devices]
    found: list[Gpu] = []
    for entry in given.split(","):
        device = _named(entry.strip(), cards)
        if device is None or device in found:
            break
        found.append(device)
    return found


@dataclass(frozen=True, kw_only=True)
class _Card:
    """A whole GPU, and its MIG devices where it is cut up."""

    index: int
    uuid: str
    whole: Gpu
    parts: Sequence[Gpu] = ()

    @property
    def devices(self) -> Sequence[Gpu]:
        return self.parts or (self.whole,)


def _named(entry: str, cards: Sequence[_Card]) -> Gpu | None:
    """The device that an entry of `CUDA_VISIBLE_DEVICES` names."""
    if entry.startswith("MIG-"):
        return next((part for card in cards for part in card.parts if part.id == entry), None)
    for card in cards:
        is_it = card.uuid.startswith(entry) if entry.startswith("GPU-") else entry == str(card.index)
        if is_it:
            # An entry is kept as it was given: the numbers of CUDA need not be those of nvidia-smi.
            return card.parts[0] if card.parts else Gpu(id=entry, name=card.whole.name, memory_bytes=card.whole.memory_bytes)
    return None


def _cards() -> list[_Card]:
    tool = shutil.which("nvidia-smi")
    listed = "" if tool is None else _output(tool, "-L")
    if tool is None or not listed:
        return []
    memory = _memory_by_uuid(_output(tool, "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"))
    cards: list[_Card] = []
    for line in listed.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        what, uuid = match["what"], match["uuid"]
        if match["kind"] == "GPU":
            index, _, name = what.partition(":")
            whole = Gpu(id=index.strip(), name=name.strip(), memory_bytes=memory.get(uuid))
            cards.append(_Card(index=len(cards), uuid=uuid, whole=whole))
        elif cards:
            card, profile = cards[-1], what.split()[0]
            part = Gpu(id=uuid, name=f"{card.whole.name} MIG {profile}", memory_bytes=_memory_of_profile(profile), is_mig=True)
            cards[-1] = _Card(index=card.index, uuid=card.uuid, whole=card.whole, parts=(*card.parts, part))
    return cards


def _memory_by_uuid(listed: str) -> dict[str, int]:
    rows = [[part.strip() for part in line.split(",")] for line in listed.splitlines()]
    return {row[0]: int(row[1]) * 2**20 for row in rows if len(row) == 2 and row[1].isdigit()}


def _memory_of_profile(profile: str) -> int | None:
    """Bytes of a MIG device by the name of its profile, such as 1g.5gb: decimal gigabytes, a little less than it really has."""
    match = _MIG_GB.search(profile)
    return int(match[1]) * 10**9 if match else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
