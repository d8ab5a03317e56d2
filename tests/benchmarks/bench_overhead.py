"""What a sweep costs beside its trials: 1,000 of them that do nothing, through the real runner and Ray Tune, in 2 slots.

    python -m tests.benchmarks.bench_overhead          prints the table, and writes results/overhead.md

A trial here begins, says its numbers, writes its row as a real one does, and ends. Seconds a trial are those of the whole run,
from the first look at the folder to the last trial's end, less the start of the slots' processes, over the number of trials.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hamu.cli.ray_environment import prepare_environment, ray_folder

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
N_TRIALS, N_SLOTS = 1000, 2
LIMITS = {"trial_s": 0.06, "memory_mb": 100.0, "rows_s": 2.0, "read_trials_s": 2.0, "resume_s": 2.0}
WAYS = ("grid", "random")
_APART = """
import json, sys
from tests.benchmarks.bench_overhead import measure
print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
"""


def measure(way: str, n_trials: int = N_TRIALS, profile: str | None = None) -> dict[str, Any]:
    """Run the no-op trials on a Ray of this process's own.

    Args:
        way: "grid" (in order) or "random" (a search proposes each).
        n_trials: of the plan; all of them run.
        profile: where to write a profile of the driver; default: none is made.

    Returns:
        trial_s: seconds a trial. memory_mb: growth of this process's resident memory. rows_s, read_trials_s, resume_s: seconds to
        read the folder, trials.parquet, and to see that nothing is left to run. start_s: of the slots' processes.
    """
    prepare_environment(ROOT)
    import ray
    from rich.console import Console

    from hamu.training.ray_workers import local_ray
    from hamu.training.records import read_trials
    from launch.follow import Follow
    from launch.live import Board
    from launch.machine import Slots
    from launch.on_tune import run_on_tune
    from launch.proposals import Proposals, open_search
    from launch.results import SweepFolder
    from launch.shared import Shared
    from launch.signals import Signals
    from launch.standing import is_searched
    from tests.benchmarks.noop_trial import NoopTrial, noop_plan

    with tempfile.TemporaryDirectory() as root, ray_folder() as for_ray:
        plan = noop_plan(Path(root), n_trials, way)
        folder = SweepFolder(Path(root) / "sweep")
        folder.path.mkdir()
        folder.start(plan)
        todo = folder.unfinished(plan)
        with local_ray(cpus=N_SLOTS, gpus=0, shared_bytes=0, dashboard=False, folder=for_ray):
            ray.get(ray.remote(_nothing).remote())
            shared = Shared(plan=plan, folder=str(folder.path), data={}, originals={}, run_id="one")
            gc.collect()
            before = resident_mb()
            started = time.monotonic()
            with Path(os.devnull).open("w") as nowhere, Board(plan, Console(file=nowhere)) as board, _profiled(profile):
                proposals = Proposals([], open_search(plan, folder), budget=n_trials) if is_searched(plan.search) else None
                follow = Follow(plan, folder, board, Signals(), tell=proposals.tell if proposals else None)
                run_on_tune(shared, todo, Slots(count=N_SLOTS), follow, proposals=proposals, trial=NoopTrial)
                folder.write_trials()
            ended = time.monotonic()
            gc.collect()
            after = resident_mb()
        rows = folder.rows()
        assert len(rows) == n_trials and all(row["status"] == "finished" for row in rows.values()), "a no-op trial did not end"
        first = min(row["started_at"] for row in rows.values())
        start_s = first - (time.time() - (time.monotonic() - started))
        times: dict[str, Callable[[], Any]] = {
            "rows_s": lambda: SweepFolder(folder.path).rows(),
            "read_trials_s": lambda: read_trials(folder.trials_parquet),
            "resume_s": lambda: SweepFolder(folder.path).unfinished(SweepFolder(folder.path).read_plan(Path(root))),
        }
        seconds = {name: _seconds(work) for name, work in times.items()}
    return {
        "way": way, "trials": n_trials, "trial_s": (ended - started - start_s) / n_trials, "start_s": start_s,
        "memory_mb": after - before, **seconds,
    }  # fmt: skip


def measure_apart(way: str, n_trials: int = N_TRIALS) -> dict[str, Any]:
    """`measure` in a process of its own, whose memory nothing else has used.

    Raises:
        RuntimeError: it failed, with what it said.
    """
    done = subprocess.run([sys.executable, "-c", _APART, way, str(n_trials)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def resident_mb() -> float:
    """Resident memory of this process, MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024 / 1e6


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _nothing() -> None:
    return None


class _profiled:
    def __init__(self, path: str | None) -> None:
        import cProfile

        self._path, self._profile = path, cProfile.Profile() if path else None

    def __enter__(self) -> None:
        if self._profile is not None:
            self._profile.enable()

    def __exit__(self, *exception: object) -> None:
        if self._profile is not None:
            self._profile.disable()
            self._profile.dump_stats(self._path)


def table(measured: list[dict[str, Any]]) -> str:
    """The figures as Markdown, each beside its limit."""
    names = {
        "trial_s": "seconds a trial", "memory_mb": "growth of the driver's memory, MB", "rows_s": "reading the rows, s",
        "read_trials_s": "reading trials.parquet, s", "resume_s": "seeing what is left to run, s",
    }  # fmt: skip
    lines = [f"| | {' | '.join(each['way'] for each in measured)} | limit |", "|---" * (len(measured) + 2) + "|"]
    for name, words in names.items():
        lines.append(f"| {words} | {' | '.join(f'{each[name]:.3g}' for each in measured)} | {LIMITS[name]:g} |")
    return "\n".join(lines)


def main() -> int:
    """Measure both ways, write and print them; 1 if a limit is missed."""
    from tests.benchmarks.measure import hardware

    measured = [measure_apart(way) for way in WAYS]
    text = table(measured)
    head = f"{measured[0]['trials']} trials that do nothing, {N_SLOTS} slots; {datetime.date.today().isoformat()}, {hardware()}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.md").write_text(f"# What a sweep costs beside its trials\n\n{head}\n\n{text}\n")
    print(f"{head}\n\n{text}")
    print(json.dumps(measured))
    return 0 if all(each[name] <= limit for each in measured for name, limit in LIMITS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
