"""Ray's surroundings: a short folder of the user's own, no cluster joined, no file in the home folder."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from hamu.cli.ray_environment import _remove_dead_sessions, prepare_environment, temporary_folder


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = {"HOME": "/home/user", "RAY_ADDRESS": "10.0.0.1:6379", "PYTHONPATH": "/mine", "RAY_AIR_NEW_OUTPUT": "1"}
    monkeypatch.setattr(os, "environ", values)
    return values


def test_the_temporary_folder_is_closed_to_others_and_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    folder = temporary_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(f"{folder}/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") < 108
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 30)))
    assert temporary_folder() == folder


def test_a_temporary_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    monkeypatch.setattr(os, "getuid", lambda: 999_999)
    folder = Path("/tmp/hamu-999999")
    try:
        with pytest.raises(PermissionError, match="belongs to another user"):
            temporary_folder()
    finally:
        folder.rmdir()


def test_no_cluster_is_joined_and_what_the_user_set_stays(environment: dict[str, str]) -> None:
    prepare_environment(Path("/repo"))
    assert "RAY_ADDRESS" not in environment
    assert environment["RAY_AIR_NEW_OUTPUT"] == "1"
    assert environment["PYTHONPATH"] == "/repo:/mine"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_the_token_is_in_memory_and_new_each_time(environment: dict[str, str]) -> None:
    prepare_environment(Path("/repo"))
    assert environment["RAY_AUTH_MODE"] == "token"
    first = environment.pop("RAY_AUTH_TOKEN")
    assert len(first) == 64
    del environment["RAY_AUTH_MODE"]
    prepare_environment(Path("/repo"))
    assert environment["RAY_AUTH_TOKEN"] != first


def test_a_user_who_turned_tokens_off_keeps_them_off(environment: dict[str, str]) -> None:
    environment["RAY_AUTH_MODE"] = "disabled"
    prepare_environment(Path("/repo"))
    assert environment["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in environment


def test_only_old_sessions_of_dead_processes_are_removed(tmp_path: Path) -> None:
    sessions = tmp_path / "ray"
    old, young, live = (sessions / f"session_x_{pid}" for pid in (4_194_305, 4_194_306, os.getpid()))
    for session in (old, young, live):
        (session / "logs").mkdir(parents=True)
    for session in (old, live):
        for path in (session / "logs", session):
            os.utime(path, (time.time() - 7200, time.time() - 7200))
    _remove_dead_sessions(tmp_path)
    assert sorted(sessions.iterdir()) == sorted([young, live])
