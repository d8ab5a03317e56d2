"""A slot runs trial after trial as single runs would, keeps what it shares unwritten, and tells how each ended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamu.data.sources import ImageData, load_image_data
from hamu.tasks.vision import task_for
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.records import read_records
from hamu.training.stop import StopReason
from launch.plan import Plan, data_key, make_plan, read_overrides
from launch.results import SweepFolder
from launch.shared import Original, Shared
from launch.slot import Slot
from tune_spaces.space import Space

EPOCHS = 0.5  # 6 steps of 128 rows
SPACE = Space(
    name="digits/small",
    summary="one short trial of each kind",
    base={"dataset_name": "digits", "num_train_epochs": EPOCHS, "learning_rate": 0.01, "eval_strategy": "no"},
    grids=(
        {"unlearning_method": ("hamu-q",), "constraint_ratio": (0.1,)},
        {"unlearning_method": ("hamu-u",), "constraint_ratio": (0.99,), "stop_on_stopping_criterion": (True,)},
        {"unlearning_method": ("ft", "kl")},
        {"unlearning_method": ("ft",), "hard_probability": (0.5,)},
    ),
)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_image_data(TrainConfig().data)


@pytest.fixture(scope="module")
def original(data: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """A model that knows a little: an epoch of training, saved as a folder."""
    torch.set_num_threads(1)
    config = TrainConfig.from_flat({"add_forget_to_train": True, "num_train_epochs": 1})
    task = task_for(config, data)
    run = TrainingRun(config, task, task.new_model(42))
    list(run)
    path = tmp_path_factory.mktemp("original")
    task.save_model(run.model, path, {})
    arrays = {key: value.numpy().copy() for key, value in task.load_model(path).state_dict().items()}
    for array in arrays.values():
        array.setflags(write=False)  # as they come from the object store
    return Original(path=str(path), arrays=arrays)


class Sweep:
    """A plan in a folder, and slots for it."""

    def __init__(self, root: Path, data: ImageData, original: Original, *assignments: str) -> None:
        self.plan: Plan = make_plan(SPACE, name="small", overrides=read_overrides(assignments), root=root)
        self.folder = SweepFolder(root / "small")
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.start(self.plan)
        self.shared = Shared(
            plan=self.plan,
            folder=str(self.folder.path),
            data={data_key(config): data for config in self.plan.configs.values()},
            originals=dict.fromkeys(self.plan.originals, original),
        )
        self.ids = [trial.trial_id for trial in self.plan.trials]

    def slot(self) -> Slot:
        return Slot(self.shared, lambda shared: shared)

    def row(self, trial_id: str) -> dict[str, Any]:
        return json.loads((self.folder.trial(trial_id) / "row.json").read_text())


def run_to_end(slot: Slot, trial_id: str) -> dict[str, Any]:
    slot.begin(trial_id)
    for _ in range(1000):
        metrics = slot.advance(budget_s=0.0)
        if metrics["ended"]:
            return metrics
        assert "stop_reason" not in metrics
    raise AssertionError("the trial does not end")


@pytest.fixture
def sweep(tmp_path: Path, data: ImageData, original: Original) -> Sweep:
    torch.set_num_threads(1)
    return Sweep(tmp_path, data, original)


@pytest.mark.slow
def test_trials_in_one_slot_give_the_numbers_of_single_runs(sweep: Sweep, data: ImageData, original: Original) -> None:
    slot = sweep.slot()
    for trial_id in sweep.ids:
        run_to_end(slot, trial_id)
    for trial_id in reversed(sweep.ids):
        config = sweep.plan.configs[trial_id]
        task = task_for(config, data)
        run = TrainingRun(config, task, task.load_model(Path(original.path)))
        list(run)
        assert run.result is not None
        row = sweep.row(trial_id)
        for name, value in run.result.after.items():
            assert row[name] == value, (trial_id, name)  # to the bit: the same operations on the same numbers
        assert row["steps"] == run.result.steps


def test_what_slots_share_is_not_written_to(sweep: Sweep, data: ImageData, original: Original) -> None:
    weights = {key: array.copy() for key, array in original.arrays.items()}
    images = data.train_images.copy()
    slot = sweep.slot()
    for trial_id in sweep.ids[:3]:
        run_to_end(slot, trial_id)
    assert all(np.array_equal(weights[key], original.arrays[key]) for key in weights)
    assert np.array_equal(images, data.train_images)


def test_a_trial_that_ended_has_its_row_model_and_records_and_no_checkpoint(sweep: Sweep) -> None:
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


def test_the_stopping_criterion_is_told_when_the_row_is_written_and_not_before(sweep: Sweep) -> None:
    metrics = run_to_end(sweep.slot(), sweep.ids[1])
    assert metrics["stop_reason"] == StopReason.CRITERION.value
    assert sweep.row(sweep.ids[1])["stop_reason"] == StopReason.CRITERION.value


def test_an_unfinished_trial_goes_on_from_its_checkpoint_in_another_process(
    tmp_path: Path, data: ImageData, original: Original
) -> None:
    sweep = Sweep(tmp_path, data, original, "method=hamu-q", "save_strategy=steps", "save_steps=2")
    whole = Sweep(tmp_path / "whole", data, original, "method=hamu-q", "save_strategy=steps", "save_steps=2")
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


def test_a_finished_trial_is_not_run_again(sweep: Sweep) -> None:
    run_to_end(sweep.slot(), sweep.ids[0])
    path = sweep.folder.trial(sweep.ids[0]) / "row.json"
    written = path.stat().st_mtime_ns
    assert run_to_end(sweep.slot(), sweep.ids[0])["stop_reason"] == "finished"
    assert path.stat().st_mtime_ns == written


def test_a_trial_that_fails_is_recorded_and_the_slot_goes_on(sweep: Sweep) -> None:
    slot, folder = sweep.slot(), sweep.folder.trial(sweep.ids[0])
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"cut short")
    metrics = run_to_end(slot, sweep.ids[0])
    assert (metrics["stop_reason"], metrics["status"]) == ("failed", "failed")
    row = sweep.row(sweep.ids[0])
    assert row["error"].startswith("CheckpointError: ")
    assert row["method"] == "hamu-q"
    assert "Traceback" in (folder / "error.txt").read_text()
    assert sweep.folder.unfinished(sweep.plan) == sweep.ids
    assert run_to_end(slot, sweep.ids[2])["status"] == "finished"
    assert run_to_end(slot, sweep.ids[0])["status"] == "finished"  # tried again, from the start


def test_a_model_folder_that_is_gone_fails_the_trial_not_the_slot(sweep: Sweep, original: Original) -> None:
    shared = replace(sweep.shared, originals=dict.fromkeys(sweep.plan.originals, replace(original, path="/no/such/folder")))
    slot = Slot(shared, lambda item: item)
    assert run_to_end(slot, sweep.ids[0])["status"] == "failed"
    assert "no model folder" in sweep.row(sweep.ids[0])["error"]
