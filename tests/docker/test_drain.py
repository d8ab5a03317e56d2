"""A node that is about to go: told by SIGTERM to its container's entry, or by docker/drain.py, it waits for what runs on it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.namespaces import wait_until
from tests.two_nodes import TwoNodes, skip_reason


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Processes of a machine as the kernel lists them: a node of Ray, one of its workers, and others."""
    commands = {
        "7": ["/opt/ray/raylet", "--node_id=ab12", "--labels={}", "--gcs-address=10.0.0.1:6379"],
        "8": ["ray::Trial.train", ""],
        "9": ["tail", "-f", "raylet"],
        "10": [""],
        "self": ["/opt/ray/raylet", "--node_id=ab12", "--gcs-address=10.0.0.1:6379"],
    }
    for name, command in commands.items():
        (tmp_path / "proc" / name).mkdir(parents=True)
        (tmp_path / "proc" / name / "cmdline").write_bytes("\0".join(command).encode())
    (tmp_path / "proc" / "11").mkdir()  # has ended meanwhile
    return tmp_path / "proc"


@pytest.fixture
def drain(repo_root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("drain", repo_root / "docker" / "drain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a `ray` on the PATH that notes what it is asked and then does what the test says; gives the notes."""

    def put(body: str) -> Path:
        path = tmp_path / "bin" / "ray"
        path.parent.mkdir()
        path.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n{body}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
        return tmp_path / "asked"

    return put


def test_the_node_of_this_machine_is_drained_and_waited_for(drain: Any, proc: Path, ray: Callable[[str], Path]) -> None:
    asked = ray(f"(sleep 1; rm {proc}/7/cmdline) > /dev/null &")
    started = time.monotonic()
    assert drain.drain(20, proc) == 0
    assert 1 <= time.monotonic() - started < 15
    assert asked.read_text() == (
        "drain-node --address=10.0.0.1:6379 --node-id=ab12 --reason=DRAIN_NODE_REASON_PREEMPTION "
        "--reason-message=its machine goes --deadline-remaining-seconds=20\n"
    )
    assert drain.drain(20, proc) == 0  # there is none any more
    assert asked.read_text().count("\n") == 1


@pytest.mark.parametrize(("body", "words"), [("true", "not idle after 1 s"), ("exit 1", "could not be told")])
def test_a_node_that_does_not_go_is_said(
    drain: Any, proc: Path, ray: Callable[[str], Path], capsys: pytest.CaptureFixture[str], body: str, words: str
) -> None:
    ray(body)
    assert drain.drain(1, proc) == 1
    assert words in capsys.readouterr().err


HOLD = """
import sys, time
from pathlib import Path
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
from launch.nodes import gone_nodes
@ray.remote(num_cpus=1)
class Busy:
    def node(self): return ray.get_runtime_context().get_node_id()
busy = Busy.remote()
node, folder = ray.get(busy.node.remote()), Path(sys.argv[2])
(folder / "busy").touch()
while node not in gone_nodes(): time.sleep(0.1)
(folder / "seen").touch()
time.sleep(3)
assert ray.get(busy.node.remote()) == node
ray.kill(busy)
(folder / "left").write_text(str(time.time()))
time.sleep(60)
"""
"""A driver on the head with an actor on the only node that has a core; it leaves three seconds after the notice."""


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    if reason := skip_reason():
        pytest.skip(reason)
    with TwoNodes(cpus=(0, 1), start_worker=False) as nodes:
        yield nodes


def end_of_worker(nodes: TwoNodes, worker: subprocess.Popen[str], folder: Path, tell: Callable[[], object]) -> tuple[float, str]:
    """Run an actor on the worker, tell the worker to go; returns seconds from when the actor left to its end, and its output."""
    nodes.wait_for_nodes(2)
    driver = nodes.start([sys.executable, "-c", HOLD, nodes.address, folder], "head")
    wait_until(lambda: (folder / "busy").exists() or driver.poll() is not None, "an actor", 60)
    assert driver.poll() is None, driver.communicate()[0]
    tell()
    wait_until(lambda: (folder / "seen").exists(), "the notice", 30)
    out, _ = worker.communicate(timeout=60)
    assert (folder / "left").exists(), out
    return time.time() - float((folder / "left").read_text()), out


def entry(repo_root: Path, nodes: TwoNodes) -> list[str]:
    own = [f"--node-ip-address={nodes.worker.ip}", f"--temp-dir={nodes.folder / 'w'}", "--object-store-memory=100000000"]
    return [str(repo_root / "docker" / "entrypoint.sh"), "worker", "--num-cpus=1", *own]


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_sigterm_to_the_entry_drains_the_node_and_waits_for_its_actors(nodes: TwoNodes, repo_root: Path, tmp_path: Path) -> None:
    worker = nodes.start(entry(repo_root, nodes), "worker", {"HAMU_HEAD": nodes.address})
    late_s, out = end_of_worker(nodes, worker, tmp_path, lambda: worker.send_signal(signal.SIGTERM))
    assert late_s < 15, out  # of the 25 s that it may wait


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_drain_py_drains_the_node_of_its_container_and_waits_for_its_actors(
    nodes: TwoNodes, repo_root: Path, tmp_path: Path
) -> None:
    drain = f"{sys.executable} {repo_root / 'docker' / 'drain.py'} 40"
    script = f'"$@" > /dev/null & until [ -e {tmp_path}/go ]; do sleep 0.2; done; {drain}; echo "code $?"'
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "bash", "-c", script, "pod"]
    worker = nodes.start([*inside, *entry(repo_root, nodes)], "worker", {"HAMU_HEAD": nodes.address})
    late_s, out = end_of_worker(nodes, worker, tmp_path, (tmp_path / "go").touch)
    assert out.splitlines()[-1] == "code 0"
    assert late_s < 15, out
