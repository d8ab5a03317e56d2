"""Sweeps that choose among their trials, on real Ray: they stop when their rule says so, go on where they were killed, and lose
no more to a model that cannot be made than the trials that need it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import launch.ready
from hamu.errors import ConfigError
from hamu.training.records import read_trials
from launch.left_out import without_dropped
from launch.machine import Machine, Slots
from launch.plan import Plan, make_plan
from launch.results import SweepFolder
from launch.runner import run_sweep
from launch.runs import read_runs
from launch.signals import Signals
from launch.words import Words
from tests.launch.launched import SHORT, Launched, ended, wait_for
from tune_spaces.search import SearchSettings
from tune_spaces.space import Space

RATES = (0.0001, 0.04, 0.03, 0.02)
SPACE = Space(
    name="digits/chosen",
    summary="four rates, of which the first changes next to nothing",
    base={
        "dataset_name": "digits", "num_train_epochs": 0.5, "unlearning_method": "hamu-q", "constraint_ratio": 0.2,
        "eval_strategy": "steps", "eval_steps": 2,
    },
    grids=({"learning_rate": RATES},),
    original={"num_train_epochs": 1},
)  # fmt: skip


class Chosen:
    """A sweep of that space, run on the session's Ray in place of one of its own."""

    def __init__(
        self, root: Path, *, overrides: dict[str, Any] | None = None, with_reference: bool = False, **settings: Any
    ) -> None:
        search = SearchSettings(**settings)
        self.plan: Plan = make_plan(
            SPACE, name="chosen", overrides=overrides or {}, root=root, search=search, with_reference=with_reference
        )
        self.folder = SweepFolder(root / "results" / "digits" / "chosen")
        self.folder.start(self.plan)
        self.ids = [trial.trial_id for trial in self.plan.trials]

    def run(self, *, count: int = 1, **more: Any) -> str:
        """Run what has not ended; returns what was said. more: of `run_sweep`."""
        said, signals = io.StringIO(), Signals()
        machine = Machine(cpus=2, cpu_name="a core", memory_bytes=2**34, gpus=0)
        with signals.taken():
            run_sweep(
                self.plan,
                self.folder,
                slots=Slots(count=count),
                machine=machine,
                words=Words(Console(file=said)),
                signals=signals,
                **more,
            )
        return said.getvalue()


