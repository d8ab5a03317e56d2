"""Parquet files that are whole when they are there and say so: any byte that has changed since is found.

Pages carry Parquet's own checksums, which any reader can verify. They cover neither the footer nor what stands before a page, and
to verify them is to decode the file; so before the footer, where readers follow offsets and see nothing, stands a SHA-256 of all
the rest. Verifying that costs no more than reading the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hamu.errors import CorruptError
from hamu.storage.files import patiently, replacing

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_MARK = b"hamu-sha256:"
_SEAL = len(_MARK) + hashlib.sha256().digest_size
_END = 8  # bytes: the footer's length, and PAR1


def write_parquet(path: Path, groups: Sequence[pa.Table], *, wait: Callable[[str], None] | None = None) -> None:
    """Write tables of one schema, at least one, as the row groups of a file; an empty table makes none.

    Args:
        path: replaced whole.
        groups: the tables.
        wait: as in `files.patiently`, for a storage that is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, groups[0].schema, compression="zstd", write_page_checksum=True) as writer:
        for table in groups:
            if table.num_rows:
                writer.write_table(table, row_group_size=table.num_rows)
    content = memoryview(sink.getvalue())
    cut = len(content) - _END - int.from_bytes(content[-_END:-4], "little")

    def write() -> None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(content[:cut])
            file.write(_MARK + hashlib.sha256(content).digest())
            file.write(content[cut:])

    patiently(write, wait=wait, folder=path.parent)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file of `write_parquet`, all of it checked; one of other hands is taken if its pages match their checksums, if any.

    Raises:
        CorruptError: it is no complete Parquet file, or not as it was written.
        FileNotFoundError: it is not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path.read_bytes()
    try:
        if not _is_sealed(content):
            pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
        return pq.ParquetFile(pa.BufferReader(content))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptError(path, f"no complete Parquet file: {' '.join(str(error).split())[:100]}") from None


def check_parquet(path: Path) -> None:
    """Make sure that a file is whole; where it has our checksum, without a Parquet library.

    Raises:
        CorruptError: it is not.
        FileNotFoundError: it is not there.
    """
    try:
        sealed = _is_sealed(path.read_bytes())
    except ValueError as error:
        raise CorruptError(path, str(error)) from None
    if not sealed:
        open_parquet(path)


def _is_sealed(content: bytes) -> bool:
    """Whether our checksum is there and right; without one it is not.

    Raises:
        ValueError: it is there and wrong, or the content has no end of a Parquet file.
    """
    if len(content) < _END or content[-4:] != b"PAR1":
        raise ValueError("no complete Parquet file: its end is missing")
    cut = len(content) - _END - int.from_bytes(content[-_END:-4], "little")
    if cut < _SEAL or content[cut - _SEAL : cut - _SEAL + len(_MARK)] != _MARK:
        return False
    view = memoryview(content)
    digest = hashlib.sha256(view[: cut - _SEAL])
    digest.update(view[cut:])
    if digest.digest() != content[cut - _SEAL + len(_MARK) : cut]:
        raise ValueError("its content does not match its checksum")
    return True
