"""A slot runs trial after trial as single runs would, keeps what it shares unwritten, and tells how each ended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamu.data.sources import ImageData
from hamu.errors import LeaseError
from hamu.tasks.vision import task_for
from hamu.training.config import TrainConfig
from hamu.training.engine import PairedEngine
from hamu.training.loop import TrainingRun
from hamu.training.records import read_records, read_trials
from hamu.training.stop import StopReason
from launch.results import write_json
from launch.shared import Original
from launch.slot import Slot
from launch.states import next_folder
from tests.launch.small_sweep import SmallSweep, advance_to_end, run_to_end
from tune_spaces.space import Space

pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(tmp_path: Path, digits: ImageData, original: Original) -> SmallSweep:
    torch.set_num_threads(1)
    return SmallSweep(tmp_path, digits, original)


STATES = ("method=hamu-q,ft", "eval_strategy=steps", "eval_steps=2", "logging_steps=1")


@pytest.fixture
def paused(tmp_path: Path, digits: ImageData, original: Original) -> SmallSweep:
    torch.set_num_threads(1)
    return SmallSweep(tmp_path / "paused", digits, original, *STATES)


def advance_to_step(slot: Slot, step: int) -> dict[str, Any]:
    while (metrics := slot.advance(budget_s=0.0))["step"] < step:
        assert not metrics["ended"]
    return metrics


@pytest.mark.slow
def test_trials_in_one_slot_give_the_numbers_of_single_runs(sweep: SmallSweep, digits: ImageData, original: Original) -> None:
    slot = sweep.slot()
    for trial_id in sweep.ids:
        run_to_end(slot, trial_id)
    for trial_id in reversed(sweep.ids):
        config = sweep.plan.configs[trial_id]
        task = task_for(config, digits)
        run = TrainingRun(config, task, task.load_model(Path(original.path)))
        list(run)
        assert run.result is not None
        row = sweep.row(trial_id)
        for name, value in run.result.after.items():
            assert row[name] == value, (trial_id, name)  # to the bit: the same operations on the same numbers
        assert row["steps"] == run.result.steps


def test_what_slots_share_is_not_written_to(sweep: SmallSweep, digits: ImageData, original: Original) -> None:
    weights = {key: array.copy() for key, array in original.arrays.items()}
    images = digits.train_images.copy()
    slot = sweep.slot()
    for trial_id in sweep.ids[:3]:
        run_to_end(slot, trial_id)
    assert all(np.array_equal(weights[key], original.arrays[key]) for key in weights)
    assert np.array_equal(images, digits.train_images)


def test_a_trial_that_ended_has_its_row_model_and_records_and_no_checkpoint(sweep: SmallSweep) -> None:
    metrics = run_to_end(sweep.slot(), sweep.ids[0])
    row, folder = sweep.row(sweep.ids[0]), sweep.folder.trial(sweep.ids[0])
    assert metrics["stop_reason"] == row["stop_reason"] == "finished"
    assert row["status"] == "finished"
    assert row["started_at"] < row["ended_at"]
    assert row["setup_s"] + row["train_s"] <= row["ended_at"] - row["started_at"] + 0.05
    assert row["peak_rss_bytes"] > 10**8
    assert TrainConfig.from_flat(json.loads(row["config"])).lr == 0.01
    assert (folder / "model" / "model.safetensors").is_file()
    assert not (folder / "checkpoint.pt").exists()
    records = read_records(sweep.folder.records).to_pylist()
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert sweep.folder.write_trials()[0]["split_sha256"] == records[0]["split_sha256"]


def test_a_row_tells_what_was_planned_and_what_the_steps_took(sweep: SmallSweep) -> None:
    given, shared = sweep.plan.trials[0], sweep.shared
    trials = (replace(given, reference="0a1b2c3d"), *sweep.plan.trials[1:])
    slot = Slot(replace(shared, plan=replace(sweep.plan, trials=trials)), lambda item: item)
    run_to_end(slot, given.trial_id)
    row = sweep.row(given.trial_id)
    assert row["steps"] == row["total_steps"] == 6
    assert 0 < row["steps_s"] < row["train_s"]
    assert (row["reference"], row["constraint_ratio"], row["relative_constraint"]) == ("0a1b2c3d", 0.1, False)
    assert row["original_forget_test_loss_auc"] is not None
    run_to_end(slot, sweep.ids[1])
    stopped = sweep.row(sweep.ids[1])
    assert (stopped["reference"], stopped["total_steps"]) == (None, 6) and stopped["steps"] < 6


def test_a_trial_without_evaluations_has_a_row_model_and_records(tmp_path: Path, digits: ImageData, original: Original) -> None:
    timed = SmallSweep(tmp_path, digits, original, "method=hamu-q", "eval_at_ends=false", "relative_constraint=true")
    metrics = run_to_end(timed.slot(), timed.ids[0])
    assert metrics["stop_reason"] == "finished"
    row, (read,) = timed.row(timed.ids[0]), timed.folder.write_trials()
    assert row["steps"] == 6 and row["steps_s"] == row["train_s"]
    assert read["forget_loss"] is read["retain_accuracy"] is read["original_retain_loss"] is row["forget_quality"] is None
    assert read["relative_constraint"] is True and read["constraint_ratio"] == 0.1 and read["gradient_product"] > 0
    assert (Path(row["model_path"]) / "model.safetensors").is_file()
    assert {record["kind"] for record in read_records(timed.folder.records).to_pylist()} == {"step"}


def test_a_slot_with_a_share_of_a_gpu_takes_no_more_of_its_memory(sweep: SmallSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    capped: list[Any] = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda *given: capped.append(given))
    for device, share in (("cuda", 0.25), ("cuda", 1.0), ("cuda", None), ("cpu", 0.25), ("cuda:1", 0.5)):
        Slot(replace(sweep.shared, gpu_share=share), lambda item: item, device=device)
    assert capped == [(0.25, None), (0.5, 1)]


@pytest.mark.parametrize("own", [None, "/own/reference"])
def test_a_measured_trial_is_compared_with_the_sweeps_own_reference_unless_it_names_one(
    own: str | None, tmp_path: Path, digits: ImageData, original: Original
) -> None:
    text = {"modality": "llm", "dataset_name": "tofu", "eval_tofu": True, "retain_reference": own}
    space = Space(name="llm/small", summary="measured", base={**text, "lr": 0.01}, grids=({"unlearning_method": ("ft",)},))
    sweep = SmallSweep(tmp_path, digits, original, space=space)
    (trial,) = sweep.plan.trials
    plan = replace(sweep.plan, trials=(replace(trial, reference="0a1b2c3d"),))
    for ready, expected in (({"0a1b2c3d": "/made/reference"}, "/made/reference"), ({}, None)):
        slot = Slot(replace(sweep.shared, plan=plan, data={}, retain_references=ready), lambda item: item)
        assert slot.begin(trial.trial_id)["status"] == "failed"  # there are no rows here: the settings were made before
        assert slot._config.logging.retain_reference == (own or expected)


def test_the_stopping_criterion_is_told_when_the_row_is_written_and_not_before(sweep: SmallSweep) -> None:
    metrics = run_to_end(sweep.slot(), sweep.ids[1])
    assert metrics["stop_reason"] == StopReason.CRITERION.value
    assert sweep.row(sweep.ids[1])["stop_reason"] == StopReason.CRITERION.value


def test_an_unfinished_trial_goes_on_from_its_checkpoint_in_another_process(
    tmp_path: Path, digits: ImageData, original: Original
) -> None:
    sweep = SmallSweep(tmp_path, digits, original, "method=hamu-q", "save_strategy=steps", "save_steps=2")
    whole = SmallSweep(tmp_path / "whole", digits, original, "method=hamu-q", "save_strategy=steps", "save_steps=2")
    run_to_end(whole.slot(), whole.ids[0])
    first, trial_id = sweep.slot(), sweep.ids[0]
    first.begin(trial_id)
    while not (sweep.folder.trial(trial_id) / "checkpoint.pt").exists():
        first.advance(budget_s=0.0)
    before = read_records(sweep.folder.records).to_pylist()
    first.close()  # what the kernel does for a process that is killed: the lock is free
    run_to_end(sweep.slot(), trial_id)
    after = read_records(sweep.folder.records).to_pylist()
    assert after[: len(before)] == before  # wall seconds too: these steps were not run again
    assert [record["step"] for record in after if record["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    names = [name for name in whole.row(trial_id) if name.endswith(("_loss", "_accuracy"))]
    assert names
    assert {name: sweep.row(trial_id)[name] for name in names} == {name: whole.row(trial_id)[name] for name in names}


def test_a_finished_trial_is_not_run_again(sweep: SmallSweep) -> None:
    run_to_end(sweep.slot(), sweep.ids[0])
    path = sweep.folder.trial(sweep.ids[0]) / "row.json"
    written = path.stat().st_mtime_ns
    assert run_to_end(sweep.slot(), sweep.ids[0])["stop_reason"] == "finished"
    assert path.stat().st_mtime_ns == written


def test_a_trial_that_fails_is_recorded_and_the_slot_goes_on(sweep: SmallSweep) -> None:
    slot, folder = sweep.slot(), sweep.folder.trial(sweep.ids[0])
    folder.mkdir()
    torch.save({"recipe": "another"}, folder / "checkpoint.pt")
    metrics = run_to_end(slot, sweep.ids[0])
    assert (metrics["stop_reason"], metrics["status"]) == ("failed", "failed")
    row = sweep.row(sweep.ids[0])
    assert row["error"].startswith("CheckpointError: ")
    assert row["method"] == "hamu-q"
    assert "Traceback" in (folder / "error.txt").read_text()
    assert sweep.folder.unfinished(sweep.plan) == sweep.ids
    assert run_to_end(slot, sweep.ids[2])["status"] == "finished"
    assert run_to_end(slot, sweep.ids[0])["status"] == "finished"  # tried again, from the start


@pytest.mark.parametrize("broken", ["checkpoint", "records"])
def test_a_trial_whose_saved_state_is_broken_says_so_keeps_it_and_begins_anew(paused: SmallSweep, broken: str) -> None:
    whole, trial_id = paused.slot(), paused.ids[0]
    run_to_end(whole, paused.ids[1])
    whole.begin(trial_id)
    advance_to_step(whole, 4)
    whole.hold()
    folder = paused.folder.trial(trial_id)
    path = folder / "checkpoint.pt" if broken == "checkpoint" else min(paused.folder.records.glob(f"{trial_id}-*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    lines: list[str] = []
    slot = Slot(paused.shared_by(lambda item: item), lambda item: item, say=lines.append)
    assert slot.begin(trial_id)["ended"] is False
    assert slot.advance(budget_s=0.0)["step"] <= 1
    assert advance_to_end(slot)["status"] == "finished"
    assert len(lines) == 1 and trial_id in lines[0] and path.name in lines[0]
    assert (folder / "checkpoint.pt.corrupt-1").is_file()
    rows = [row for row in read_records(paused.folder.records).to_pylist() if row["trial_id"] == trial_id]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_held_trial_is_left_in_order_and_goes_on_to_the_same_bits(
    paused: SmallSweep, tmp_path: Path, digits: ImageData, original: Original
) -> None:
    whole = SmallSweep(tmp_path / "whole", digits, original, *STATES)
    run_to_end(whole.slot(), whole.ids[0])
    first, trial_id = paused.slot(), paused.ids[0]
    first.begin(trial_id)
    advance_to_step(first, 3)
    assert first.hold() == {"ended": True}
    attempts = json.loads((paused.folder.trial(trial_id) / "attempts.json").read_text())
    assert [each["closed"] for each in attempts] == [True]
    second = paused.slot()
    second.begin(trial_id)
    assert second.advance(budget_s=0.0)["step"] == 4
    advance_to_end(second)
    assert paused.metrics(trial_id) == whole.metrics(trial_id)


def test_a_trial_is_saved_when_that_is_asked_for_and_tells_what_it_took(paused: SmallSweep) -> None:
    slot, checkpoint = paused.slot(), paused.folder.trial(paused.ids[0]) / "checkpoint.pt"
    slot.begin(paused.ids[0])
    assert "save_s" not in advance_to_step(slot, 3)
    assert not checkpoint.exists()
    assert 0 < slot.advance(budget_s=0.0, saves=True)["save_s"] < 5
    assert torch.load(checkpoint, weights_only=True)["step"] == 3
    assert "save_s" not in slot.advance(budget_s=0.0)


def test_a_process_whose_trial_another_has_taken_over_writes_nothing_more(paused: SmallSweep) -> None:
    slot, trial_id = paused.slot(), paused.ids[0]
    slot.begin(trial_id)
    advance_to_step(slot, 3)
    folder = paused.folder.trial(trial_id)
    for lease in folder.glob(".lease*"):  # as a holder of another machine that was cut off for long
        lease.unlink()
    before = {path: path.stat().st_mtime_ns for path in (*folder.rglob("*"), *paused.folder.records.iterdir()) if path.is_file()}
    with pytest.raises(LeaseError, match="is no longer this process's"):
        advance_to_end(slot)
    with pytest.raises(LeaseError):
        slot._write_row({})
    after = (*folder.rglob("*"), *paused.folder.records.iterdir())
    assert {path: path.stat().st_mtime_ns for path in after if path.is_file()} == before


def test_a_model_folder_that_is_gone_fails_the_trial_not_the_slot(sweep: SmallSweep, original: Original) -> None:
    shared = replace(sweep.shared, originals=dict.fromkeys(sweep.plan.originals, replace(original, path="/no/such/folder")))
    slot = Slot(shared, lambda item: item)
    assert run_to_end(slot, sweep.ids[0])["status"] == "failed"
    assert "no model folder" in sweep.row(sweep.ids[0])["error"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4])  # 4: an evaluation is due there
def test_a_paused_trial_goes_on_in_another_process_to_the_same_bits(
    paused: SmallSweep, tmp_path: Path, digits: ImageData, original: Original, step: int
) -> None:
    whole = SmallSweep(tmp_path / "whole", digits, original, *STATES)
    run_to_end(whole.slot(), whole.ids[0])
    first, trial_id, other = paused.slot(), *paused.ids[:2]
    first.begin(trial_id)
    said = advance_to_step(first, step)
    state = next_folder(paused.folder.trial(trial_id))
    first.save(str(state))
    run_to_end(first, other)  # what the scheduler prefers meanwhile
    second = paused.slot()
    begun = second.begin(trial_id, load_from=str(state))
    assert begun["forget_quality"] == said["forget_quality"]  # a scheduler needs its metric at every report
    advance_to_end(second)
    assert paused.metrics(trial_id) == whole.metrics(trial_id)
    rows = [
        [row for row in read_records(sweep.folder.records).to_pylist() if row["trial_id"] == trial_id]
        for sweep in (whole, paused)
    ]
    assert [(row["kind"], row["step"]) for row in rows[1]] == [(row["kind"], row["step"]) for row in rows[0]]
    assert paused.row(trial_id)["attempts"] == 2


def test_a_trial_takes_over_the_state_of_another_with_settings_of_its_own(paused: SmallSweep) -> None:
    slot, (donor, heir) = paused.slot(), paused.ids[:2]
    slot.begin(donor)
    advance_to_step(slot, 4)
    state = next_folder(paused.folder.trial(donor))
    slot.save(str(state))
    slot.begin(heir, {"learning_rate": 0.02}, load_from=str(state))
    assert slot.advance(budget_s=0.0)["step"] == 5
    assert advance_to_end(slot)["step"] == 6
    row = paused.row(heir)
    assert (row["method"], row["learning_rate"], json.loads(row["config"])["learning_rate"]) == ("ft", 0.02, 0.02)
    assert not (paused.folder.trial(donor) / "row.json").exists()


def test_a_stopped_trial_is_pruned_when_its_slot_leaves_it_and_keeps_its_model(paused: SmallSweep) -> None:
    slot, (stopped, left) = paused.slot(), paused.ids[:2]
    slot.begin(stopped)
    said = advance_to_step(slot, 3)
    write_json(paused.folder.trial(stopped) / "row.json", {"trial_id": stopped, "status": "pruned"})  # the driver's
    assert stopped in paused.folder.unfinished(paused.plan)
    assert slot.leave()["stop_reason"] == StopReason.PRUNED.value
    row = paused.row(stopped)
    assert (row["status"], row["stop_reason"], row["steps"]) == ("pruned", "pruned", said["step"])
    assert row["forget_loss"] is not None
    assert (Path(row["model_path"]) / "model.safetensors").is_file()
    slot.begin(left)
    advance_to_step(slot, 3)
    assert slot.leave() == {"ended": True}
    assert not (paused.folder.trial(left) / "row.json").exists()
    assert paused.folder.unfinished(paused.plan) == paused.ids[1:]
    assert paused.folder.write_trials()[0]["peak_bytes_per_rank"] == [row["peak_rss_bytes"]]
    assert read_trials(paused.folder.trials_parquet)[0]["attempts"] == 1


def test_a_process_that_takes_the_place_of_a_dead_one_can_save_and_leave_at_once(paused: SmallSweep, tmp_path: Path) -> None:
    trial_id = paused.ids[0]
    dead = paused.slot()
    dead.begin(trial_id)
    advance_to_step(dead, 3)
    dead._run.save()  # type: ignore[union-attr]  # as by save_strategy
    dead._place.abandon()  # what the kernel does for a process that is killed: the lock is free
    heir = paused.slot()
    heir.begin(trial_id)
    heir.save(str(tmp_path / "state"))
    assert torch.load(tmp_path / "state" / "state.pt", weights_only=True)["step"] == 3
    write_json(paused.folder.trial(trial_id) / "row.json", {"trial_id": trial_id, "status": "pruned"})  # the driver's
    assert heir.leave()["stop_reason"] == StopReason.PRUNED.value
    assert paused.row(trial_id)["steps"] == 3


def test_a_stopped_trial_of_which_nothing_is_left_is_not_taken_for_the_original(paused: SmallSweep) -> None:
    slot, trial_id = paused.slot(), paused.ids[0]
    slot.begin(trial_id)
    write_json(paused.folder.trial(trial_id) / "row.json", {"trial_id": trial_id, "status": "pruned", "steps": 40})
    assert slot.leave() == {"ended": True}
    assert paused.row(trial_id)["steps"] == 40  # the sweep's own words stand, and the trial can be run again
    assert not (paused.folder.trial(trial_id) / "model").exists()
    assert trial_id in paused.folder.unfinished(paused.plan)


def test_a_trial_without_steps_can_be_pruned(paused: SmallSweep) -> None:
    slot = paused.slot()
    slot.begin(paused.ids[0])
    assert slot.prune()["status"] == "pruned"
    assert paused.row(paused.ids[0])["steps"] == 0


def test_an_error_of_the_device_ends_the_process_and_the_second_one_the_trial(
    sweep: SmallSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = PairedEngine.gradients

    def out_of_memory(engine: PairedEngine, *batches: Any) -> None:
        if any(len(part.labels) > 2 for parts in batches for part in parts):  # the estimate's one or two rows fit
            raise torch.OutOfMemoryError("CUDA out of memory")
        gradients(engine, *batches)

    trial_id = sweep.ids[0]
    with monkeypatch.context() as broken:
        broken.setattr(PairedEngine, "gradients", out_of_memory)
        for attempt in (1, 2):
            slot = sweep.slot()
            slot.begin(trial_id)
            with pytest.raises(torch.OutOfMemoryError):
                advance_to_end(slot)
            slot.close()
            attempts = json.loads((sweep.folder.trial(trial_id) / "attempts.json").read_text())
            assert [(each["run"], each["closed"]) for each in attempts] == [("first", False)] * attempt
    assert sweep.slot().begin(trial_id)["status"] == "failed"
    row = sweep.row(trial_id)
    assert row["error"].startswith("OutOfMemoryError: CUDA out of memory (peak ")
    assert "estimate " in row["error"]
    assert row["attempts"] == 2
    assert "Traceback" in (sweep.folder.trial(trial_id) / "error.txt").read_text()
    assert run_to_end(sweep.slot(run_id="second"), trial_id)["status"] == "finished"  # a resumed sweep tries again


def test_a_death_on_a_node_that_is_gone_is_not_the_trials_own(sweep: SmallSweep) -> None:
    gone: set[str] = set()
    for node in "abcd":
        slot = Slot(sweep.shared_by(lambda item: item), lambda item: item, node=node, gone=lambda: gone)
        assert slot.begin(sweep.ids[0])["ended"] is False
        assert slot.advance()["nodes"] == [node]
        slot._place.abandon()  # what happens to a process that is killed
        gone.add(node)
    attempts = json.loads((sweep.folder.trial(sweep.ids[0]) / "attempts.json").read_text())
    assert [(each["nodes"], each["closed"]) for each in attempts] == [([node], False) for node in "abcd"]
    gone.clear()
    assert sweep.slot().begin(sweep.ids[0])["status"] == "failed"


def test_a_trial_whose_process_dies_twice_without_a_word_has_failed(sweep: SmallSweep) -> None:
    for _ in range(2):
        slot = sweep.slot()
        slot.begin(sweep.ids[0])
        slot._place.abandon()  # what the kernel does for a process that is killed
    assert sweep.slot().begin(sweep.ids[0])["status"] == "failed"
    assert sweep.row(sweep.ids[0])["error"] == "its process died (killed, or out of memory)"


SPLIT = ("method=hamu-q", "gradient_pairing=split-gpu", "num_workers=2", "eval_strategy=steps", "eval_steps=2")


def run_split(root: Path, digits: ImageData, original: Original, fails: str) -> tuple[list[str], dict[str, Any]]:
    """One rank's part of a small sweep's first trial."""
    from hamu.training.groups import Group

    torch.set_num_threads(1)
    group = Group.current("cpu")
    sweep = SmallSweep(root / str(group.rank), digits, original, *SPLIT)  # same plan, same folder: that of rank 0
    shared = replace(sweep.shared, folder=str(root / "0" / "small"))
    slot = Slot(shared, lambda item: item, group)
    if fails == "set-up" and group.rank == 1:
        slot._warm.task = None  # type: ignore[method-assign, assignment]
    slot.begin(sweep.ids[0])
    said: list[str] = []
    while not (metrics := slot.advance(budget_s=0.0))["ended"]:
        said.append(f"{metrics['step']}")
        if fails == "stopped" and metrics["step"] == 3:
            metrics = slot.prune()
            break
    return said, metrics


@pytest.mark.slow
def test_a_group_of_slots_runs_a_trial_in_lockstep(ranks: Any, tmp_path: Path, digits: ImageData, original: Original) -> None:
    (said, first), (others, second) = ranks.run(run_split, tmp_path, digits, original, "not")
    assert said == others
    assert first["stop_reason"] == second["stop_reason"] == "finished"
    row = json.loads(next((tmp_path / "0").glob("small/trials/*/row.json")).read_text())
    assert len(row["peak_bytes_per_rank"]) == 2
    assert row["peak_rss_bytes"] == max(row["peak_bytes_per_rank"])
    assert not list((tmp_path / "1").glob("small/trials/*/*"))


@pytest.mark.slow
def test_a_group_prunes_at_the_same_step(ranks: Any, tmp_path: Path, digits: ImageData, original: Original) -> None:
    answers = ranks.run(run_split, tmp_path, digits, original, "stopped")
    assert {answer[1]["stop_reason"] for answer in answers} == {"pruned"}
    row = json.loads(next((tmp_path / "0").glob("small/trials/*/row.json")).read_text())
    assert (row["status"], row["steps"]) == ("pruned", 3)


@pytest.mark.slow
def test_what_one_rank_cannot_set_up_fails_the_trial_in_all(
    ranks: Any, tmp_path: Path, digits: ImageData, original: Original
) -> None:
    answers = ranks.run(run_split, tmp_path, digits, original, "set-up")
    assert {answer[1]["stop_reason"] for answer in answers} == {"failed"}
    row = json.loads(next((tmp_path / "0").glob("small/trials/*/row.json")).read_text())
    assert row["error"].startswith("TypeError: ")
