"""`python launch/submit.py`: what is refused before anything is contacted, and what a dry run shows."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from hamu.errors import ConfigError
from launch.interpreter import lacking
from launch.jobs import _Tail, _worker_python
from launch.jobs_text import ended_line, exit_code, jobs_table
from launch.submit import entrypoint, main
from launch.submit_checks import check_place, check_sweep, environment_to_send

NOWHERE = "http://127.0.0.1:9"
SHARED = ("--storage-path", "/shared/hamu")
TWO_NODES = (
    "cluster_name: mine\nprovider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2]}\nauth: {ssh_user: me}\n"
    "head_start_ray_commands: ['RAY_AUTH_MODE=token ray start --head --port=6379']\n"
    "worker_start_ray_commands: ['RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379']\n"
)
ONE_NODE = "cluster_name: one\nprovider: {type: local, head_ip: 127.0.0.1, worker_ips: []}\nauth: {ssh_user: me}\n"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--spac", "cifar/grid"], "did you mean '--space'"),
        (["--space", "cifar/gird"], "cifar/grid"),
        (["--set", "lr=fast"], "learning_rate takes a number"),
        (["--set", "method=hamuq"], "hamu-q"),
        (["--set", "model_name=resnet2"], "resnet20"),
        (["--set", "forget_class=12"], "classes are 0 to 9"),
        (["--name", "my run"], "a name is"),
        (["--part", "5/4", "--name", "a"], "--part '5/4'"),
        (["--target", "forget_acuracy<=0.1"], "forget_accuracy"),
        (["--list"], "no cluster is needed"),
        (["--dry-run"], "before the --"),
        (["--address", "auto"], "before the --"),
        (["--cluster", "x.yaml"], "before the --"),
    ],
)
def test_a_typo_in_the_sweep_is_refused_before_any_contact(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--address", NOWHERE, "--", *SHARED, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "behind a --"),
        (["--space", "cifar/grid"], "behind a --"),
        (["--", *SHARED], "give --cluster FILE"),
        (["list"], "give --cluster FILE"),
        (["lst", "--address", NOWHERE], "did you mean 'list'"),
        (["status", "--address", NOWHERE], "the id of one job"),
        (["logs", "a", "--address", NOWHERE, "--"], "no flags of a sweep"),
        (["--address", "127.0.0.1:8265", "--", *SHARED], "http(s)://HOST:PORT"),
        (["--address", "http://me:secret@127.0.0.1:8265", "--", *SHARED], "no name or password"),
        (["--address", "http://10.0.0.1:8265", "--", *SHARED], "RAY_AUTH_MODE"),
        (["--cluster", "nowhere.yaml", "--", *SHARED], "nowhere.yaml"),
    ],
)
def test_a_wrong_command_is_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "secret" not in error


@pytest.mark.parametrize(
    ("root", "n_nodes", "words"),
    [
        (None, 1, "thrown away"),
        ("artifacts", 1, "relative"),
        ("~/hamu", 2, "relative"),
        ("/tmp/hamu", 2, "every node has its own /tmp"),
        ("/tmp/hamu", None, "every node has its own /tmp"),
        ("/dev/shm/x", 2, "/dev"),
        ("file:///shared/hamu", 2, "one node"),
        ("s3://key:pass@bucket/hamu", 2, "password"),
        ("s3://bucket/hamu?secret=pass", 2, "query"),
    ],
)
def test_an_artifact_root_that_others_will_not_find_is_refused(root: str | None, n_nodes: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        check_place(root, n_nodes=n_nodes)
    assert "pass@" not in str(error.value) and "secret=" not in str(error.value)


@pytest.mark.parametrize(("root", "n_nodes"), [("/shared/hamu", 2), ("s3://bucket/hamu", 8), ("/tmp/hamu", 1)])
def test_an_artifact_root_that_all_find_is_taken(root: str, n_nodes: int) -> None:
    assert check_place(root, n_nodes=n_nodes) == root


def test_name_and_artifact_root_are_settled_here() -> None:
    """The job must not choose another name than the one that is printed and stored with it."""
    asked = check_sweep(["--space", "digits/quickstart"], storage="/shared/hamu", environment={})
    assert asked.name.startswith("quickstart-") and asked.n_trials == 26
    assert shlex.join(asked.flags).endswith(f"--storage-path /shared/hamu --name {asked.name}")


def test_a_flag_goes_before_the_settings_and_these_before_the_environment() -> None:
    def root(*flags: str, storage: str | None) -> str:
        return check_sweep(["--name", "a", *flags], storage=storage, environment={"ARTIFACT_ROOT": "/environment"}).storage

    assert root("--storage-path", "/flag", storage="/settings") == "/flag"
    assert root(storage="/settings") == "/settings"
    assert root(storage=None) == "/environment"


def test_published_names_go_along_and_secrets_do_not() -> None:
    here = {
        "METHOD": "ft",
        "LR": " 0.1 ",
        "WANDB_API_KEY": "k",
        "HF_TOKEN": "t",
        "RAY_ADDRESS": "x:1",
        "ARTIFACT_ROOT": "/a",
        "HOME": "/",
    }
    assert environment_to_send(here) == {"METHOD": "ft", "LR": "0.1"}


def test_what_is_set_here_counts_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METHOD", "ft")
    asked = check_sweep(["--name", "a", *SHARED], storage=None, environment=os.environ)
    assert asked.environment == {"METHOD": "ft"} and asked.n_trials is not None and asked.n_trials < 26


def test_a_resumed_sweep_needs_no_plan_here() -> None:
    asked = check_sweep(["--resume", "run1", *SHARED], storage=None, environment={"METHOD": "ft"})
    assert (asked.name, asked.n_trials, asked.environment) == ("run1", None, {})


def test_a_dry_run_contacts_nothing_and_shows_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(TWO_NODES)
    (tmp_path / "mine.settings.yaml").write_text(
        "storage_path: /shared/hamu\nnodes: {cpus: 8, gpus: 0}\npython: /opt/venv/bin/python\nenvironment: {OMP_NUM_THREADS: 1}\n"
        "dashboard: http://10.0.0.1:8265\n"
    )
    assert main(["--cluster", str(tmp_path / "mine.yaml"), "--dry-run", "--", "--space", "cifar/grid", "--name", "run1"]) == 0
    out = capsys.readouterr().out
    assert "sweep run1:" in out and " MB" in out and "environment: OMP_NUM_THREADS" in out
    assert (
        "/opt/venv/bin/python launch/interpreter.py && exec /opt/venv/bin/python launch/sweep.py --cluster "
        "launch/clusters/mine.yaml --space cifar/grid --name run1 --storage-path /shared/hamu\n" in out
    )


def test_a_sweep_that_no_node_can_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.yaml").write_text(TWO_NODES)
    (tmp_path / "two.settings.yaml").write_text("nodes: {cpus: 4, gpus: 0}\nstorage_path: /shared/hamu\n")
    given = ["--cluster", str(tmp_path / "two.yaml"), "--dry-run", "--", "--name", "a"]
    assert main([*given, "--gpus", "1"]) == 2
    assert "gpus" in capsys.readouterr().err.lower()
    assert main([*given, "--gpus", "0"]) == 0


def test_this_machine_needs_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here.yaml").write_text(ONE_NODE)
    assert main(["--cluster", str(tmp_path / "here.yaml"), "--", "--name", "a", *SHARED]) == 2
    assert "needs no job: use launch/sweep.py" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--address", NOWHERE]) == 2
    error = capsys.readouterr().err
    assert NOWHERE in error and "no answer" in error and error.count("\n") == 1


class DeafServer(BaseHTTPRequestHandler):
    """A job server whose only job runs on, whatever it is asked."""

    def do_GET(self) -> None:
        job = {"type": "SUBMISSION", "submission_id": "deaf", "status": "RUNNING", "entrypoint": "x", "start_time": 1}
        answers = {"/api/jobs/": [], "/api/version": {"ray_version": "2.60.0"}, "/api/jobs/deaf": job}
        if self.path in answers:
            self._answer(answers[self.path])
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        self._answer({"stopped": True})

    def _answer(self, what: object) -> None:
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_job_that_does_not_stop_is_said_and_is_no_success(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.jobs.STOPPED_WITHIN_S", 1)
    with ThreadingHTTPServer(("127.0.0.1", 0), DeafServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            where = ["--address", f"http://127.0.0.1:{server.server_port}"]
            assert main(["stop", "deaf", *where]) == 1
            said = capsys.readouterr()
            assert main(["status", "nope", *where]) == 2
            assert "knows no job 'nope'" in capsys.readouterr().err
        finally:
            server.shutdown()
    assert "RUNNING" in said.out and "go on with it" not in said.out
    assert "deaf still runs, 1 s after it was asked to stop; look at its log" in said.err


def test_the_entrypoint_survives_the_shell() -> None:
    line = entrypoint("/opt/my env/python", ["--set", "lr=0.1; rm -rf $HOME", "--target", "forget_accuracy<=retrained"])
    words = shlex.split(line)
    assert words[:3] == ["/opt/my env/python", "launch/interpreter.py", "&&"]
    assert words[-4:] == ["--set", "lr=0.1; rm -rf $HOME", "--target", "forget_accuracy<=retrained"]
    assert entrypoint("~/venv/bin/python", []).startswith("~/venv/bin/python ")


def test_help_teaches(repo_root: Path) -> None:
    done = subprocess.run([sys.executable, repo_root / "launch/submit.py", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for word in ("--dry-run", "--no-wait", "logs run1-3fa9c1 --follow", "--slurm --array", "secrets_file", "Exit codes"):
        assert word in done.stdout


def test_an_interpreter_without_our_packages_says_so_in_a_line(repo_root: Path) -> None:
    assert lacking() == [] and lacking(("ray", "no_such_package")) == ["no_such_package"]
    bare = [sys.executable, "-I", "-S", str(repo_root / "launch/interpreter.py")]  # -S: no site-packages
    done = subprocess.run(bare, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "lacks ray, torch" in done.stderr and "`python:`" in done.stderr


def test_the_interpreter_of_the_nodes_is_read_from_their_command() -> None:
    command = "raylet --x=1 --python_worker_command=/a b/bin/python /a b/ray/_private/workers/setup_worker.py default_worker.py"
    assert _worker_python(command.replace("/a b/ray", "/a/ray")) == "/a b/bin/python"
    assert _worker_python("raylet") is None


def test_a_log_that_is_sent_again_from_its_beginning_is_written_once() -> None:
    written: list[str] = []
    tail = _Tail(None, "job", written.append)  # type: ignore[arg-type]
    tail._write_from(0, "one\ntwo\n")
    tail._write_from(8, "three\n")
    for n_before, text in ((0, "one\n"), (4, "two\nthree\nfo"), (16, "ur\n"), (0, "one\ntwo\nthree\nfour\nfive\n")):
        tail._write_from(n_before, text)
    assert "".join(written) == "one\ntwo\nthree\nfour\nfive\n"


def details(status: JobStatus, code: int | None = None, **more: object) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION, submission_id="run1-1", status=status, driver_exit_code=code, entrypoint="x", start_time=1000,
        end_time=61_000, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0), (JobStatus.FAILED, 1, 1), (JobStatus.FAILED, 2, 2), (JobStatus.FAILED, None, 1),
        (JobStatus.FAILED, -9, 1), (JobStatus.STOPPED, None, 143),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_job(status: JobStatus, code: int | None, expected: int) -> None:
    assert exit_code(details(status, code)) == expected


def test_a_job_that_never_began_says_why() -> None:
    line = ended_line(details(JobStatus.FAILED, message="Failed to set up\nthe runtime environment"))
    assert line == "run1-1 failed after 60 s: Failed to set up the runtime environment"


def test_the_table_of_jobs_shows_those_of_others_too() -> None:
    known = {"sweep": "run1", "space": "cifar/grid", "trials": "24"}
    table = jobs_table([details(JobStatus.SUCCEEDED, 0, metadata=known), details(JobStatus.RUNNING)])
    assert table.splitlines()[1].split()[-3:] == ["run1", "cifar/grid", "24"]
    assert table.splitlines()[2].split()[-3:] == ["-", "-", "-"]
    assert jobs_table([]) == "no jobs"
