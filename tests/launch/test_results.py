"""A sweep's folder belongs to one sweep and one process at a time, and knows what has still to run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hamu.errors import ConfigError, DataError, LeaseError
from hamu.storage.files import on_wait, read_json
from hamu.training.records import read_trials
from launch.plan import Plan, make_plan
from launch.results import SweepFolder, check_free, find_sweep, trial_lock, write_json
from launch.runs import Runs, read_runs
from launch.shared import failed_row
from launch.trial_row import read_row
from tune_spaces.space import load_space

HOLD = """
import sys, time
from pathlib import Path
from hamu.storage.lease import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def plan_at(root: Path) -> Plan:
    return make_plan(load_space("digits/quickstart"), name="mine", overrides={"unlearning_method": ("ft",)}, root=root)


def started(root: Path) -> tuple[Plan, SweepFolder]:
    plan, folder = plan_at(root), SweepFolder(root / "results" / "digits" / "mine")
    with folder.lease():
        folder.start(plan)
    return plan, folder


def end_trial(plan: Plan, folder: SweepFolder, index: int, status: str) -> None:
    trial = plan.trials[index]
    folder.trial(trial.trial_id).mkdir(parents=True)
    write_json(folder.trial(trial.trial_id) / "row.json", {**failed_row(plan, trial, "x"), "status": status, "slot": 1})


def test_a_trial_is_finished_iff_its_row_says_so(tmp_path: Path) -> None:
    plan, folder = started(tmp_path)
    ids = [trial.trial_id for trial in plan.trials]
    assert folder.unfinished(plan) == ids
    end_trial(plan, folder, 0, "finished")
    end_trial(plan, folder, 1, "failed")
    folder.trial(ids[2]).mkdir()  # begun
    assert folder.unfinished(plan) == ids[1:]


def test_trials_parquet_holds_the_rows_of_the_trials_that_ended(tmp_path: Path) -> None:
    plan, folder = started(tmp_path)
    end_trial(plan, folder, 0, "finished")
    folder.write_trials()
    rows = read_trials(folder.trials_parquet)
    assert [(row["trial_id"], row["method"], row["status"]) for row in rows] == [(plan.trials[0].trial_id, "ft", "finished")]


def test_the_plan_comes_back_from_its_folder(tmp_path: Path) -> None:
    plan, folder = started(tmp_path)
    assert folder.read_plan(tmp_path) == plan
    assert find_sweep(tmp_path, "mine").path == folder.path
    assert find_sweep(tmp_path, "digits/mine").path == folder.path


def test_a_folder_is_free_only_if_nothing_is_in_it(tmp_path: Path) -> None:
    _, folder = started(tmp_path)
    check_free(SweepFolder(tmp_path / "new"), space="digits/quickstart", root=tmp_path)
    with pytest.raises(ConfigError, match="0 of 3 trials finished.*--resume mine"):
        check_free(folder, space="digits/quickstart", root=tmp_path)
    with pytest.raises(ConfigError, match="belongs to a sweep of space 'digits/quickstart', not 'cifar/rho_sweep'"):
        check_free(folder, space="cifar/rho_sweep", root=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="no sweep's folder; choose another --name than 'other'"):
        check_free(SweepFolder(other), space="digits/quickstart", root=tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 99}'])
def test_a_plan_that_is_none_of_ours_is_refused(tmp_path: Path, content: str) -> None:
    _, folder = started(tmp_path)
    folder.plan_path.write_text(content)
    with pytest.raises(DataError, match="is not a plan of this program"):
        folder.read_plan(tmp_path)


def test_a_sweep_that_is_not_there_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds none"):
        find_sweep(tmp_path, "mine")
    started(tmp_path)
    with pytest.raises(ConfigError, match="unknown sweep 'mien'; did you mean 'mine'"):
        find_sweep(tmp_path, "mien")


