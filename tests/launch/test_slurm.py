"""The batch script for Slurm: its text, and what it does with stand-ins for Slurm's commands and for the sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.extend import extended
from launch.plan import Plan, make_plan, read_overrides
from launch.results import SweepFolder
from launch.slurm import SETTINGS, TEMPLATE, SlurmSettings, check_settings, read_slurm_settings, render, seconds_of
from launch.slurm_turn import next_flags
from launch.submit import main
from tune_spaces.space import load_space

SPACE, STORED = ("--space", "digits/quickstart", "--name", "run1"), ("--storage-path", "/shared/hamu")
FLAGS = (*SPACE, "--target", "forget_accuracy<=retrained", *STORED)

SWEEP = """
import json, os, signal, sys, time
with open(os.environ["STAND_IN_CALLS"], "a") as calls:
    print("sweep", json.dumps(sys.argv[1:]), os.environ.get("MARK"), file=calls)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
time.sleep(float(os.environ.get("STAND_IN_S", "0")))
sys.exit(int(os.environ.get("STAND_IN_CODE", "0")))
"""
"""In place of launch/sweep.py: notes its flags, and ends as a sweep does."""


@pytest.fixture(scope="module")
def template(repo_root: Path) -> str:
    return (repo_root / TEMPLATE).read_text()


def script(template: str, settings: SlurmSettings | None = None, flags: tuple[str, ...] = FLAGS) -> str:
    return render(template, settings or SlurmSettings(), name="run1", flags=flags, repository="/shared/my hamu")


def test_the_header_asks_for_what_the_settings_say(template: str) -> None:
    settings = SlurmSettings(
        nodes=2, gpus_per_node=4, time="1-12:00:00", partition="gpu", account="me", qos="long", mem="0", constraint="a100|h100",
        signal_before_s=300, extra=("--mail-type=END",), cpus_per_task=8,
    )  # fmt: skip
    lines = [line for line in script(template, settings).splitlines() if line.startswith("#SBATCH ")]
    assert lines == [
        f"#SBATCH {each}"
        for each in (
            "--job-name=run1", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--time=1-12:00:00", "--mem=0",
            "--partition=gpu", "--account=me", "--qos=long", "--constraint=a100|h100", "--open-mode=append",
            "--signal=B:TERM@300",
            "--output=%x-%j.log", "--exclusive", "--requeue", "--mail-type=END",
        )
    ]  # fmt: skip


def test_an_array_has_one_node_a_task_and_a_log_each(template: str) -> None:
    text = script(template, SlurmSettings(array=4, cpus_per_task=8))
    assert "#SBATCH --array=0-3\n" in text and "#SBATCH --output=%x-%A_%a.log\n" in text and "#SBATCH --cpus-per-task=8\n" in text
    assert "--exclusive" not in text.partition("set -euo")[0] and "n_parts=4\n" in text


def test_everything_is_quoted(template: str) -> None:
    settings = SlurmSettings(python="/opt/my env/python", environment={"A": "x'; rm -rf $HOME"}, setup=("module load cuda",))
    text = script(template, settings, (*FLAGS, "--set", "lr=0.1,$(reboot)"))
    assert "repository='/shared/my hamu'\n" in text and "python='/opt/my env/python'\n" in text
    assert """export A='x'"'"'; rm -rf $HOME'\n""" in text and "\nmodule load cuda\n" in text
    assert "'forget_accuracy<=retrained'" in text and "'lr=0.1,$(reboot)'" in text


def test_no_token_stands_in_the_script_or_on_a_command_line(template: str) -> None:
    text = script(template, SlurmSettings(nodes=2))
    assert 'RAY_AUTH_TOKEN_PATH="$HAMU_JOB_FOLDER/token"' in text and "umask 077" in text
    assert "RAY_AUTH_TOKEN=" not in text


@pytest.mark.parametrize("settings", [SlurmSettings(), SlurmSettings(nodes=3), SlurmSettings(array=2, setup=("true",))])
def test_bash_can_read_it(template: str, settings: SlurmSettings) -> None:
    for text in (template, script(template, settings)):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr


def test_shellcheck_finds_nothing(template: str) -> None:
    check = Path(sys.executable).with_name("shellcheck")  # of the test extra
    for text in (template, script(template, SlurmSettings(nodes=2, setup=("true",)))):
        done = subprocess.run([check, "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partition": "my gpus"}, "one word"),
        ({"account": "a\n#SBATCH --uid=0"}, "one word"),
        ({"output": "my logs/%j"}, "one word"),
        ({"time": "12h"}, "HH:MM:SS"),
        ({"nodes": 0}, "1 or more"),
        ({"nodes": True}, "1 or more"),
        ({"nodes": 2, "array": 2}, "one node each"),
        ({"signal_before_s": 5}, "30 or more"),
        ({"extra": ("-p gpu",)}, "--NAME"),
        ({"extra": ("--comment=my job",)}, "without blanks"),
        ({"setup": ("a\nb",)}, "one command"),
        ({"environment": {"WANDB_API_KEY": "x"}}, "no place for a secret"),
        ({"environment": {"A B": "x"}}, "no name of a variable"),
        ({"requeue": "yes"}, "true or false"),
    ],
)
def test_what_sbatch_would_misread_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings(replace(SlurmSettings(), **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitions: gpu", "partitions: no such setting; did you mean 'partition'"),
        ("time: 12:00:00", "time"),  # YAML reads a number in base 60
        ("setup: module load cuda", "setup"),
        ("environment: [A]", "environment"),
        ("nodes: two", "nodes"),
    ],
)
def test_a_wrong_settings_file_is_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        read_slurm_settings(tmp_path / "site.yaml")
    assert str(tmp_path / "site.yaml") in str(error.value)


def test_the_committed_settings_are_read(repo_root: Path) -> None:
    settings = read_slurm_settings(repo_root / SETTINGS)
    assert settings.requeue and settings.signal_before_s == 180 and settings.nodes == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nodes", "2", "--array", "2", "--", *FLAGS], "one node each"),
        (["--array", "90", "--", *SPACE, *STORED], "26 trials"),
        (["--array", "2", "--", *SPACE, *STORED, "--part", "1/2"], "leave --part out"),
        (["--", "--name", "my run", *STORED], "a name is"),
        (["--", "--name", "a"], "no artifact root"),
        (["--", "--name", "a", "--storage-path", "/tmp/a"], "every node has its own /tmp"),
        (["--", "--name", "a", "--sapce", "x"], "did you mean '--space'"),
        (["--time", "soon", "--", *FLAGS], "HH:MM:SS"),
        ([], "behind a --"),
    ],
)
def test_a_wrong_command_is_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--slurm", *argv]) == 2
    assert words in capsys.readouterr().err


def test_without_sbatch_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["--slurm", "--", *FLAGS]) == 2
    assert "there is no sbatch on the PATH" in capsys.readouterr().err


def test_sbatch_is_given_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path / "sbatch", f'cat > "{tmp_path}/given"; echo "$@" > "{tmp_path}/flags"; echo "4711;cluster"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main(["--slurm", "--dry-run", "--nodes", "2", "--", *FLAGS]) == 0
    shown = capsys.readouterr().out
    assert main(["--slurm", "--nodes", "2", "--", *FLAGS]) == 0
    out = capsys.readouterr().out
    assert "submitted as Slurm job 4711; its log: run1-4711.log" in out
    assert (tmp_path / "given").read_text() == shown and (tmp_path / "flags").read_text() == "--parsable\n"


def test_a_refusal_of_sbatch_is_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path / "sbatch", "cat > /dev/null; echo 'sbatch: error: invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main(["--slurm", "--", *FLAGS]) == 1
    assert "invalid partition" in capsys.readouterr().err


def test_a_sweep_that_has_begun_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--space",
        "digits/quickstart",
        "--set",
        "lr=0.1",
        "--name",
        "run1",
        "--max-concurrent",
        "2",
        "--storage-path",
        str(tmp_path),
    ]
    assert next_flags(flags, {}) == flags
    begin(tmp_path)
    expected = [
        "--resume",
        "digits/run1",
        "--space",
        "digits/quickstart",
        "--max-concurrent",
        "2",
        "--storage-path",
        str(tmp_path),
    ]
    assert next_flags(flags, {}) == expected
    part = [*flags, "--part", "1/4"]
    assert next_flags(part, {}) == part  # a share goes on with the flags that it began with


def test_an_extension_is_asked_for_until_it_is_in_the_plan(tmp_path: Path) -> None:
    def plan_of(*assignments: str) -> Plan:
        given = read_overrides(["method=ft", *assignments])
        return make_plan(load_space("digits/quickstart"), name="run1", overrides=given, root=tmp_path)

    root, folder = ["--storage-path", str(tmp_path)], SweepFolder(tmp_path / "results" / "digits" / "run1")
    extending = ["--resume", "run1", "--extend", "--set", "lr=0.3", "--seeds", "7", "--max-concurrent", "2", *root]
    assert next_flags(extending, {}) == extending  # there is no such sweep: that is for the sweep to say
    plan = plan_of("lr=0.1")
    folder.start(plan)
    assert next_flags(extending, {}) == extending
    folder.start(extended(plan, read_overrides(["lr=0.3", "seed=7"])))
    assert next_flags(extending, {}) == ["--resume", "digits/run1", "--max-concurrent", "2", *root]
    more = ["--resume", "run1", "--extend", "--set", "lr=0.4", *root]
    assert next_flags(more, {}) == more
    plain = ["--resume", "run1", *root]
    assert next_flags(plain, {}) == plain


def test_without_a_name_every_turn_of_a_job_has_the_same() -> None:
    assert next_flags([], {"SLURM_JOB_ID": "7"}) == ["--name", "slurm-7"]
    assert next_flags(["--part", "2/4"], {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"})[-2:] == ["--name", "slurm-7"]


class Slurm:
    """Stand-ins for Slurm's commands, and a job of one node."""

    def __init__(self, folder: Path, repo_root: Path, template: str) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.repo_root, self.template = repo_root, template
        (folder / "bin").mkdir()
        (folder / "home").mkdir()
        (folder / "sweep.py").write_text(SWEEP)
        command(folder / "bin" / "scontrol", 'echo "scontrol $*" >> "$STAND_IN_CALLS"')
        command(folder / "bin" / "squeue", 'echo "$STAND_IN_STATE"')
        real = sys.executable
        command(
            folder / "python",
            f'if [[ $1 == launch/sweep.py ]]; then exec {real} {folder}/sweep.py "${{@:2}}"; fi\nexec {real} "$@"',
        )
        self.flags = ("--space", "digits/quickstart", "--name", "run1", "--storage-path", str(folder / "root"))
        self.settings = SlurmSettings(python=str(folder / "python"), environment={"MARK": "m m"})
        self._render = lambda settings: render(template, settings, name="run1", flags=self.flags, repository=str(repo_root))

    def start(
        self, settings: SlurmSettings | None = None, *, is_rendered: bool = True, **environment: str
    ) -> subprocess.Popen[str]:
        """Start the script with the settings in it; is_rendered=False: the committed one, with flags behind it."""
        (self.folder / "job").write_text(self._render(settings or self.settings) if is_rendered else self.template)
        own = {
            "HAMU_PYTHON": str(self.folder / "python"), "HAMU_REPOSITORY": str(self.repo_root),
            "HOME": str(self.folder / "home"), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "42",
            "STAND_IN_CALLS": str(self.calls), "STAND_IN_STATE": "RUNNING",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", self.folder / "job", *(() if is_rendered else self.flags)],
            env=os.environ | own | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, code: int, settings: SlurmSettings | None = None, *, is_rendered: bool = True, **environment: str) -> list[str]:
        process = self.start(settings, is_rendered=is_rendered, **environment)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == code, out
        assert not list((self.folder / "home" / ".hamu" / "slurm").iterdir())
        return self.said()

    def said(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def stop_when_it_runs(self, process: subprocess.Popen[str]) -> str:
        wait_until(lambda: bool(self.said()))
        time.sleep(0.5)  # until its handler is there
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=60)[0]


