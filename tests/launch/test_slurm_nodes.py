"""The batch script over two network namespaces, with stand-ins for Slurm's commands: one Ray cluster, by `ray symmetric-run`.

The stand-in `srun` starts the command once in each namespace, with processes of its own as on another machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm import TEMPLATE, SlurmSettings, render
from tests.launch.launched import SHORT
from tests.launch.test_slurm import command
from tests.two_nodes import skip_reason

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

SRUN = r"""
while [[ $1 == --* ]]; do shift; done
id=0; pids=(); code=0
for node in $STAND_IN_NODES; do
    SLURM_NODEID=$id ip netns exec "$node" unshare --pid --fork --kill-child --mount --mount-proc bash -c '
        mkdir -p "/tmp/hamu-$UID-$SLURM_JOB_ID"; mount -t tmpfs none "/tmp/hamu-$UID-$SLURM_JOB_ID"; exec "$@"' node "$@" &
    pids+=($!); id=$((id + 1))
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
TWO = (*SHORT, "--set", "method=ft,ga", "--set", "rho=0")
PAIRED = ("--set", "gradient_pairing=split-gpu", "--set", "num_workers=2", "--set", "backend=gloo")


class Allocation:
    """Two namespaces, joined by a cable, that stand for the nodes of a Slurm job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.names = [f"hslurm{os.getpid()}{end}" for end in "ab"]
        subnet = f"10.{192 + os.getpid() % 60}.7"
        self.ips = [f"{subnet}.1", f"{subnet}.2"]
        self.job_id = str(50_000 + os.getpid() % 9000)
        (folder / "bin").mkdir()
        (folder / "home").mkdir()
        command(folder / "bin" / "srun", SRUN)
        command(folder / "bin" / "squeue", "echo RUNNING")
        command(
            folder / "bin" / "scontrol",
            f'if [[ $1 == show ]]; then printf "%s\\n" {" ".join(self.ips)}; else echo "$*" >> "$CALLS"; fi',
        )
        for name in self.names:
            ip("netns", "add", name)
        ends = [f"hs{os.getpid()}{end}" for end in "ab"]
        ip("link", "add", ends[0], "netns", self.names[0], "type", "veth", "peer", "name", ends[1], "netns", self.names[1])
        for name, end, address in zip(self.names, ends, self.ips, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def start(self, script: str) -> subprocess.Popen[str]:
        (self.folder / "job").write_text(script)
        own = {
            "HOME": str(self.folder / "home"), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": self.job_id,
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "",
            "STAND_IN_NODES": " ".join(self.names), "CALLS": str(self.calls),
        }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
        inside = ["ip", "netns", "exec", self.names[0], "bash", str(self.folder / "job")]
        return subprocess.Popen(inside, env=inherited | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def close(self) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in found:
                subprocess.run(["kill", "-9", pid], capture_output=True)
            ip("netns", "delete", name)
        with contextlib.suppress(OSError):  # what the nodes mounted over
            Path(f"/tmp/hamu-{os.getuid()}-{self.job_id}").rmdir()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[Allocation]:
    if reason := skip_reason():
        pytest.skip(reason)
    allocation = Allocation(tmp_path)
    try:
        yield allocation
    finally:
        allocation.close()


def test_a_sweep_over_two_nodes_saves_when_its_time_is_over_and_goes_on_in_the_next_turn(
    allocation: Allocation, repo_root: Path, tmp_path: Path
) -> None:
    flags = ("--name", "run1", "--storage-path", str(tmp_path / "root"), "--no-with-reference", *TWO, *PAIRED)
    settings = SlurmSettings(nodes=2, python=sys.executable)
    script = render((repo_root / TEMPLATE).read_text(), settings, name="run1", flags=flags, repository=str(repo_root))

    first = allocation.start(script)
    assert first.stdout is not None
    said = [""]
    while not re.match(r"original .*test accuracy|\[1/", said[-1]):  # the trials are about to begin, or have
        said.append(first.stdout.readline())
        assert said[-1], "".join(said)
    stopped_at = time.monotonic()
    first.send_signal(signal.SIGTERM)
    out = "".join(said) + first.stdout.read()
    assert first.wait(60) == 0, out
    assert time.monotonic() - stopped_at < 170, out  # of the 180 s that Slurm is told to leave
    assert "the job is queued again" in out and allocation.calls.read_text() == f"requeue {allocation.job_id}\n"
    assert not list((tmp_path / "home" / ".hamu" / "slurm").iterdir())  # nor its token

    second = allocation.start(script)
    out = second.communicate(timeout=900)[0]
    assert second.returncode == 0, out
    assert "has begun: going on with it" in out and "Pareto front: 2 of 2" in out or "2 finished" in out
    rows = list((tmp_path / "root" / "results" / "digits" / "run1" / "trials").glob("*/row.json"))
    assert len(rows) == 2