def test_a_lease_is_held_by_one_process_and_lost_by_a_dead_one(tmp_path: Path) -> None:
    _, folder = started(tmp_path)
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        owner.stdout.readline()
        with pytest.raises(ConfigError, match="is in use by process"), folder.lease():
            pass
    finally:
        owner.kill()
        owner.wait()
    with folder.lease() as lease:
        lease.check()
    assert [path.name for path in folder.path.glob(".lease*")] == [".lease.3"]


def test_shares_of_a_sweep_are_held_side_by_side_and_not_beside_the_whole(tmp_path: Path) -> None:
    _, folder = started(tmp_path)
    with folder.lease("1-of-4"), folder.lease("2-of-4"):
        with pytest.raises(LeaseError, match="is in use by process"), folder.lease("2-of-4"):
            pass
        with pytest.raises(LeaseError, match="is in use by process .* as part [12]/4; wait for it"), folder.lease():
            pass
    with (
        folder.lease(),
        pytest.raises(LeaseError, match="is in use by process .*; wait for it, stop it, or choose another --name"),
        folder.lease("3-of-4"),
    ):
        pass
    with folder.lease("3-of-4"):
        pass


def test_shares_of_another_number_of_shares_are_refused_and_both_are_named(tmp_path: Path) -> None:
    _, folder = started(tmp_path)
    with folder.lease("1-of-4"):
        with (
            pytest.raises(
                LeaseError, match="is in use by process .* as part 1/4, and part 1/3 divides the same trials in another"
            ),
            folder.lease("1-of-3"),
        ):
            pass
        with folder.lease("2-of-4"):
            pass
    with folder.lease("1-of-3"):
        pass


def test_a_plan_is_replaced_by_a_longer_one_only(tmp_path: Path) -> None:
    plan, folder = started(tmp_path)
    overrides = {"unlearning_method": ("ft", "kl")}
    longer = make_plan(load_space("digits/quickstart"), name="mine", overrides=overrides, root=tmp_path)
    assert {trial.trial_id for trial in longer.trials} > {trial.trial_id for trial in plan.trials}
    folder.start(longer)
    with pytest.raises(ConfigError, match=r"holds another sweep's plan \(6 trials of .*go on with --resume mine"):
        folder.start(plan)
    assert folder.read_plan(tmp_path) == longer


def test_a_trial_waits_for_the_process_that_still_writes_it(tmp_path: Path) -> None:
    with (
        pytest.raises(LeaseError, match="is in use by process"),
        trial_lock(tmp_path / "t"),
        trial_lock(tmp_path / "t", patience_s=0.1),
    ):
        pass
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "t")], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    owner.stdout.readline()
    owner.kill()
    began = time.monotonic()
    with trial_lock(tmp_path / "t", patience_s=30.0):
        assert time.monotonic() - began < 10
    owner.wait()


def test_json_has_null_for_numbers_that_it_lacks(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"nan": float("nan"), "inf": [float("inf"), 1.5], "path": tmp_path, "none": None})
    said = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(said.pop("sha256")) == 64
    assert said == {"nan": None, "inf": [None, 1.5], "path": str(tmp_path), "none": None}
    assert read_json(tmp_path / "a.json") == said


def test_a_broken_row_counts_as_none(tmp_path: Path) -> None:
    plan, folder = started(tmp_path)
    end_trial(plan, folder, 0, "finished")
    end_trial(plan, folder, 1, "finished")
    first, second = (trial.trial_id for trial in plan.trials[:2])
    assert list(folder.rows()) == [first, second]
    path = folder.trial(first) / "row.json"
    path.write_text(path.read_text().replace('"finished"', '"finishee"'))
    assert list(folder.rows()) == [second]
    assert read_row(path) == {}


def test_a_sweep_of_another_user_or_that_all_may_write_is_not_taken(tmp_path: Path) -> None:
    _, folder = started(tmp_path)
    folder.path.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by everybody"):
        find_sweep(tmp_path, "mine")
    folder.path.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(folder.path, 12345, -1)
        with pytest.raises(ConfigError, match="belongs to user 12345"):
            find_sweep(tmp_path, "mine")


