"""Jobs on a real Ray that asks for a token: submitted, looked away from, followed over a broken connection, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.jobs import STOP_WAIT_S
from tests.launch.launched import SHORT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ONE = (*SHORT, "--set", "method=ft", "--set", "rho=0")


class Head:
    """A Ray of one node with a dashboard on the loopback, and `python launch/submit.py` for it."""

    def __init__(self, folder: Path, repo_root: Path) -> None:
        self.folder, self.repo_root = folder, repo_root
        self.token, self.secret = secrets.token_hex(32), f"secret-{secrets.token_hex(8)}"
        self.port, self.dashboard_port, agent = free_ports(3)
        self.url = f"http://127.0.0.1:{self.dashboard_port}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")} | {
            "HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                f"--port={self.port}",
                f"--dashboard-port={self.dashboard_port}", "--include-dashboard=true", f"--dashboard-agent-listen-port={agent}",
                f"--temp-dir={folder / 'r'}", "--num-cpus=2", "--num-gpus=0", "--disable-usage-stats",
                "--object-store-memory=200000000",
            ],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.cluster = folder / "one.yaml"
        self.cluster.write_text(
            "cluster_name: one\nprovider: {type: local, head_ip: 127.0.0.1, worker_ips: []}\nauth: {ssh_user: me}\n"
        )
        (folder / "secrets").write_text(f"OUR_API_KEY={self.secret}\n")
        (folder / "secrets").chmod(0o600)
        (folder / "one.settings.yaml").write_text(
            f"address: 127.0.0.1:{self.port}\ndashboard: {self.url}\nstorage_path: {folder / 'art'}\n"
            f"environment: {{OMP_NUM_THREADS: 1}}\nsecrets_file: {folder / 'secrets'}\n"
        )

    def start(self, *argv: str, **environment: str | None) -> subprocess.Popen[str]:
        given = {**self.environment, **environment}
        return subprocess.Popen(
            [sys.executable, self.repo_root / "launch" / "submit.py", *argv], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={name: value for name, value in given.items() if value is not None}, cwd=self.folder,
        )  # fmt: skip

    def run(self, *argv: str, code: int = 0, **environment: str | None) -> str:
        process = self.start(*argv, **environment)
        out, _ = process.communicate(timeout=200)
        assert process.returncode == code, out
        return out

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                self.get("/api/jobs/")
                return
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)

    def end(self) -> None:
        import psutil

        own = [self.process.pid, *(each.pid for each in psutil.Process(self.process.pid).children(recursive=True))]
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for pid in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [each.getsockname()[1] for each in taken]


class Proxy:
    """A TCP port in front of another, whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self._to, self._open, self._lock = port, list[socket.socket](), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                with self._lock:
                    self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def head(repo_root: Path) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="hamu-", dir="/tmp"))  # short, for the paths of Ray's sockets
    head = Head(folder, repo_root)
    try:
        head.wait()
        yield head
    finally:
        head.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def proxy(head: Head) -> Iterator[Proxy]:
    proxy = Proxy(head.dashboard_port)
    try:
        yield proxy
    finally:
        proxy.close()


def test_without_its_token_nothing_is_done(head: Head) -> None:
    without: list[dict[str, str | None]] = [{"RAY_AUTH_TOKEN": None, "RAY_AUTH_MODE": None}, {"RAY_AUTH_TOKEN": "0" * 64}]
    for process in [head.start("list", "--address", head.url, **given) for given in without]:  # side by side
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 2
        assert out.startswith("error: ") and out.count("\n") == 1 and ("401" in out or "403" in out)
    assert head.get("/api/jobs/") == []
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=20)


@pytest.mark.soak
def test_a_sweep_is_submitted_left_alone_and_followed_over_a_broken_connection(head: Head, proxy: Proxy) -> None:
    where = ("--cluster", str(head.cluster), "--address", proxy.url)
    submitting = head.start(*where, "--", "--name", "run1", *ONE, "--no-with-reference")
    assert submitting.stdout is not None
    said = []
    while not said or "Running entrypoint" not in said[-1]:
        said.append(submitting.stdout.readline())
        assert said[-1], "".join(said)
    job = next(line for line in said if line.startswith("submitted to")).split(" as ")[1].split(",")[0]
    submitting.send_signal(signal.SIGINT)
    rest = submitting.stdout.read()  # not communicate(), which loses what was read ahead
    assert submitting.wait(60) == 130 and f"detached: {job} goes on" in rest and f"logs {job} --follow" in rest
    assert "Traceback" not in rest

    following = head.start("logs", job, "--follow", *where)
    assert following.stdout is not None
    followed = [following.stdout.readline() for _ in range(3)]
    proxy.cut()
    followed += following.stdout.read().splitlines(keepends=True)
    assert following.wait(60) == 0, "".join(followed)
    assert "is lost; the job goes on" in "".join(followed)
    printed = head.get(f"/api/jobs/{job}/logs")["logs"]
    ours = ("the connection to", f"{proxy.url} answers", f"{job} succeeded")
    assert "".join(line for line in followed if not line.startswith(ours)) == printed
    assert "Pareto front" in printed and (head.folder / "art" / "results" / "digits" / "run1" / "summary.json").is_file()

    [known] = [each for each in head.get("/api/jobs/") if each["submission_id"] == job]
    assert known["metadata"] == {
        "sweep": "run1",
        "space": "digits/quickstart",
        "storage": str(head.folder / "art"),
        "trials": "1",
    }
    assert known["entrypoint"].startswith(f"{sys.executable} launch/interpreter.py")
    assert known["status"] == "SUCCEEDED"
    held = json.dumps(known) + printed + rest + "".join(said)
    for path in (*(head.folder / "art").rglob("*"), *(head.folder / "r").glob("session_2*/logs/*")):
        if path.is_file():
            held += path.read_text(errors="replace")
    assert head.token not in held and head.secret not in held


def test_a_stopped_job_has_time_to_save(head: Head) -> None:
    """Five seconds for its checkpoints, where Ray would give three."""
    assert STOP_WAIT_S > 15
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from launch.jobs import Jobs
command = "trap 'sleep 5; echo saved; exit 143' TERM; echo ready; while true; do sleep 0.1; done"
folder, sweep = Path(sys.argv[3]), {"sweep": "slow"}
Jobs(sys.argv[2]).submit(entrypoint=command, submission_id="slow", folder=folder, environment={}, metadata=sweep)
"""
    (head.folder / "wd").mkdir()
    subprocess.run(
        [sys.executable, "-c", code, head.repo_root, head.url, head.folder / "wd"], env=head.environment, check=True, timeout=60
    )
    deadline = time.monotonic() + 60
    while "ready" not in head.get("/api/jobs/slow/logs")["logs"].splitlines():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    out = head.run("stop", "slow", "--address", head.url)
    assert "STOPPED" in out and f"go on with it by python launch/submit.py --address {head.url} -- --resume slow" in out
    followed = head.run("logs", "slow", "--follow", "--address", head.url, code=143).splitlines()
    assert "saved" in followed and followed[-1].startswith("slow was stopped after")