@pytest.fixture
def slurm(tmp_path: Path, repo_root: Path, template: str) -> Slurm:
    return Slurm(tmp_path, repo_root, template)


def test_a_job_of_one_node_runs_the_sweep_and_ends_as_it(slurm: Slurm) -> None:
    line = slurm.run(0)[0]
    assert line.startswith('sweep ["--space", "digits/quickstart", "--name", "run1"') and line.endswith("m m")
    assert len(slurm.run(1, STAND_IN_CODE="1")) == 2  # no new turn for a sweep that failed


@pytest.mark.slow
def test_out_of_time_it_saves_and_takes_a_new_turn(slurm: Slurm) -> None:
    process = slurm.start(STAND_IN_S="50")
    out = slurm.stop_when_it_runs(process)
    assert process.returncode == 0, out
    assert slurm.said()[1:] == ["scontrol requeue 42"]
    begin(slurm.folder / "root")
    assert '"--resume", "digits/run1"' in slurm.run(0)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["COMPLETING", ""])
def test_a_cancelled_job_does_not_come_back(slurm: Slurm, state: str) -> None:
    process = slurm.start(STAND_IN_S="50", STAND_IN_STATE=state)
    out = slurm.stop_when_it_runs(process)
    assert process.returncode == 143 and "submit the same again to go on" in out
    assert len(slurm.said()) == 1