@pytest.fixture
def on_cluster(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps join the session's Ray, which takes seconds to start."""

    @contextlib.contextmanager
    def joined(**settings: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(launch.ready, "local_ray", joined)


def test_trials_that_a_probe_found_infeasible_are_named_and_have_ended(tmp_path: Path) -> None:
    sweep, said = Chosen(tmp_path), io.StringIO()
    first = sweep.ids[0]
    left = without_dropped(sweep.plan, sweep.ids, sweep.folder, {first: "asks for 2 S"}, Words(Console(file=said)))
    assert left == sweep.ids[1:] == sweep.folder.unfinished(sweep.plan)
    assert said.getvalue() == f"dropped, and not run: {first}\n"
    [row] = sweep.folder.write_trials()
    assert (row["status"], row["message"], row["learning_rate"], row["started_at"]) == ("dropped", "asks for 2 S", RATES[0], None)


def test_a_scheduler_that_the_trials_do_not_suit_is_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the trials have one value of each"):
        Chosen(tmp_path, overrides={"learning_rate": (0.01,)}, scheduler="pbt").run()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_sweep_stops_when_its_target_is_met_and_has_nothing_left_when_resumed(tmp_path: Path, on_cluster: None) -> None:
    sweep = Chosen(tmp_path, target=("forget_accuracy<=0.6",), trials=4)
    sweep.run()
    rows = sorted(sweep.folder.rows().values(), key=lambda row: row["ended_at"])
    # Nothing was begun after the first trial that meets it; the rate that changes next to nothing does not.
    assert [row["forget_accuracy"] <= 0.6 for row in rows] == [False] * (len(rows) - 1) + [True]
    assert len(rows) < 4
    stored = json.loads(sweep.folder.search_path.read_text())
    assert stored["proposed"] == len(rows)
    assert f"met by {rows[-1]['trial_id']}" in stored["ended"]
    said = sweep.run()
    assert f"met by {rows[-1]['trial_id']}" in said
    assert "Ray started" not in said
    assert len(sweep.folder.rows()) == len(rows)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_failing_original_takes_down_its_own_trials_and_retain_only_models_are_trained_beside_the_others(
    tmp_path: Path, on_cluster: None
) -> None:
    in_the_way = tmp_path / "checkpoints" / "digits" / "seed_43"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder")
    sweep = Chosen(tmp_path, overrides={"seed": (42, 43), "learning_rate": (0.02, 0.04)}, with_reference=True)
    said = sweep.run(count=2)
    rows = {row["trial_id"]: row for row in read_trials(sweep.folder.trials_parquet)}
    assert {(row["seed"], row["status"]) for row in rows.values()} == {(42, "finished"), (43, "failed")}
    lost = [row for row in rows.values() if row["seed"] == 43]
    assert len(lost) == 2
    assert all("failed, so its 2 trials cannot start" in row["error"] for row in lost)
    known = sweep.folder.references()
    for trial in sweep.plan.trials:
        has_failed = rows[trial.trial_id]["seed"] == 43
        assert ("error" in known[str(trial.reference)]) == has_failed
        assert (rows[trial.trial_id]["forget_closeness"] is None) == has_failed
    assert said.count("retain-only model") >= 2  # the one that is there, and the one that is not
    assert sweep.folder.unfinished(sweep.plan) == [row["trial_id"] for row in lost]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_search_neither_fails_nor_begins_trials_that_it_did_not_choose(tmp_path: Path, on_cluster: None) -> None:
    in_the_way = tmp_path / "checkpoints" / "digits" / "seed_43"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder")
    sweep = Chosen(tmp_path, overrides={"seed": (43, 42), "learning_rate": (0.02, 0.04)}, name="random", trials=3)
    said = sweep.run(count=2)
    assert "2 trials cannot start, as their original failed; the search chooses among the other 2" in said
    assert {(row["seed"], row["status"]) for row in sweep.folder.rows().values()} == {(42, "finished")}
    assert len(sweep.folder.rows()) == 2
    assert sweep.folder.search_state() == {"ended": None, "proposed": 2, "view": "paper", "left_out": 2}
    in_the_way.unlink()
    sweep.run(count=2)
    assert len(sweep.folder.rows()) == 3  # and no more: what it had not chosen had not been begun
    assert len(read_runs(sweep.folder.runs_path)) == 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_probe_drops_trials_that_are_infeasible_and_says_what_that_saved(tmp_path: Path, on_cluster: None) -> None:
    given = {"learning_rate": (0.02,), "constraint_ratio": (0.05, 0.1, 1.0), "num_train_epochs": (0.2,)}
    sweep = Chosen(tmp_path, overrides=given, with_reference=True)
    said = sweep.run(n_probe=2, prune_infeasible=True)
    low, middle, high = sweep.ids
    rows = {row["trial_id"]: row for row in read_trials(sweep.folder.trials_parquet)}
    assert {trial_id: row["status"] for trial_id, row in rows.items()} == {low: "finished", middle: "finished", high: "dropped"}
    assert "it would have ended at step 0" in rows[high]["message"]
    assert (rows[high]["started_at"], rows[high]["forget_closeness"]) == (None, None)
    assert f"dropped, and not run: {high}" in said
    assert "1 trial dropped before it ran; measuring took" in said
    assert "the trials would have taken about" in said
    probe = json.loads(sweep.folder.probe_path.read_text())
    assert high in json.dumps(probe)
    summary = json.loads(sweep.folder.summary.read_text())
    assert (summary["dropped"], summary["cost"]["n_trials"], summary["view"]) == (1, 2, "reference")
    [run] = read_runs(sweep.folder.runs_path)
    ran = [rows[low], rows[middle]]
    assert summary["wall_s"] == run["ended_at"] - run["started_at"]
    assert run["started_at"] <= min(row["started_at"] for row in ran)
    assert run["ended_at"] >= max(row["ended_at"] for row in ran)
    assert sweep.folder.unfinished(sweep.plan) == []
    assert "Ray started" not in sweep.run(n_probe=2, prune_infeasible=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_resumed_sweep_makes_the_retain_only_models_that_its_ended_trials_lack(tmp_path: Path, on_cluster: None) -> None:
    place = tmp_path / "checkpoints" / "digits" / "seed_42" / "forget_0_0.5"
    place.parent.mkdir(parents=True)
    place.write_text("in the way")
    given = {"learning_rate": (0.02,), "hard_probability": (0.0, 0.5)}
    sweep = Chosen(tmp_path, overrides=given, with_reference=True)
    sweep.run()
    whole, half = sweep.ids
    lost = str(sweep.plan.trials[1].reference)
    assert sweep.folder.unfinished(sweep.plan) == []
    summary = json.loads(sweep.folder.summary.read_text())
    assert list(summary["references_failed"]) == [lost]
    assert (summary["view"], summary["not_compared"]) == ("paper", [half])
    rows = {path: path.stat().st_mtime_ns for path in ended(sweep.folder.path)}

    place.unlink()
    said = sweep.run()  # one that failed is tried again
    assert "no trial is left to run; retain-only models that trials have still to be compared with: 1" in said
    summary = json.loads(sweep.folder.summary.read_text())
    assert (summary["references_failed"], summary["view"], summary["not_compared"]) == ({}, "reference", [])

    sweep.folder.references_path.unlink()  # as of a driver that was killed while it waited for them
    said = sweep.run()
    assert "compared with: 2" in said
    assert all(row["forget_closeness"] is not None for row in read_trials(sweep.folder.trials_parquet))
    assert {path: path.stat().st_mtime_ns for path in rows} == rows
    assert "Ray started" not in sweep.run()


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_sweep_stops_when_its_hypervolume_no_longer_grows(tmp_path: Path, on_cluster: None) -> None:
    sweep = Chosen(tmp_path, overrides={"learning_rate": (0.04, 0.0001, 0.0002, 0.0003, 0.0004)}, until="no-gain:2")
    said = sweep.run()
    assert list(sweep.folder.rows()) == sweep.ids[:3]  # the first is best, and two gained nothing
    assert "has not grown over 2 trials" in said


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheduler", ["asha", "pbt"])
def test_a_scheduler_that_a_plan_names_ends_or_changes_trials(tmp_path: Path, on_cluster: None, scheduler: str) -> None:
    rates = (0.04, 0.0003, 0.0002, 0.0001)
    sweep = Chosen(tmp_path, overrides={"learning_rate": rates, "num_train_epochs": (1,)}, scheduler=scheduler)
    sweep.run()
    rows = list(sweep.folder.rows().values())
    if scheduler == "asha":  # each is worse at step 2 than the first
        assert [(row["status"], row["steps"]) for row in rows] == [("finished", 11)] + [("pruned", 2)] * 3
    else:
        assert [(row["status"], row["steps"]) for row in rows] == [("finished", 11)] * 4
        assert {row["learning_rate"] for row in rows} <= set(rates)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_search_resumes_with_the_trial_it_had_begun_and_runs_no_more_than_it_may(
    repo_root: Path, tmp_path: Path
) -> None:
    sweeps = Launched(repo_root, tmp_path)
    folder = sweeps.folder("tpe")
    given = ("--set", "method=ft", "--set", "lr=0.005..0.08:12", "--search", "tpe", "--trials", "4", "--max-concurrent", "1")
    try:
        killed = sweeps.start("--name", "tpe", *SHORT[:2], *SHORT[4:], *given)
        wait_for(lambda: len(ended(folder)) >= 2 and len(list(folder.glob("trials/*/attempts.json"))) >= 3, killed)
        killed.kill()
        killed.wait()
        before = {path: path.stat().st_mtime_ns for path in ended(folder)}
        begun = {path.parent.name for path in folder.glob("trials/*/attempts.json")}
        out = sweeps.run("--resume", "tpe")
        rows = read_trials(folder / "trials.parquet")
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert [row["status"] for row in rows] == ["finished"] * 4
        assert begun <= {row["trial_id"] for row in rows}
        assert "[4/4]" in out
    finally:
        sweeps.end()
