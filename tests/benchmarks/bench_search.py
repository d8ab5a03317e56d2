"""How well the searches of a sweep do against a whole grid of the quickstart task, on results that were measured once.

    python -m tests.benchmarks.bench_search            # plays the table of results/search_grid.json, writes results/search.md
    python -m tests.benchmarks.bench_search --run      # measures that table anew first: 60 trials and a retrained model with Ray

The table: digits, hamu-q and hamu-u at 5 learning rates and 6 constraint ratios. Each search is played with two trials at a time,
whose results arrive in the order of their training seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hamu.reports.closeness import with_references
from hamu.reports.hypervolume import hypervolume
from hamu.reports.views import View, view_of
from hamu.training.records import SPLITS
from tests.benchmarks.search_player import play
from tune_spaces.goals import parse_conditions, total_violation
from tune_spaces.search import SEARCHES, SearchSettings

REPO = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "search_grid.json"
N_TRIALS = 24
SEEDS, MANY_SEEDS = range(3), range(20)
LEAST_SHARE, MOST_TRIALS = 0.90, 30
"""What must be reached: share of the grid's hypervolume with N_TRIALS, and trials to meet a target that the grid meets."""

TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "forgotten, retain accuracy kept": (("forget_accuracy<=retrained",), ("retain_accuracy>=original-0.01",)),
    "forget loss within half a nat of the retrained model's": (
        ("forget_loss>=retrained-0.5", "forget_loss<=retrained+0.5"),
        ("retain_accuracy>=original-0.01",),
    ),
    "forgotten, retain accuracy of a model trained further": (("forget_accuracy<=retrained",), ("retain_accuracy>=0.995",)),
}
_AXES = (
    "unlearning_method=hamu-q,hamu-u",
    "learning_rate=0.005,0.01,0.02,0.04,0.08",
    "constraint_ratio=0.05,0.1,0.2,0.4,0.6,0.8",
)
_COLUMNS = (
    "trial_id", "method", "learning_rate", "constraint_ratio", "status", "stop_reason", "steps", "train_s", "n_classes",
    "gradient_product", "max_constraint_ratio", "forget_closeness", "forget_quality", "retain_utility",
)  # fmt: skip
_COMPARED = (*(f"{split}_{metric}" for split in SPLITS for metric in ("loss", "accuracy")), "forget_test_loss_auc")


@dataclass(frozen=True)
class Table:
    """Settings and results of all trials of a grid, by trial id, and where they were measured."""

    pool: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Mapping[str, Any]]
    made: Mapping[str, Any]

    @property
    def views(self) -> tuple[View, ...]:
        """The paper view, and the reference view where there is a retrained model."""
        return tuple(dict.fromkeys((View("paper"), view_of(self.rows.values()))))


@functools.cache
def read_table(path: Path = TABLE) -> Table:
    """The table that is kept."""
    stored = json.loads(path.read_text())
    return Table(pool=stored["pool"], rows=stored["rows"], made=stored["made"])


def measure(path: Path = TABLE) -> None:
    """Run the grid as a sweep and keep its results."""
    with tempfile.TemporaryDirectory() as root:
        assignments = [word for axis in _AXES for word in ("--set", axis)]
        command = [
            sys.executable,
            "launch/sweep.py",
            "--space",
            "digits/quickstart",
            "--name",
            "grid",
            "--with-reference",
            *assignments,
        ]
        subprocess.run([*command, "--storage-path", root], cwd=REPO, check=True)
        keep_table(Path(root) / "results" / "digits" / "grid", path)


def keep_table(folder: Path, path: Path, note: str = "") -> None:
    """Write the results of a sweep's folder as a table, a trial a line, with a note on how they were measured."""
    plan, summary = (json.loads((folder / name).read_text()) for name in ("sweep.json", "summary.json"))
    references = json.loads((folder / "references.json").read_text())
    stored = [json.loads((folder / "trials" / trial["trial_id"] / "row.json").read_text()) for trial in plan["trials"]]
    of = {trial["trial_id"]: trial.get("reference") for trial in plan["trials"]}
    rows = with_references([{**row, "reference": of[row["trial_id"]]} for row in stored], references)
    columns = (*_COLUMNS, *(f"{kind}{metric}" for metric in _COMPARED for kind in ("", "original_", "retrained_")))
    tables = {
        "pool": {trial["trial_id"]: trial["config"] for trial in plan["trials"]},
        "rows": {row["trial_id"]: {name: _short(row[name]) for name in columns if row.get(name) is not None} for row in rows},
    }
    made = {"date": time.strftime("%Y-%m-%d"), "hardware": summary["hardware"], "wall_s": round(summary["wall_s"]), "note": note}
    lines = [f'"made": {json.dumps(made)}']
    for name, table in tables.items():
        lines.append(
            f'"{name}": {{\n' + ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in table.items()) + "\n }"
        )
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


