"""A Parquet file of ours is one for every reader, and any byte of it that has changed is found."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hamu.errors import CorruptError
from hamu.storage.parquet import check_parquet, open_parquet, write_parquet

TABLE = pa.table({"step": list(range(20)), "loss": [0.5 * step for step in range(20)]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "a.parquet", [TABLE.slice(0, 15), TABLE.slice(15)])
    return tmp_path / "a.parquet"


def test_any_reader_reads_it_page_checksums_included(path: Path) -> None:
    assert pq.read_table(path, page_checksum_verification=True).equals(TABLE)
    with open_parquet(path) as file:
        assert (file.num_row_groups, file.read_row_group(1).num_rows) == (2, 5)


@pytest.mark.slow
def test_any_flipped_byte_and_any_cut_is_found(path: Path) -> None:
    good = path.read_bytes()
    mark = good.index(b"hamu-sha256:")
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        if mark <= place < mark + 12:  # only our own mark is another: the file is as any other program's, and whole
            with open_parquet(path) as file:
                assert file.read().equals(TABLE)
            continue
        with pytest.raises(CorruptError, match=r"a\.parquet is broken"):
            check_parquet(path)
        with pytest.raises(CorruptError):
            open_parquet(path)
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptError):
            check_parquet(path)


def test_a_file_of_other_hands_is_read_and_its_page_checksums_are_looked_at(path: Path) -> None:
    pq.write_table(TABLE, path, compression="none", use_dictionary=False, write_page_checksum=True)
    check_parquet(path)
    bad = bytearray(path.read_bytes())
    bad[bad.index(TABLE["loss"].chunk(0).buffers()[1].to_pybytes()[8:40])] ^= 1
    path.write_bytes(bad)
    with pytest.raises(CorruptError):
        check_parquet(path)


def test_an_empty_table_is_a_file_without_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [TABLE.slice(0, 0)])
    with open_parquet(tmp_path / "a.parquet") as file:
        assert file.read().equals(TABLE.slice(0, 0))
