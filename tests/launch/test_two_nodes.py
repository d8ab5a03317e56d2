"""One command on a cluster of two nodes: joined from the head, submitted from the host, refused without the token."""

from __future__ import annotations

import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hamu.training.records import read_trials
from tests.launch.disturbed import Disturbed
from tests.launch.launched import SHORT, command_of
from tests.launch.test_split_sweep import GIVEN, SAVED, SPLIT, table
from tests.two_nodes import TwoNodes, skip_reason

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    """A core each, so that a pair of split workers needs both."""
    if reason := skip_reason():
        pytest.skip(reason)
    with TwoNodes(cpus=(1, 1)) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Not below /tmp, which a job is refused: of other machines it is another."""
    with tempfile.TemporaryDirectory(prefix="hamu-shared-", dir="/srv") as folder:
        yield Path(folder)


def statuses(root: Path, name: str) -> list[str]:
    return [row["status"] for row in read_trials(root / "results" / "digits" / name / "trials.parquet")]


def workers_in(pids: list[int]) -> list[int]:
    return [pid for pid in pids if "RayTrainWorker" in command_of(pid)]


def code_of(url: str, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/v0/actors", "/nodes?view=summary"])
def test_the_dashboard_answers_with_the_token_alone(nodes: TwoNodes, path: str) -> None:
    url = nodes.dashboard + path
    assert code_of(url, {}) == 401
    assert code_of(url, {"Authorization": "Bearer " + "0" * len(nodes.token)}) in (401, 403)
    assert code_of(url, {"Authorization": f"Bearer {nodes.token}"}) == 200


def test_the_image_s_health_check_tells_a_node_that_is_well(nodes: TwoNodes, repo_root: Path) -> None:
    health = [sys.executable, repo_root / "docker" / "health.py"]
    nodes.run(health, "head")
    nodes.run(health, "worker")
    nodes.run(["env", "HAMU_HEALTH_URL=http://127.0.0.1:9/", *health], "host", code=1)  # no node is there


@pytest.fixture(scope="module")
def undisturbed(nodes: TwoNodes, root: Path, repo_root: Path) -> list[dict[str, Any]]:
    """The table of two trials whose pairs stand on both nodes, which is looked at while they run."""
    sweep = Disturbed(repo_root, root, "pairs", root / "pairs.out", nodes)
    sweep.start(*GIVEN, *SAVED, *SPLIT)
    try:
        sweep.wait_until(lambda: all(workers_in(node.pids()) for node in (nodes.head, nodes.worker)))
        assert [len(workers_in(node.pids())) for node in (nodes.head, nodes.worker)] == [1, 1]
        sweep.end(180)
    finally:
        sweep.close()
    assert nodes.token not in sweep.said
    deadline = time.monotonic() + 20  # the cluster is free again
    while any(workers_in(node.pids()) for node in (nodes.head, nodes.worker)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return table(sweep.folder)


def test_a_pair_of_split_workers_stands_on_both_nodes(undisturbed: list[dict[str, Any]]) -> None:
    assert [row["status"] for row in undisturbed] == ["finished", "finished"]


def test_a_lost_node_is_said_and_its_replacement_goes_on(
    nodes: TwoNodes, root: Path, repo_root: Path, undisturbed: list[dict[str, Any]]
) -> None:
    sweep = Disturbed(repo_root, root, "lost", root / "lost.out", nodes)
    sweep.start(*GIVEN, *SAVED, *SPLIT)
    try:
        sweep.wait_until(lambda: bool(sweep.checkpoints()))
        nodes.cut()
        time.sleep(3)  # a network that is away for so long loses nothing
        nodes.mend()
        nodes.worker.kill()
        lost_s = sweep.wait_until(lambda: f"node {nodes.worker.ip} was lost" in sweep.said, 60)
        sweep.wait_until(lambda: "waits for 2 workers of 1 core each" in sweep.said, 60 - lost_s)
        sweep.note_ended()
        nodes.worker.start()
        sweep.end(180)
    finally:
        sweep.close()
    assert f"node {nodes.worker.ip} has joined" in sweep.said
    assert table(sweep.folder) == undisturbed
    assert sweep.ran_again() == []


def test_ray_job_submit_runs_a_sweep(nodes: TwoNodes, root: Path, repo_root: Path) -> None:
    ray = Path(sys.executable).with_name("ray")
    submit = [ray, "job", "submit", "--address", nodes.dashboard, "--working-dir", repo_root, "--"]
    sweep = [sys.executable, "launch/sweep.py", "--storage-path", root, "--name", "job", *SHORT, "--set", "method=ft"]
    out = nodes.run([*submit, *sweep])
    assert nodes.token not in out
    assert statuses(root, "job") == ["finished"], out


@pytest.mark.soak  # the rest of submitting: test_submit_on_ray.py
def test_submit_runs_a_sweep_and_follows_it(nodes: TwoNodes, root: Path, repo_root: Path) -> None:
    submit = [sys.executable, repo_root / "launch" / "submit.py", "--address", nodes.dashboard, "--"]
    out = nodes.run([*submit, "--storage-path", root, "--name", "sent", *SHORT, "--set", "method=ft"])
    assert nodes.token not in out
    assert "finished" in out
    assert statuses(root, "sent") == ["finished"], out
