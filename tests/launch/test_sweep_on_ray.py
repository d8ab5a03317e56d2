"""The real thing: `python launch/sweep.py` on real digits with real Ray, killed, resumed and stopped by signals.

Each sweep starts a Ray of its own in a process of its own, as a user's would; all share one trained original.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hamu.training.records import read_records, read_trials
from tests.launch.launched import SETTINGS, SHORT, Launched, ended, is_alive, ray_children, trial_processes, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def sweeps(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    launched = Launched(repo_root, tmp_path_factory.mktemp("artifacts"))
    yield launched
    launched.end()


def test_a_sweep_leaves_all_its_results_and_says_where(sweeps: Launched) -> None:
    given = ("--set", "method=hamu-q,ft", "--set", "constraint_ratio=0.1,0.99")
    out = sweeps.run("--name", "whole", *SHORT, *given)
    folder = sweeps.folder("whole")
    assert out.splitlines()[-1] == "report: art/results/digits/whole/report.html"
    assert "Pareto front" in out

    rows = read_trials(folder / "trials.parquet")
    assert [row["method"] for row in rows] == ["hamu-q", "hamu-q", "ft"]
    assert {row["status"] for row in rows} == {"finished"}
    assert rows[1]["stop_reason"] in ("stopping_criterion", "infeasible")
    assert set(SETTINGS) <= set(pq.read_schema(folder / "trials.parquet").names)

    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["name"], summary["space"], summary["task"]) == ("whole", "digits/quickstart", "digits")
    assert summary["trials"] == {"total": 3, "finished": 3, "failed": 0, "early_stopped": 1, "pruned": 0}
    assert summary["train_s"] == pytest.approx(sum(row["train_s"] for row in rows))
    span_s = max(row["ended_at"] for row in rows) - min(row["started_at"] for row in rows)
    assert span_s <= summary["wall_s"] < span_s + 30  # a slot is asked for before its process is there to begin a trial
    assert summary["gradient_product"] > 0
    assert {entry["trial_id"] for entry in summary["pareto"]} <= {row["trial_id"] for row in rows}
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (folder / "report.html").read_text()

    assert all(path.suffix == ".parquet" and not path.name.startswith(".") for path in (folder / "records").iterdir())
    records = read_records(folder / "records")
    assert set(records["trial_id"].to_pylist()) == {row["trial_id"] for row in rows}
    assert {Path(row["model_path"]) for row in rows} == {path.parent for path in folder.glob("trials/*/model/record.json")}
    assert not list(folder.rglob("*.pkl"))
    assert not list(folder.glob("trials/*/checkpoint.pt"))


def test_a_killed_sweep_resumes_without_running_or_losing_a_finished_trial(sweeps: Launched) -> None:
    given = ("--set", "method=ft", "--set", "lr=0.005,0.01,0.015,0.02,0.03", "--set", "epochs=2", "--set", "save_strategy=steps")
    killed = sweeps.start("--name", "killed", *SHORT[-2:], *given, "--set", "save_steps=2")
    folder = sweeps.folder("killed")
    wait_for(lambda: len(ended(folder)) >= 2 and bool(list(folder.glob("trials/*/checkpoint.pt"))), killed)
    slots = trial_processes(killed.pid)
    assert slots
    killed.kill()
    killed.wait()
    finished = {path: path.stat().st_mtime_ns for path in ended(folder)}
    plan = json.loads((folder / "sweep.json").read_text())
    broken = folder / "trials" / plan["trials"][-1]["trial_id"]  # one that had not begun: its file cannot be read
    broken.mkdir()
    (broken / "checkpoint.pt").write_bytes(b"cut short")

    out = sweeps.run("--resume", "killed")  # at once: old workers may still live, and must not write on
    assert f"trial {broken.name} begins anew, since what it had saved is broken" in out
    assert (broken / "checkpoint.pt.corrupt-1").read_bytes() == b"cut short"
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(ended(folder)) == 5
    assert not any(map(is_alive, slots))
    rows = read_trials(folder / "trials.parquet")
    assert [row["trial_id"] for row in rows] == [trial["trial_id"] for trial in plan["trials"]]
    assert [(row["status"], row["steps"]) for row in rows] == [("finished", 22)] * 5
    steps = [(row["trial_id"], row["step"]) for row in read_records(folder / "records").to_pylist() if row["kind"] == "step"]
    assert len(steps) == len(set(steps)) == 5 * 22
    again = subprocess.run([*sweeps.command, "--resume", "killed", "--dry-run"], cwd=sweeps.root, capture_output=True, text=True)
    assert "finished   5 of 5" in again.stdout


def test_a_worker_that_is_killed_takes_up_its_trial_again(sweeps: Launched) -> None:
    given = ("--set", "method=ft", "--set", "lr=0.005,0.01", "--set", "epochs=2", "--set", "save_strategy=steps")
    process = sweeps.start("--name", "worker", *SHORT[-2:], *given, "--set", "save_steps=2")
    folder = sweeps.folder("worker")
    wait_for(lambda: bool(list(folder.glob("trials/*/checkpoint.pt"))), process)
    os.kill(trial_processes(process.pid)[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "goes on from its checkpoint" in out
    rows = read_trials(folder / "trials.parquet")
    assert {(row["status"], row["steps"]) for row in rows} == {("finished", 22)}


def test_a_signal_ends_the_sweep_with_its_code_and_says_how_to_go_on(sweeps: Launched) -> None:
    name, number = "stopped", signal.SIGTERM  # which Ray would have liked to keep for itself
    process = sweeps.start("--name", name, *SHORT, "--set", "method=ft", "--set", "lr=0.01,0.02", "--set", "epochs=20")
    wait_for(lambda: bool(list(sweeps.folder(name).glob("trials/*/attempts.json"))), process)
    time.sleep(4)  # until it has reported
    below = ray_children(process.pid)
    process.send_signal(number)
    sent = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - sent < 15
    assert process.returncode == 128 + number, out
    assert list(sweeps.folder(name).glob("trials/*/checkpoint.pt"))  # by no save_strategy: it was asked to
    assert f"stopped by {number.name}: 0 of 2 trials finished and kept" in out
    assert re.search(rf"python launch/sweep.py --resume {name} --storage-path art", out)
    assert read_trials(sweeps.folder(name) / "trials.parquet") == []
    deadline = time.monotonic() + 20
    while any(map(is_alive, below)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_alive, below))


def test_two_processes_cannot_run_one_sweep(sweeps: Launched) -> None:
    first = sweeps.start("--name", "twice", *SHORT, "--set", "method=ft", "--set", "epochs=20")
    wait_for((sweeps.folder("twice") / "sweep.json").exists, first)
    out = sweeps.run("--resume", "twice", code=2)
    assert f"is in use by process {first.pid} on " in out
    first.kill()
    first.wait()