def _short(value: Any) -> Any:
    return float(f"{value:.8g}") if isinstance(value, float) else value


def shares(table: Table, name: str, view: View, seeds: Iterable[int], *, n_trials: int = N_TRIALS) -> list[float]:
    """Share of the whole grid's hypervolume that so many trials of a search reach, by seed."""
    whole = hypervolume(list(table.rows.values()), view) or 0.0
    found = []
    for seed in seeds:
        ended, _ = play(SearchSettings(name=name, trials=n_trials, seed=seed), table.pool, table.rows, view=view)
        found.append((hypervolume([table.rows[trial_id] for trial_id in ended], view) or 0.0) / whole)
    return found


def meeting(table: Table, target: Sequence[str], keep: Sequence[str]) -> set[str]:
    """Trials of the grid that meet all conditions."""
    conditions = (*parse_conditions(target, "target"), *parse_conditions(keep, "keep"))
    return {trial_id for trial_id, row in table.rows.items() if total_violation(conditions, row) == 0.0}


def trials_to_target(table: Table, target: Sequence[str], keep: Sequence[str], name: str, seeds: Iterable[int]) -> list[int]:
    """Trials that ended until the first that meets all conditions, by seed; the grid's size + 1 where none does."""
    met = meeting(table, target, keep)
    found = []
    for seed in seeds:
        settings = SearchSettings(name=name, trials=len(table.pool), seed=seed, target=tuple(target), keep=tuple(keep))
        ended, _ = play(settings, table.pool, table.rows, view=View("paper"))
        found.append(next((n for n, trial_id in enumerate(ended, 1) if trial_id in met), len(table.pool) + 1))
    return found


def report(table: Table) -> str:
    """The figures as Markdown."""
    made = table.made
    lines = [
        "# Searches against the whole grid",
        "",
        f"`python -m tests.benchmarks.bench_search`: digits, hamu-q and hamu-u x 5 learning rates x 6 constraint ratios = "
        f"{len(table.pool)} trials, measured {made['date']} on {_hardware(made['hardware'])} in {made['wall_s']:.0f} s; the "
        f"searches then pick from that table, two trials at a time. {made.get('note', '')}".rstrip(),
        "",
        f"## Share of the grid's hypervolume with {N_TRIALS} of {len(table.pool)} trials",
        "",
        f"Limit: TPE and NSGA-II, median of 3 seeds, at least {LEAST_SHARE:.2f}. Beside it {len(MANY_SEEDS)} seeds: median "
        "(least). The grid in its own order is the first 24 trials.",
        "",
        "| search | " + " | ".join(f"{view.name} view, seeds 0-2 | median | 20 seeds" for view in table.views) + " |",
        "|---|" + "---|---|---|" * len(table.views),
    ]
    for name in SEARCHES:
        cells = []
        for view in table.views:
            many = shares(table, name, view, MANY_SEEDS)
            few = many[: len(SEEDS)]
            one_by_one = ", ".join(f"{share:.3f}" for share in few)
            cells.append(f"{one_by_one} | **{statistics.median(few):.3f}** | {statistics.median(many):.3f} ({min(many):.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The area is mostly that of its upper right corner, which many settings here reach: random search is as good in the "
        "paper view, and little worse in the reference view.",
    ]
    lines += ["", "## Trials until a target is met", "", f"Limit: at most {MOST_TRIALS}. Medians and the most of 20 seeds.", ""]
    lines += [
        "| target | keep | met by | search, seeds 0-2 | search, 20 seeds | random, seeds 0-2 | random, 20 seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, keep in TARGETS.values():
        cells = []
        for name in ("grid", "random"):
            many = trials_to_target(table, target, keep, name, MANY_SEEDS)
            cells += [", ".join(map(str, many[: len(SEEDS)])), f"{statistics.median(many):g} (most {max(many)})"]
        n_met = len(meeting(table, target, keep))
        conditions = " | ".join(", ".join(f"`{text}`" for text in texts) for texts in (target, keep))
        lines.append(f"| {conditions} | {n_met} of {len(table.pool)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _hardware(hardware: Mapping[str, Any]) -> str:
    return f"{hardware['cpus']} cores ({hardware['cpu']}), {hardware['gpus']} GPUs, Python {hardware['python']}"


def main() -> None:
    """Measure if asked to, play, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", action="store_true", help="measure the table anew first")
    if parser.parse_args().run:
        measure()
    text = report(read_table())
    (RESULTS / "search.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
