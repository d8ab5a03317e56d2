"""A file is whole when it is there, a broken one is named and set aside, and a full storage is waited for."""

from __future__ import annotations

import errno
import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hamu.errors import CheckpointError, CorruptError, DataError
from hamu.storage import files
from hamu.storage.files import is_full, on_wait, patiently, read_json, set_aside, write_json, write_new_json
from hamu.storage.shared_json import changing_json
from hamu.storage.temporary import temporary_for
from hamu.training.records import Recorder

VALUES: list[Any] = [
    {}, {"a": 1}, {"a": {"sha256": "x"}, "b": [1.5, None, "ü"], "c": {}}, [], [1, {"a": 2}], "text", 3,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_json_comes_back_as_it_was_written(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_numbers_of_numpy_and_those_that_json_lacks_are_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": np.float32(0.5), "b": np.int64(3), "c": float("nan"), "d": tmp_path})
    assert read_json(tmp_path / "a.json") == {"a": 0.5, "b": 3, "c": None, "d": str(tmp_path)}


def test_any_changed_byte_of_the_content_is_found(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"loss": 1.25, "name": "ft", "list": [1, 2]}
    write_json(path, value)
    good = path.read_bytes()
    content = good.index(b'"sha256"')
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        try:
            found = read_json(path)
        except CorruptError:
            pass
        else:  # a changed space or name of the checksum's own entry: nothing of the content is another
            assert place >= content - 5
            assert {key: found.get(key) for key in value} == value


def test_any_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.25})
    good = path.read_bytes()
    for size in range(len(good) - 2):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptError, match=r"a\.json is broken") as caught:
            read_json(path)
        assert caught.value.path == path


def test_json_of_other_hands_and_json_formatted_anew_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    write_json(path, {"a": 1, "b": {"c": 2.5}})
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_json(path) == {"a": 1, "b": {"c": 2.5}}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_corrupt_file_is_an_error_of_data_and_of_a_checkpoint() -> None:
    error = CorruptError("/a/b.pt", "cut")
    assert isinstance(error, DataError)
    assert isinstance(error, CheckpointError)
    assert str(error).startswith("/a/b.pt is broken and cannot be read (cut)")


def test_what_is_set_aside_is_kept_under_another_name(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "a.json").write_text(content)
        set_aside(tmp_path / "a.json")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.json.corrupt-1": "first", "a.json.corrupt-2": "second",
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").touch()
    assert (set_aside(tmp_path / "model") / "weights").exists()


def test_a_temporary_name_tells_its_file_and_is_no_other_writers(tmp_path: Path) -> None:
    """Processes of two containers on one network folder may have the same id."""
    path = tmp_path / "a.b-00001.parquet"
    first, second = temporary_for(path), temporary_for(path)
    assert first != second
    assert first.parent == tmp_path and first.match(".*.tmp")
    assert first.name[1:].rsplit(".", 2)[0] == path.name
    assert socket.gethostname().split(".")[0][:10] in first.name


def test_a_recorder_clears_away_what_a_killed_process_of_any_host_has_left(tmp_path: Path) -> None:
    left = temporary_for(tmp_path / "t.x-00000.parquet")
    other = temporary_for(tmp_path / "t-00000.parquet")
    for path in (left, other):
        path.write_bytes(b"half")
    Recorder(tmp_path, {"trial_id": "t.x"}).start_anew()
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_is_there_is_not_created_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    if not has_links:

        def refuse(*paths: Path) -> None:
            raise PermissionError(errno.EPERM, "no links")

        monkeypatch.setattr("os.link", refuse)
    assert write_new_json(tmp_path / "a.json", {"n": 1})
    assert not write_new_json(tmp_path / "a.json", {"n": 2})
    assert read_json(tmp_path / "a.json") == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_several_processes_add_to_a_file_is_all_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def add(n: int) -> None:
        with changing_json(path, {}) as value:
            value[str(n)] = n

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert read_json(path) == {str(n): n for n in range(8)}


def add_and_fail(value: list[int]) -> None:
    value.append(1)
    raise KeyError


def test_a_shared_file_is_written_where_there_is_news_only_and_a_broken_one_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with changing_json(path, []) as value:
        assert value == []
    assert not path.exists()
    with pytest.raises(KeyError), changing_json(path, []) as value:
        add_and_fail(value)
    assert not path.exists()
    path.write_text("{")
    with changing_json(path, []) as value:
        value.append(1)
    assert read_json(path) == [1]
    assert (tmp_path / "a.json.corrupt-1").read_text() == "{"


def test_a_full_storage_is_waited_for_and_other_errors_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_S", 0.01)
    left, said = [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota")], []

    def write() -> str:
        if left:
            raise left.pop()
        return "done"

    assert patiently(write, wait=said.append, folder=tmp_path) == "done"
    assert len(said) == 2
    assert said[0].startswith(f"{tmp_path} is full (")
    assert said[0].endswith(" GiB free); waiting for space")

    def refuse() -> None:
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        patiently(refuse, wait=said.append)
    assert len(said) == 2


def test_waiting_ends_when_patience_does_or_when_wait_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_S", 0.01)

    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    with pytest.raises(OSError, match="No space left"):
        patiently(write, patience_s=0.05)

    def stopped(message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patiently(write, wait=stopped)
    with pytest.raises(files.StorageFullError, match="/tmp is full"):
        patiently(write, wait=files.unwilling)


def test_a_wait_without_a_listener_is_logged_once_and_told_to_the_hook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "RETRY_S", 0.01)
    left, told = [OSError(errno.ENOSPC, "full")] * 3, []

    def write() -> None:
        if left:
            raise left.pop()

    on_wait(told.append)
    try:
        with caplog.at_level(logging.WARNING):
            patiently(write)
    finally:
        on_wait(None)
    assert (len(told), len(caplog.records)) == (3, 1)


def test_a_full_storage_is_recognised_in_what_libraries_make_of_it() -> None:
    wrapped = RuntimeError("unexpected pos 64")
    wrapped.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_full(wrapped)  # torch
    assert is_full(ValueError("I/O error: No space left on device (os error 28)"))  # safetensors
    assert not is_full(RuntimeError("unexpected pos 64"))
    assert not is_full(None)
