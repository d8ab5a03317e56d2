"""A single run: where it starts, what it leaves, and that it goes on, or not, as it should."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hamu.errors import CheckpointError
from hamu.models.record import plain
from hamu.training.artifacts import read_record
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.original import load_data, provide_model
from hamu.training.session import Session, run_training
from hamu.training.stop import StopReason

Build = Callable[..., TrainConfig]


@pytest.fixture
def full(tiny: Build) -> Path:
    """The original of the small dataset."""
    config = tiny(add_forget_to_train=True)
    return provide_model(config, load_data(config))


def cancel_at(step: int) -> Callable[[TrainingRun, Session], None]:
    """Stop a run once it has taken `step` steps, as a signal would."""

    def on_start(run: TrainingRun, session: Session) -> None:
        take = run._take_step

        def take_step() -> Any:
            report = take()
            if run.step >= step:
                run.request_stop(StopReason.CANCELLED)
            return report

        run._take_step = take_step  # type: ignore[method-assign]

    return on_start


def test_unlearning_says_what_it_started_from(tiny: Build, full: Path) -> None:
    row, session = run_training(tiny(method="ft", lr=0.01), progress=False)
    record = read_record(session.model_folder)
    assert record["start_model"] == {"path": str(full), "recipe": read_record(full)["recipe"]}
    assert record["recipe"] == session.recipe
    assert session.recipe in session.folder.name
    assert record["result"]["steps"] == row["steps"]
    assert json.loads((session.folder / "run.json").read_text())["start_model"] == record["start_model"]
    assert not session.checkpoint.exists()


def test_another_original_gives_another_run_folder_and_is_refused_on_resume(tiny: Build, full: Path, tmp_path: Path) -> None:
    settings = {"method": "ft", "lr": 0.01, "epochs": 3}
    run_training(tiny(**settings, output_dir=str(tmp_path / "out")), progress=False, on_start=cancel_at(1))
    first = Session(tiny(**settings))
    record = read_record(full)
    (full / "record.json").write_text(json.dumps({**record, "recipe": "feedbeef"}))
    assert Session(tiny(**settings)).folder != first.folder
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="give another"):
            Session(tiny(**settings, output_dir=str(tmp_path / "out"), resume=resume))


def test_original_of_other_data_model_or_size_is_refused_naming_those_beside_it(tiny: Build, full: Path) -> None:
    beside = provide_model(other := tiny(add_forget_to_train=True, lr=2e-3), load_data(other))
    for change, words in (
        ({"model_name": "torchvision/resnet18"}, "model_name 'resnet20' there, 'torchvision/resnet18' here"),
        ({"img_size": 16}, "img_size 8 there, 16 here"),
        ({"num_labels": 6}, "num_labels 4 there, 6 here"),
    ):
        with pytest.raises(CheckpointError) as caught:
            Session(tiny(method="ft", **change))
        assert words in str(caught.value)
        assert str(beside) in str(caught.value)
        assert "\n" not in str(caught.value)
    record = read_record(full)
    (full / "record.json").write_text(json.dumps({**record, "data_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="trained on other data"):
        Session(tiny(method="ft"))


def test_a_start_model_of_the_users_choice_is_warned_of_only(tiny: Build, full: Path, caplog: Any) -> None:
    record = read_record(full)
    (full / "record.json").write_text(json.dumps({**record, "data_sha256": "0" * 64}))
    assert Session(tiny(method="ft", model_name=str(full))).start_folder == full
    assert any("trained on other data" in line for line in caplog.messages)


def test_a_published_checkpoint_is_started_from_and_said(tiny: Build, full: Path, caplog: Any) -> None:
    (full / "record.json").unlink()
    session = Session(tiny(method="ft"))
    assert session.start_folder == full
    assert session.start_model is not None and session.start_model["recipe"].startswith("weights-")
    assert any("published checkpoint" in line for line in caplog.messages)


def test_a_cancelled_original_is_not_published_and_resume_gives_the_uninterrupted_one(
    tiny: Build, tmp_path: Path, caplog: Any
) -> None:
    settings = {"add_forget_to_train": True, "epochs": 2}
    whole, session = run_training(tiny(**settings, artifact_root=str(tmp_path / "whole")), progress=False)
    assert session.model_folder.name == "full"
    row, session = run_training(tiny(**settings), progress=False, on_start=cancel_at(1))
    assert row["stop_reason"] == "cancelled"
    assert session.model_folder == session.folder / "model"
    assert session.checkpoint.exists()
    assert list(Path(tmp_path / "root" / "checkpoints").rglob("record.json")) == []
    with caplog.at_level(logging.INFO):
        resumed, session = run_training(tiny(**settings, resume=True), progress=False)
    assert any("resumed at step 1" in line for line in caplog.messages)
    assert session.model_folder.name == "full"
    assert not session.checkpoint.exists()
    assert not (session.folder / "model").exists()  # the cancelled one
    times = {"train_s": 0, "steps_s": 0}
    assert plain({**resumed, **times}) == plain({**whole, **times})  # to the bit; NaN is None here


def test_resume_of_an_ended_run_does_nothing_and_without_a_checkpoint_says_so(tiny: Build, full: Path, caplog: Any) -> None:
    settings = {"method": "ft", "lr": 0.01, "resume": True}
    with caplog.at_level(logging.INFO):
        row, session = run_training(tiny(**settings), progress=False)
        assert any(line.startswith("no checkpoint at") and "starting at step 0" in line for line in caplog.messages)
        written = (session.model_folder / "record.json").stat().st_mtime_ns
        again, same = run_training(tiny(**settings), progress=False, on_start=lambda *_: pytest.fail("it ran"))
    assert again["steps"] == row["steps"]
    assert again["stop_reason"] == "finished"
    assert same.model_folder == session.model_folder
    assert (same.model_folder / "record.json").stat().st_mtime_ns == written
    assert any("has ended already" in line for line in caplog.messages)


def test_a_diverged_original_stays_in_its_run_folder(tiny: Build, tmp_path: Path) -> None:
    final = tmp_path / "final"
    config = tiny(add_forget_to_train=True, lr=1e30, final_model_output_dir=str(final))
    row, session = run_training(config, progress=False)
    assert row["stop_reason"] == "non_finite"
    assert session.model_folder == session.folder / "model"
    assert (session.model_folder / "model.safetensors").exists()
    assert not final.exists()


def test_a_folder_of_the_users_is_refused_before_any_work_and_left_alone(tiny: Build, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("meow")
    with pytest.raises(CheckpointError, match="not overwritten"):
        Session(tiny(final_model_output_dir=str(photos)))
    assert [path.name for path in photos.iterdir()] == ["cat.jpg"]
    kept = tmp_path / "kept"
    run_training(tiny(final_model_output_dir=str(kept)), progress=False)
    run_training(tiny(final_model_output_dir=str(kept)), progress=False)  # the same recipe replaces its own
    with pytest.raises(CheckpointError, match="another folder"):
        Session(tiny(final_model_output_dir=str(kept), lr=5e-3))


def test_a_checkpoint_that_is_not_the_runs_is_not_removed(tiny: Build, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt").write_text("mine")
    with pytest.raises(CheckpointError, match="of another run"):
        Session(tiny(output_dir=str(tmp_path / "out")))
    assert (tmp_path / "out" / "checkpoint.pt").read_text() == "mine"


def test_a_model_that_came_to_the_published_place_meanwhile_is_not_overwritten(tiny: Build) -> None:
    session = Session(tiny(add_forget_to_train=True, lr=3e-3))
    run = session.start()
    other = tiny(add_forget_to_train=True)
    taken = provide_model(other, load_data(other))
    assert session.model_folder == taken
    for _ in run:
        pass
    session.finish(run)
    assert session.model_folder == taken.with_name(f"full-{session.recipe}")
    assert read_record(taken)["recipe"] != session.recipe


def test_a_published_model_is_not_trained_again(tmp_path: Path) -> None:
    config = TrainConfig.from_flat({"epochs": 0.1, "add_forget_to_train": True, "artifact_root": str(tmp_path)})
    _, session = run_training(config, progress=False)
    before = (session.model_folder / "model.safetensors").stat()
    row, again = run_training(config, progress=False)
    assert again.model_folder == session.model_folder and row["steps"] == 1
    assert (again.model_folder / "model.safetensors").stat() == before
