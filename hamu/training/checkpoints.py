"""What a run needs to go on as if it had never stopped, in one file that is complete whenever it is there."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from hamu.errors import CheckpointError, CorruptError
from hamu.storage import mount
from hamu.storage.files import patiently, replacing

_MARK = b"hamu-sha256:"  # the comment of the zip file: this, and the digest in hex


def save_checkpoint(path: Path, state: dict[str, Any], *, wait: Callable[[str], None] | None = None) -> None:
    """Write tensors, numbers, strings and containers of them; a killed process leaves the last complete file.

    Args:
        path: of the file.
        state: what is kept.
        wait: as in `files.patiently`, for a storage that is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            digested = _Digested(file)
            torch.save(state, cast(IO[bytes], digested))
            file.seek(-2, os.SEEK_END)  # the length of the archive's comment, which is the last entry of a zip without one
            file.write(struct.pack("<H", len(_MARK) + 64) + _MARK + digested.hexdigest().encode())

    patiently(write, wait=wait, folder=path.parent)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, tensors on the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        CorruptError: it was cut, or changed since.
        CheckpointError: the file cannot be read; a CorruptError is one.
    """
    mount.fetch(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} is not there; a checkpoint is one file written by this program")
    if not _is_as_written(path):
        raise CorruptError(path, "its content does not match its checksum")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a broken file
        raise CorruptError(path, f"{type(error).__name__} while it was read") from error


class _Digested:
    """A file to which torch writes, and the SHA-256 of what it wrote but for the last two bytes.

    torch's own checksums do not do: it writes them, but does not look at them when it reads.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._held = file, hashlib.sha256(), b""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        n_bytes = len(view)
        self._file.write(view)
        if n_bytes >= 2:
            self._digest.update(self._held)
            self._digest.update(view[:-2])
            self._held = bytes(view[-2:])
        else:
            held = self._held + bytes(view)
            self._digest.update(held[:-2])
            self._held = held[-2:]
        return n_bytes

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _is_as_written(path: Path) -> bool:
    """Whether a checkpoint matches its checksum; of one without, whether the parts of the zip file match theirs."""
    size = path.stat().st_size
    tail = len(_MARK) + 64
    with path.open("rb") as file:
        file.seek(max(0, size - tail))
        mark, said = file.read(len(_MARK)), file.read(64)
        if mark != _MARK:
            try:
                file.seek(max(0, size - 2))
                with zipfile.ZipFile(path) as archive:
                    return file.read() == b"\0\0" and not archive.comment and archive.testzip() is None
            except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error):
                return False
        digest, left = hashlib.sha256(), size - tail - 2
        file.seek(0)
        buffer = bytearray(2**20)
        while left > 0 and (n_read := file.readinto(memoryview(buffer)[: min(left, len(buffer))])):
            digest.update(memoryview(buffer)[:n_read])
            left -= n_read
        return left == 0 and digest.hexdigest().encode() == said and file.read(2) == struct.pack("<H", tail)


def changing_state(model: nn.Module) -> dict[str, Tensor]:
    """What a run can change of a model: the parameters that require a gradient and the buffers, by their names in `state_dict`.

    Of a LoRA adapter on a frozen base that is the adapter alone.
    """
    frozen = {name for name, param in model.named_parameters(remove_duplicate=False) if not param.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_changing_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `changing_state` gave of the same model.

    Raises:
        RuntimeError: a tensor is missing, left over, or of another shape.
    """
    here = changing_state(model)
    if here.keys() != state.keys():
        odd = sorted(here.keys() ^ state.keys())
        raise RuntimeError(f"the state has not the model's tensors; of one alone: {', '.join(odd[:3])}{', ...' * (len(odd) > 3)}")
    model.load_state_dict(dict(state), strict=False)