@pytest.mark.slow
def test_without_requeue_it_ends(slurm: Slurm) -> None:
    process = slurm.start(replace(slurm.settings, requeue=False), STAND_IN_S="50")
    slurm.stop_when_it_runs(process)
    assert process.returncode == 143 and len(slurm.said()) == 1


def test_a_task_of_an_array_runs_its_share(slurm: Slurm) -> None:
    said = slurm.run(0, replace(slurm.settings, array=4), **task("2", "0-3"))
    assert '"--part", "3/4"' in said[0] and '"--name", "run1"' in said[0]
    assert '"--part", "2/4"' in slurm.run(0, replace(slurm.settings, array=4), **task("1", "1"))[-1]  # run again by itself


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "array", "given", "part"),
    [
        ("1", "1-4", {}, "1/4"),
        ("4", "1-4", {}, "4/4"),
        ("0", "0-3", {}, "1/4"),
        ("12", "10-12", {}, "3/3"),
        ("2", "2", {"HAMU_PARTS": "4"}, "3/4"),
        ("2", "2", {"HAMU_PARTS": "4", "HAMU_FIRST": "1"}, "2/4"),
        ("3", "1,3", {"HAMU_PARTS": "4"}, "4/4"),
    ],
)
def test_an_array_of_the_batch_script_itself_has_every_share_once(
    slurm: Slurm, number: str, array: str, given: dict[str, str], part: str
) -> None:
    assert f'"--part", "{part}"' in slurm.run(0, None, is_rendered=False, **task(number, array), **given)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "array", "given"),
    [("2", "2", {}), ("4", "0,4", {}), ("2", "0-6:2", {}), ("4", "4", {"HAMU_PARTS": "4"}),
     ("0", "0", {"HAMU_PARTS": "4", "HAMU_FIRST": "1"})],
)  # fmt: skip
def test_an_array_whose_shares_cannot_be_told_is_refused(slurm: Slurm, number: str, array: str, given: dict[str, str]) -> None:
    process = slurm.start(None, is_rendered=False, **task(number, array), **given)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and slurm.said() == []
    assert out.startswith("error: this array ") and "HAMU_PARTS=4 HAMU_FIRST=0 sbatch --array=2" in out and out.count("\n") == 1


