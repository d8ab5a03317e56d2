"""The entry of the images: what it starts, and that no node starts without a token."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def path(tmp_path: Path) -> str:
    """PATH with a `ray` that prints what it is asked."""
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text('#!/bin/sh\necho "ray $*"\n')
    ray.chmod(0o755)
    return f"{ray.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("0123\n")
    file.chmod(0o600)
    return file


def enter(repo_root: Path, path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(repo_root / "docker" / "entrypoint.sh"), *arguments]
    return subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True, timeout=20)


def test_a_head_and_a_worker(repo_root: Path, path: str, token_file: Path) -> None:
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    head = enter(repo_root, path, "head", "--num-gpus=0", **given, HAMU_CPUS="2").stdout.split()
    assert head[:3] == ["ray", "start", "--head"]
    assert {"--block", "--port=6379", "--dashboard-port=8265", "--num-cpus=2", "--num-gpus=0"} <= set(head)
    worker = enter(repo_root, path, "worker", **given, HAMU_HEAD="10.0.0.1:6379").stdout.split()
    assert worker[:3] == ["ray", "start", "--address=10.0.0.1:6379"]
    assert "--dashboard-agent-listen-port=52365" in worker
    assert enter(repo_root, path, "head", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0123").returncode == 0


def test_a_node_leaves_its_trials_the_time_that_its_container_has(repo_root: Path, path: str) -> None:
    """Ray reads it at SIGTERM; what it does then: test_drain.py."""
    (Path(path.split(os.pathsep)[0]) / "ray").write_text('#!/bin/sh\necho "$RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"\n')
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123"}
    assert enter(repo_root, path, "worker", **given).stdout == "25\n"
    assert enter(repo_root, path, "head", **given, HAMU_GRACE_S="7").stdout == "7\n"
    node = yaml.safe_load((repo_root / "docker" / "compose.yaml").read_text())["x-node"]
    assert int(node["environment"]["HAMU_GRACE_S"]) + 15 <= int(node["stop_grace_period"].removesuffix("s"))


def test_any_other_command_runs_as_it_is(repo_root: Path, path: str) -> None:
    assert enter(repo_root, path, "echo", "a  b").stdout == "a  b\n"


@pytest.mark.parametrize("role", ["head", "worker"])
def test_no_node_without_a_token(repo_root: Path, path: str, token_file: Path, role: str) -> None:
    def refused(**environment: str) -> str:
        found = enter(repo_root, path, role, **environment)
        assert (found.returncode, found.stdout) == (2, "")
        assert "0123" not in found.stderr
        return found.stderr

    assert "RAY_AUTH_MODE is ''" in refused()
    assert "RAY_AUTH_MODE is 'disabled'" in refused(RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH=str(token_file))
    assert "set RAY_AUTH_TOKEN_PATH" in refused(RAY_AUTH_MODE="token")
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    token_file.chmod(0o644)
    assert "has mode 644" in refused(**given)
    token_file.chmod(0o600)
    token_file.write_text("\n")
    assert "is empty" in refused(**given)
    token_file.unlink()
    assert "cannot be read" in refused(**given)
