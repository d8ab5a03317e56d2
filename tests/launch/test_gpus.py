"""Which GPUs there are, by a stand-in `nvidia-smi`: whole ones, and parts of one, which have UUIDs and no numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.gpus import VISIBLE, visible_gpus
from launch.machine import choose_slots, gpu_environment, this_machine
from launch.pairing import Pairing

A, B = "GPU-aaaa1111-0000-0000-0000-000000000000", "GPU-bbbb2222-0000-0000-0000-000000000000"
SMALL, LARGE = "MIG-11111111-0000-0000-0000-000000000000", "MIG-33333333-0000-0000-0000-000000000000"
TWO = (f"GPU 0: NVIDIA H200 (UUID: {A})\nGPU 1: NVIDIA H200 NVL (UUID: {B})\n", f"{A}, 143771\n{B}, 143000\n")
CUT = (
    f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})\n"
    f"  MIG 1g.5gb      Device  0: (UUID: {SMALL})\n"
    f"  MIG 3g.20gb     Device  1: (UUID: {LARGE})\n"
    f"GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})\n",
    f"{A}, 40960\n{B}, [N/A]\n",
)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, listed: str, memory: str) -> None:
    """Put a `nvidia-smi` on the path that says this, and knows no other question."""
    tool = folder / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"-L) cat <<'END'\n{listed}END\n;;\n"
        f"'--query-gpu=uuid,memory.total --format=csv,noheader,nounits') cat <<'END'\n{memory}END\n;;\n"
        "*) exit 9 ;;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (None, ["0", "1"]),
        ("1,0", ["1", "0"]),
        ("", []),
        ("-1", []),
        ("1, -1, 0", ["1"]),  # nothing after one that is no device
        ("7", []),
        (f"{B},0", [B, "0"]),
        ("GPU-bbbb", ["GPU-bbbb"]),
        ("0,0", ["0"]),
    ],
)
def test_visible_are_those_that_the_environment_names_in_its_order(
    given: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, *TWO)
    assert [gpu.id for gpu in visible_gpus({} if given is None else {VISIBLE: given})] == seen


def test_the_memory_of_a_machine_is_that_of_its_smallest_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, *TWO)
    assert this_machine({}).gpu_memory_bytes == 143000 * 2**20
    machine = this_machine({VISIBLE: "0"})
    assert (machine.gpus, machine.gpu_name, machine.gpu_memory_bytes) == (1, "NVIDIA H200", 143771 * 2**20)
    assert "1 x NVIDIA H200 (140 GiB)" in machine.describe()


def test_a_gpu_whose_memory_is_not_told_makes_that_of_the_machine_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, TWO[0], f"{A}, 143771\n{B}, [N/A]\n")
    assert this_machine({}).gpus == 2
    assert this_machine({}).gpu_memory_bytes is None


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (None, [SMALL, LARGE, "1"]),
        (LARGE, [LARGE]),
        (f"{LARGE},{SMALL}", [LARGE, SMALL]),
        ("0", [SMALL]),  # as CUDA reads it
        ("MIG-unknown", []),
    ],
)
def test_the_parts_of_a_gpu_take_its_place(
    given: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, *CUT)
    assert [gpu.id for gpu in visible_gpus({} if given is None else {VISIBLE: given})] == seen


def test_the_memory_of_a_part_is_its_own_not_the_whole_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, *CUT)
    machine = this_machine({VISIBLE: f"{LARGE},{SMALL}"})
    assert (machine.gpus, machine.gpu_memory_bytes, machine.has_mig) == (2, 5 * 10**9, True)
    assert machine.gpu_name == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"


def test_ray_is_told_the_uuids_of_parts_since_it_would_count_them_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, *CUT)
    assert gpu_environment(this_machine({}), {}) == {VISIBLE: f"{SMALL},{LARGE},1"}
    only = {VISIBLE: f" {LARGE}"}
    assert gpu_environment(this_machine(only), only) == {VISIBLE: LARGE}


def test_whole_gpus_are_left_as_the_user_named_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, *TWO)
    assert gpu_environment(this_machine({}), {}) == {}
    given = {VISIBLE: "1, 0"}
    assert gpu_environment(this_machine(given), given) == {VISIBLE: "1,0"}


def test_split_trials_are_refused_on_parts_of_gpus_and_run_on_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, *CUT)
    machine = this_machine({})
    for pairing in (Pairing(n_workers=2), Pairing(n_workers=2, backend="gloo")):
        with pytest.raises(ConfigError, match="MIG devices, which cannot work together; use --set gradient_pairing=sequential"):
            choose_slots(machine, n_trials=4, pairing=pairing)
    assert choose_slots(machine, n_trials=4, pairing=Pairing(n_workers=2), gpus=0).gpus_per_trial == 0
    assert choose_slots(machine, n_trials=4).gpus_per_trial == 1


def test_a_tool_that_fails_shows_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert visible_gpus({}) == []


_SHARING = """
import os, tempfile
from dataclasses import replace
import ray
from launch.gpus import VISIBLE
from launch.machine import choose_slots, fit_slots, gpu_environment, this_machine

machine = replace(this_machine(os.environ), cpus=64)
os.environ.update(gpu_environment(machine, os.environ))
slots = fit_slots(choose_slots(machine, n_trials=99, shares_gpus=True), machine, 2**28)
with tempfile.TemporaryDirectory(prefix="hamu-", dir="/tmp") as folder:
    ray.init(address="local", num_cpus=64, num_gpus=machine.gpus, include_dashboard=False, log_to_driver=False, _temp_dir=folder)

    @ray.remote(num_cpus=0, num_gpus=slots.gpus_per_trial)
    class Trial:
        def seen(self):
            return os.environ[VISIBLE]

    trials = [Trial.remote() for _ in range(slots.count)]
    print("seen", *sorted(ray.get([trial.seen.remote() for trial in trials])))
    ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ray_gives_each_process_the_uuid_of_its_part_and_as_many_processes_as_planned(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, *CUT)
    monkeypatch.setenv(VISIBLE, f"{LARGE},{SMALL}")
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    done = subprocess.run([sys.executable, "-c", _SHARING], capture_output=True, text=True, cwd=repo_root)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("seen")]
    # By memory five trials share the smaller part, and so each of both.
    assert line.split()[1:] == [SMALL] * 5 + [LARGE] * 5
