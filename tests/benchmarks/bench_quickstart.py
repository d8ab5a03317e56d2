"""The quickstart sweep, timed: how well the slots are used, and what it shows.

    python tests/benchmarks/bench_quickstart.py

Runs `python launch/sweep.py` into a temporary folder and keeps its figure at tests/benchmarks/results/pareto.png.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hamu.reports.tables import pareto_front
from hamu.reports.views import View
from hamu.training.records import read_trials

REPO = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def measure() -> dict[str, float]:
    """Seconds and counts of one quickstart sweep, original's training included in `command_s`."""
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "launch/sweep.py", "--name", "bench", "--storage-path", root],
            cwd=REPO,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        command_s = time.perf_counter() - start
        (folder,) = Path(root).glob("results/*/bench")
        summary = json.loads((folder / "summary.json").read_text())
        trials = read_trials(folder / "trials.parquet")
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(folder / "pareto.png", RESULTS / "pareto.png")
    warm = sorted(trial["setup_s"] for trial in trials)[: len(trials) - summary["slots"]]
    limit_s = 1.15 * summary["train_s"] / summary["slots"] + 8
    return {
        "command_s": command_s,
        "wall_s": summary["wall_s"],
        "wall_limit_s": limit_s,
        "train_s": summary["train_s"],
        "slots": summary["slots"],
        "warm_setup_max_s": warm[-1],
        "trials": summary["trials"]["total"],
        "finished": summary["trials"]["finished"],
        "infeasible": summary["infeasible"],
        "within_5_steps": sum(trial["steps"] <= 5 for trial in trials),
        "front": len(pareto_front(trials, View("paper"))),
        "gradient_product": summary["gradient_product"],
        "max_constraint_ratio": summary["max_constraint_ratio"],
        "longest_trial_s": max(trial["train_s"] for trial in trials),
        "shortest_trial_s": min(trial["train_s"] for trial in trials),
    }


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:24s} {value:.5g}")
