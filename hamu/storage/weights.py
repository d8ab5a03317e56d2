"""Whether files of weights are whole, by their sizes: their content would take as long to read as it took to write."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from hamu.errors import CorruptError

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def check_weights(path: Path) -> None:
    """Make sure that a safetensors file is as long as its header says.

    Raises:
        CorruptError: it is not, or has no header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        n_header = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if n_header > min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptError(path, "its header is not whole")
        try:
            header = json.loads(file.read(n_header))
            n_bytes = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise CorruptError(path, "its header is no safetensors header") from None
    if size != 8 + n_header + n_bytes:
        raise CorruptError(path, f"it has {size} bytes, its header says {8 + n_header + n_bytes}")
