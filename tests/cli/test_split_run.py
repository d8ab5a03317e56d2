"""A single run in several processes, through the real command line: bad input before Ray, the numbers of one process, faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TRAIN = [sys.executable, "-m", "hamu.cli.train"]
SPLIT = ["--gradient_pairing", "split-gpu", "--num_workers", "2"]
BASE = ["--unlearning_method", "hamu-q", "--gradient_pairing", "split-gpu"]
UNLEARN = [
    "--unlearning_method", "hamu-q", "--constraint_ratio", "0.1", "--learning_rate", "0.02", "--batch_size", "64",
    "--device", "cpu", "--save_strategy", "steps", "--save_steps", "5", "--logging_steps", "1", "--logging_strategy", "steps",
]  # fmt: skip


def run(root: Path, *given: str, code: int = 0) -> dict[str, Any]:
    """The JSON line that a command ends with."""
    done = subprocess.run([*TRAIN, *given], cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original that knows its digits."""
    folder = tmp_path_factory.mktemp("split")
    run(folder, "--add_forget_to_train", "--num_train_epochs", "2", "--device", "cpu")
    return folder


def train_workers(pid: int) -> list[int]:
    """Ray Train's worker processes below a process."""
    parents, workers = {}, []
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if b"RayTrainWorker" in (entry / "cmdline").read_bytes():
                workers.append(int(entry.name))
        except (OSError, ValueError):
            continue

    def is_below(child: int) -> bool:
        return child == pid or (child in parents and child > 1 and is_below(parents[child]))

    return [worker for worker in workers if is_below(worker)]


def wait_for(condition: Any, process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


@pytest.mark.slow
def test_bad_input_is_refused_before_ray_is_imported(root: Path, tmp_path: Path) -> None:
    cases = {
        "--num_workers 3": "needs an even number of processes, got 3; use num_workers 2 or 4",
        "--num_workers 1": "needs an even number of processes, got 1; use num_workers 2",
        "--num_workers 2 --freeze_batchnorm False": "needs frozen BatchNorm",
        "--num_workers 2 --unlearning_method none": "use gradient_pairing sequential with num_workers 1",
        "--num_workers 2 --backend nccl --device cpu": "does not go with pairing",
        "--num_workers 2 --backend nccl": "needs 2 whole GPUs, got 0: NCCL cannot have two workers on one GPU",
        "--num_workers 2 --device cuda": "this machine shows 0 GPUs",
        "--num_workers 4096": "needs as many cores, got",
        "--num_workers 2 --backend mpi": "backend",
        "--num_workers 2 --ddp_timeout 0": "ddp_timeout",
        "--num_workers 2 --device cuda:1": "device",
        "--num_workers 2 --ray_address somewhere": "ray_address must be auto or host:port, got 'somewhere'",
        "--num_workers 2 --ray_address 127.0.0.1:1": "no Ray cluster at '127.0.0.1:1'",
    }
    script = tmp_path / "first.py"
    script.write_text(
        "import contextlib, io, json, sys\n"
        "from hamu.cli.train import main\n"
        "told = {}\n"
        f"for line in {list(cases)}:\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):\n"
        f"        code = main([*{BASE}, *line.split()])\n"
        "    told[line] = [code, said.getvalue(), 'ray' in sys.modules]\n"
        "print(json.dumps(told))\n"
    )
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], cwd=root, env=no_gpu, capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout.splitlines()[-1])
    for line, (code, said, has_ray) in told.items():
        assert code == 2, (line, said)
        assert cases[line] in said
        assert said.count("\n") == 1, said
        assert not has_ray, line


@pytest.mark.ray
def test_killed_interrupted_and_resumed_two_processes_make_the_run_of_one(root: Path) -> None:
    alone = run(root, *UNLEARN, "--num_train_epochs", "8")
    given = [*UNLEARN, *SPLIT, "--num_train_epochs", "8", "--output_dir", "split"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*TRAIN, *given], cwd=root, start_new_session=True, **streams)
    checkpoint = root / "split" / "checkpoint.pt"
    try:
        wait_for(checkpoint.exists, process)
        workers = train_workers(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        wait_for(lambda: not set(workers) & set(train_workers(process.pid)), process)
        saved = checkpoint.stat().st_mtime_ns
        wait_for(lambda: checkpoint.stat().st_mtime_ns > saved, process)  # others went on from there
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C, which reaches Ray's processes too
        out, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, said
    assert "Traceback" not in said
    cut = json.loads(out.splitlines()[-1])
    assert cut["stop_reason"] == "cancelled"
    assert 10 <= cut["steps"] < alone["steps"]
    assert (root / cut["model_path"] / "model.safetensors").exists()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    together = run(root, *given, "--resume")
    assert (together["steps"], together["stop_reason"]) == (alone["steps"], "finished")
    # Each of both has one thread (OMP_NUM_THREADS); another number rounds otherwise, and 168 steps of float32 make much of it.
    for name in ("retain_loss", "forget_loss", "test_loss", "gradient_product", "max_constraint_ratio"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    assert (root / together["model_path"] / "model.safetensors").exists()
    assert sorted(path.name for path in (root / "split").iterdir()) == ["model", "records", "run.json"]