@pytest.mark.slow
def test_a_wrong_flag_ends_the_job_before_the_sweep(slurm: Slurm) -> None:
    slurm.flags = ("--sapce", "x")
    assert slurm.run(2) == []


def task(number: str, array: str) -> dict[str, str]:
    """What Slurm tells a task of an array such as 0-3, 1,3 or 0-6:2."""
    numbers: list[int] = []
    for each in array.split(","):
        ends, _, step = each.partition(":")
        first, _, last = ends.partition("-")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return {
        "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_COUNT": str(len(numbers)),
        "SLURM_ARRAY_TASK_MIN": str(min(numbers)), "SLURM_ARRAY_TASK_MAX": str(max(numbers)),
    }  # fmt: skip


def begin(root: Path) -> None:
    """As if sweep run1 of the digits had been started there."""
    folder = root / "results" / "digits" / "run1"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text("{}")


def command(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("2:30", 150), ("01:00:00", 3600), ("1-02", 93600), ("1-02:03", 93780), ("2-00:00:01", 172801)],
)
def test_a_time_limit_is_read_as_sbatch_does(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_a_time_that_is_over_before_it_begins_is_refused() -> None:
    with pytest.raises(ConfigError, match="give more time"):
        check_settings(SlurmSettings(time="00:02:00"))