def test_a_full_storage_does_not_end_whoever_keeps_trials_parquet_and_runs_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are skipped and that is said once; the last writing of each waits for space."""
    plan, folder = started(tmp_path)
    end_trial(plan, folder, 0, "finished")
    said: list[str] = []
    is_full = [True]
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if is_full[0]:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    monkeypatch.setattr("hamu.storage.files.RETRY_S", 0.01)
    monkeypatch.setattr("launch.results._WRITE_EVERY_S", 0.0)
    monkeypatch.setattr("launch.runs._WRITE_EVERY_S", 0.0)
    on_wait(said.append)
    try:
        runs = Runs(folder.runs_path)
        for _ in range(3):
            folder.refresh_trials()
            runs.note()
        assert not folder.trials_parquet.exists()
        assert sorted(text.rpartition("; ")[2] for text in said) == [
            "runs.json is not brought up to date meanwhile", "trials.parquet is not brought up to date meanwhile",
        ]  # fmt: skip
        on_wait(lambda message: is_full.__setitem__(0, False))
        assert len(folder.write_trials()) == 1
        folder.refresh_trials()
        runs.note()
    finally:
        on_wait(None)
    assert len(read_trials(folder.trials_parquet)) == len(read_runs(folder.runs_path)) == 1


def test_a_row_that_is_replaced_is_read_anew_and_any_other_is_not(tmp_path: Path) -> None:
    plan, folder = started(tmp_path)
    end_trial(plan, folder, 0, "pruned")
    end_trial(plan, folder, 1, "finished")
    first, second = (trial.trial_id for trial in plan.trials[:2])
    before = dict(folder.rows())
    write_json(folder.trial(first) / "row.json", {**before[first], "model_path": "there"})
    after = folder.rows()
    assert after[first]["model_path"] == "there"
    assert after[second] is before[second]
    (folder.trial(second) / "row.json").unlink()
    assert list(folder.rows()) == [first]


def test_a_dropped_trial_has_ended_and_a_stopped_one_without_a_model_has_not(tmp_path: Path) -> None:
    plan, folder = started(tmp_path)
    for index, status in enumerate(("dropped", "pruned", "failed")):
        end_trial(plan, folder, index, status)
    assert folder.unfinished(plan) == [trial.trial_id for trial in plan.trials[1:]]


def test_trials_are_compared_with_their_retain_only_models_once_these_are_there(tmp_path: Path) -> None:
    plan = make_plan(load_space("digits/quickstart"), name="mine", overrides={}, root=tmp_path, with_reference=True)
    folder = SweepFolder(tmp_path / "mine")
    folder.start(plan)
    trial = plan.trials[0]
    own = {"forget_loss": 2.0, "forget_accuracy": 0.5, "original_forget_loss": 0.0, "original_forget_accuracy": 1.0}
    folder.trial(trial.trial_id).mkdir()
    write_json(folder.trial(trial.trial_id) / "row.json", {**failed_row(plan, trial, "x"), "status": "finished", **own})
    assert folder.write_trials()[0]["forget_closeness"] is None
    result = {"forget_loss": 4.0, "forget_accuracy": 0.0}
    write_json(folder.references_path, {trial.reference: {"path": "there", "result": result}})
    assert folder.write_trials()[0]["forget_closeness"] == pytest.approx(0.5)  # half of the way in both
    assert read_trials(folder.trials_parquet)[0]["forget_closeness"] == pytest.approx(0.5)
    assert folder.compared_rows([trial.trial_id])[0]["retrained_forget_loss"] == 4.0
    assert "retrained_forget_loss" not in folder.rows()[trial.trial_id]


def test_trials_parquet_is_not_written_at_every_ended_trial(tmp_path: Path) -> None:
    plan, folder = started(tmp_path)
    end_trial(plan, folder, 0, "finished")
    folder.refresh_trials()
    end_trial(plan, folder, 1, "finished")
    folder.refresh_trials()
    assert len(read_trials(folder.trials_parquet)) == 1
    assert len(folder.write_trials()) == len(read_trials(folder.trials_parquet)) == 2
