"""Whatever file of an ended trial is broken, it is named and set aside, and that trial alone runs again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hamu.errors import CorruptError
from hamu.storage.weights import check_weights
from hamu.training.records import Recorder, read_records
from launch.plan import Plan, make_plan
from launch.repair import repair
from launch.results import SweepFolder, write_json
from launch.shared import failed_row
from tune_spaces.space import Space


def sweep_of(root: Path, n_trials: int) -> tuple[Plan, SweepFolder]:
    """A sweep whose trials have all ended, each with its row, its records and its weights."""
    space = Space(
        name="digits/few",
        summary="trials that differ in their step size",
        base={"dataset_name": "digits", "unlearning_method": "ft"},
        grids=({"learning_rate": tuple(0.001 * (1 + index) for index in range(n_trials))},),
    )
    plan, folder = make_plan(space, name="few", overrides={}, root=root), SweepFolder(root / "few")
    folder.start(plan)
    for trial in plan.trials:
        recorder = Recorder(folder.records, {"trial_id": trial.trial_id})
        for step in range(3):
            recorder.log({"kind": "step", "step": step, "kappa": 0.5})
        recorder.finish()
        model = folder.trial(trial.trial_id) / "model"
        model.mkdir(parents=True)
        save_file({"weight": torch.ones(5, 5), "bias": torch.ones(3)}, model / "model.safetensors")
        ended = {"status": "finished", "steps": 3, "model_path": str(model)}
        write_json(folder.trial(trial.trial_id) / "row.json", {**failed_row(plan, trial, "x"), "error": None, **ended})
    return plan, folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Plan, SweepFolder]:
    return sweep_of(tmp_path, 3)


def test_nothing_is_said_of_a_whole_sweep(sweep: tuple[Plan, SweepFolder]) -> None:
    plan, folder = sweep
    said: list[str] = []
    before = sorted(path for path in folder.path.rglob("*") if path.is_file())
    assert repair(folder, plan, said.append) == []
    assert said == []
    assert sorted(path for path in folder.path.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ("row.json", "records", "model/model.safetensors") for damage in (truncate, empty)]
    + [("row.json", flip), ("records", flip)],
)
def test_a_broken_file_is_set_aside_and_its_trial_runs_again(
    sweep: tuple[Plan, SweepFolder], name: str, damage: Callable[[Path], None]
) -> None:
    plan, folder = sweep
    first, second, third = (trial.trial_id for trial in plan.trials)
    path = folder.records / f"{second}.parquet" if name == "records" else folder.trial(second) / name
    damage(path)
    broken = path.read_bytes()
    aside = path.parent if name.startswith("model/") else path  # of a model all, since the rerun puts another in its place
    said: list[str] = []
    assert repair(folder, plan, said.append) == [second]
    assert folder.unfinished(plan) == [second]
    assert list(folder.rows()) == [first, third]
    assert len(said) == 1
    assert said[0].startswith(f"trial {second} runs again: {path} is broken (")
    assert said[0].endswith(f", set aside as {aside.name}.corrupt-1")
    assert not aside.exists()
    kept = aside.with_name(f"{aside.name}.corrupt-1")
    assert (kept / path.name if aside is not path else kept).read_bytes() == broken
    assert repair(folder, plan, said.append) == []
    assert read_records(folder.records).num_rows == (6 if name == "records" else 9)


def test_a_broken_model_outlives_what_the_rerun_saves(sweep: tuple[Plan, SweepFolder]) -> None:
    plan, folder = sweep
    own = folder.trial(plan.trials[0].trial_id)
    for n in (1, 2):
        more = own / "model" / "more.safetensors"
        save_file({"weight": torch.ones(n)}, more)
        truncate(more)
        truncate(own / "model" / "model.safetensors")  # both are named, and the folder is set aside once
        said: list[str] = []
        repair(folder, plan, said.append)
        assert len(said) == 2
        (own / "model").mkdir()
        save_file({"weight": torch.ones(5, 5)}, own / "model" / "model.safetensors")
        write_json(own / "row.json", {**failed_row(plan, plan.trials[0], "x"), "status": "finished"})
    assert sorted(path.name for path in own.iterdir() if path.is_dir()) == ["model", "model.corrupt-1", "model.corrupt-2"]


def test_files_of_the_sweep_itself_are_made_again(sweep: tuple[Plan, SweepFolder]) -> None:
    plan, folder = sweep
    write_json(folder.references_path, {"a": {"path": "there"}})
    write_json(folder.runs_path, [{"started_at": 1.0, "ended_at": 2.0}])
    truncate(folder.references_path)
    truncate(folder.runs_path)
    said: list[str] = []
    assert repair(folder, plan, said.append) == []
    assert [text.partition(" is broken")[0] for text in said] == [str(folder.references_path), str(folder.runs_path)]
    assert folder.references() == {}


def test_a_model_that_was_removed_for_its_space_is_not_broken(sweep: tuple[Plan, SweepFolder]) -> None:
    plan, folder = sweep
    (folder.trial(plan.trials[0].trial_id) / "model" / "model.safetensors").unlink()
    assert repair(folder, plan, pytest.fail) == []


def test_trials_that_have_not_ended_are_left_to_their_slots(sweep: tuple[Plan, SweepFolder]) -> None:
    plan, folder = sweep
    trial = plan.trials[0]
    (folder.trial(trial.trial_id) / "row.json").unlink()
    truncate(folder.records / f"{trial.trial_id}.parquet")
    assert repair(folder, plan, pytest.fail) == []


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}x"])
def test_what_is_no_safetensors_file_is_found(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CorruptError, match=r"a\.safetensors is broken"):
        check_weights(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_a_thousand_trials_are_checked_in_three_seconds(tmp_path: Path) -> None:
    plan, folder = sweep_of(tmp_path, 1000)
    began = time.monotonic()
    assert repair(folder, plan, pytest.fail) == []
    seconds = time.monotonic() - began
    print(f"1000 trials: {seconds:.2f} s")
    assert seconds < 3
