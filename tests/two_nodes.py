"""A real Ray cluster of two nodes on one machine: each in a network namespace of its own, with an address of its own.

    with TwoNodes() as nodes:
        nodes.start([sys.executable, "job.py"], where="head")

A bridge joins the two, and the host, which is the third place: it reaches the dashboard and nothing of Ray runs there.

    host 10.x.0.254 -- bridge -- head 10.x.0.1 (GCS :6390, dashboard :8265)
                              -- worker 10.x.0.2

Every request needs a token, which is in the environment of what is started here and nowhere else. Processes, namespaces and
folders are gone at the end, after a failed test too, and those of a test run that was killed when the next one begins.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tests import namespaces
from tests.launch.launched import command_of
from tests.namespaces import (
    bridge_of,
    claim_subnet,
    ip,
    kill_all,
    pids_in,
    remove_namespace,
    remove_orphans,
    skip_reason,
    wait_until,
)

__all__ = ["Node", "TwoNodes", "skip_reason"]

_ROOT = Path(__file__).resolve().parents[1]
_RAY = Path(sys.executable).with_name("ray")
_PORT, _DASHBOARD_PORT = 6390, 8265
_OBJECT_STORE_BYTES = 256 * 2**20
Place = Literal["host", "head", "worker"]


class TwoNodes:
    """The cluster, up while the context lasts; both nodes are in it by then.

    Args:
        cpus: of the head and of the worker.
        environment: of both nodes' processes, beside this process's own.
        start_worker: False: the worker is to be started later.
    """

    def __init__(
        self, *, cpus: tuple[float, float] = (1, 1), environment: Mapping[str, str] | None = None, start_worker: bool = True
    ) -> None:
        self._cpus, self._start_worker = cpus, start_worker
        self.token = secrets.token_hex(32)
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._own = {
            **own,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "PATH": f"{_RAY.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "CUDA_VISIBLE_DEVICES": "",
            **(environment or {}),
        }
        self._started: list[subprocess.Popen[str]] = []
        self._subnet = -1

    def __enter__(self) -> TwoNodes:
        reason = skip_reason()
        if reason is not None:
            raise OSError(reason)
        remove_orphans()
        atexit.register(self.close)
        watch = [sys.executable, namespaces.__file__, str(os.getpid())]
        self._guard = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._subnet = claim_subnet()
            # Short, since Ray puts Unix sockets below it and their paths may have 107 characters only.
            self.folder = Path(tempfile.mkdtemp(prefix=f"hn{self._subnet}-", dir="/tmp"))
            ip("address", "add", f"{self.host_ip}/24", "dev", self._bridge)
            ip("link", "set", self._bridge, "up")
            self.head, self.worker = Node(self, "head", 1, self._cpus[0]), Node(self, "worker", 2, self._cpus[1])
            self.head.start()
            if self._start_worker:
                self.worker.start()
                self.wait_for_nodes(2)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def host_ip(self) -> str:
        return f"10.{self._subnet}.0.254"

    @property
    def address(self) -> str:
        """Of the head's Ray, for `ray.init` and `--address`."""
        return f"{self.head.ip}:{_PORT}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.ip}:{_DASHBOARD_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, the token with it: all that the processes started here are given."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")}
        return inherited | self._own

    def start(
        self,
        command: Sequence[str | Path],
        where: Place = "host",
        env: Mapping[str, str] | None = None,
        **more: Any,
    ) -> subprocess.Popen[str]:
        """Start a command; its id is the process's own. `more` goes to Popen; its output is one pipe unless that says else."""
        given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
        inside = [] if where == "host" else ["ip", "netns", "exec", getattr(self, where).namespace]
        process = subprocess.Popen([*inside, *map(str, command)], env=self.environment | dict(env or {}), **given)
        self._started.append(process)
        return process

    def run(self, command: Sequence[str | Path], where: Place = "host", *, code: int = 0, seconds: float = 120) -> str:
        """Run a command to its end and return what it printed."""
        process = self.start(command, where)
        out, _ = process.communicate(timeout=seconds)
        assert process.returncode == code, out
        return out

    def get(self, path: str) -> Any:
        """What the dashboard answers to a request with the token, parsed from JSON."""
        request = urllib.request.Request(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def alive(self) -> dict[str, str]:
        """Ids of the nodes that Ray takes to be alive, by address."""
        summary = self.get("/nodes?view=summary")["data"]["summary"]
        raylets = [node["raylet"] for node in summary if node.get("raylet", {}).get("state") == "ALIVE"]
        return {raylet["nodeManagerAddress"]: raylet["nodeId"] for raylet in raylets}

    def wait_for_nodes(self, n: int, seconds: float = 60) -> None:
        """Wait until Ray takes exactly `n` nodes to be alive."""

        def has_n() -> bool:
            with contextlib.suppress(OSError):  # the dashboard is not up yet
                return len(self.alive()) == n
            return False

        wait_until(has_n, f"a cluster of {n} nodes", seconds)

    def cut(self) -> None:
        """Take the worker off the bridge: what either side sends is lost, and no connection is closed."""
        ip("link", "set", self.worker.port, "nomaster")

    def mend(self) -> None:
        """Undo `cut`."""
        ip("link", "set", self.worker.port, "master", self._bridge)

    def close(self) -> None:
        """Remove everything; to be called any number of times."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._started.clear()
        for name in ("head", "worker"):
            if (node := self.__dict__.get(name)) is not None:
                node.remove()
        if self._subnet >= 0:
            ip("link", "delete", self._bridge, check=False)
            self._subnet = -1
        if (folder := self.__dict__.pop("folder", None)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if (guard := self.__dict__.pop("_guard", None)) is not None:
            guard.kill()
            guard.wait()
            guard.stdin.close()
        atexit.unregister(self.close)

    @property
    def _bridge(self) -> str:
        return bridge_of(self._subnet)


class Node:
    """One of the two; its namespace stands as long as the cluster, its Ray from `start` to `kill`."""

    def __init__(self, nodes: TwoNodes, name: str, number: int, cpus: float) -> None:
        self._nodes, self.name, self._cpus = nodes, name, cpus
        subnet = nodes._subnet
        self.ip = f"10.{subnet}.0.{number}"
        self.port = f"hn{subnet}p{number}"
        """The bridge's end of the node's cable."""
        self.namespace = f"hamu-{os.getpid()}-{subnet}-{name}"
        self._n_starts = 0
        ip("netns", "add", self.namespace)
        ip("link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("link", "set", self.port, "master", bridge_of(subnet), "up")
        ip("-n", self.namespace, "address", "add", f"{self.ip}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.namespace, "link", "set", device, "up")

    def start(self, cpus: float | None = None, *flags: str, env: Mapping[str, str] | None = None) -> None:
        """Start Ray here; a node that was killed joins as a new one. flags: more of `ray start`."""
        self._n_starts += 1
        folder = self._nodes.folder / f"{self.name[0]}{self._n_starts}"
        own = ["--head", f"--port={_PORT}", f"--dashboard-host={self.ip}", f"--dashboard-port={_DASHBOARD_PORT}"]
        joining = [f"--address={self._nodes.address}"]
        command = [
            _RAY, "start", *(own if self.name == "head" else joining), f"--node-ip-address={self.ip}", f"--temp-dir={folder}",
            f"--num-cpus={self._cpus if cpus is None else cpus:g}", "--num-gpus=0",
            f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats", "--log-style=record", *flags,
        ]  # fmt: skip
        with (self._nodes.folder / f"{self.name}.out").open("a+") as out:  # no pipe: Ray's processes would keep it open
            process = self._nodes.start(command, self.name, env, stdout=out)  # type: ignore[arg-type]
            code = process.wait(timeout=90)
            out.seek(0)
            assert code == 0, out.read().replace(self._nodes.token, "<token>")
        if self.name == "head":
            self._nodes.wait_for_nodes(1)

    def pids(self) -> list[int]:
        """Ids of all processes in the namespace: Ray's own, its workers, and a driver that was started here."""
        return pids_in(self.namespace)

    def has_raylet(self) -> bool:
        """Whether Ray runs here; it ends itself where its head takes it to be dead."""
        return any(command_of(pid).partition("\0")[0].endswith("/raylet") for pid in self.pids())

    def kill(self) -> None:
        """Kill all processes at once, as a power cut does."""
        kill_all(self.namespace)

    def drain(self, deadline_s: int = 30, reason: str = "a test") -> None:
        """Say that the node will be taken away in `deadline_s` seconds, as a provider does with a spot instance."""
        self._nodes.run(
            [
                _RAY, "drain-node", f"--address={self._nodes.address}", f"--node-id={self._nodes.alive()[self.ip]}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={reason}",
                f"--deadline-remaining-seconds={deadline_s}",
            ],
            "head",
        )  # fmt: skip

    def remove(self) -> None:
        """Kill what runs here and remove the namespace; its cable goes with it."""
        remove_namespace(self.namespace)
        ip("link", "delete", self.port, check=False)  # goes with the namespace, but a little later
