"""A single run as its processes do it, in one process: the numbers of a plain run, what it refuses, and when it gives up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hamu.training.config import TrainConfig
from hamu.training.groups import Group
from hamu.training.loop import TrainingRun
from hamu.training.original import load_data, provide_model
from hamu.training.session import Session, run_training
from hamu.training.session_job import UNSAID, SessionJob

Build = Callable[..., TrainConfig]
SETTINGS = {"method": "hamu-q", "constraint_ratio": 0.1, "lr": 0.01, "epochs": 2, "batch_size": 16}


@pytest.fixture
def config(tiny: Build) -> TrainConfig:
    """Of a run that has an original to start from, and saves after each epoch."""
    original = tiny(add_forget_to_train=True)
    provide_model(original, load_data(original))
    return tiny(**SETTINGS, save_strategy="epoch", resume=True)


def begin(config: TrainConfig, **given: Any) -> tuple[SessionJob, dict[str, Any]]:
    """What new processes do, and their reply."""
    job = SessionJob(Group.alone())
    return job, job.begin(config=config.to_flat(), folder=os.getcwd(), run_id="this", **given)


def run_to_end(job: SessionJob) -> dict[str, Any]:
    while not (told := job.advance(budget_s=0.0))["ended"]:
        pass
    return told


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every step from this one on is an error, in any process."""
    take = TrainingRun._take_step

    def take_step(run: TrainingRun) -> Any:
        if run.step >= step:
            raise RuntimeError("no memory left")
        return take(run)

    monkeypatch.setattr(TrainingRun, "_take_step", take_step)


def test_it_makes_the_run_of_the_command_line(tiny: Build, config: TrainConfig, tmp_path: Path) -> None:
    job, begun = begin(config)
    told = run_to_end(job)
    assert begun["hardness"]["gradient_product"] > 0
    assert begin(config.replace(output_dir=str(tmp_path / "unmeasured")), measure=False)[1]["hardness"] == {}
    row, _ = run_training(tiny(**SETTINGS, output_dir=str(tmp_path / "plain")), progress=False)
    times = {"train_s", "steps_s"}
    assert {name: value for name, value in told["row"].items() if name not in times} == {
        name: value for name, value in row.items() if name not in times
    }
    assert begun["total_steps"] == told["step"] == row["steps"]
    assert (Path(told["model_folder"]) / "model.safetensors").exists()
    left = {path.name for path in Session(config).folder.iterdir()}
    assert not left & {"checkpoint.pt", "starts.json", "failure.txt"}


@pytest.mark.slow
def test_a_run_that_fails_twice_from_one_checkpoint_gives_up_with_its_error(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, begun = begin(config)  # its process is killed before it says a word
    steps_per_epoch = begun["total_steps"] // 2
    job, _ = begin(config)
    fail_at(monkeypatch, steps_per_epoch + 1)  # past the first checkpoint, so what failed before it does not count
    with pytest.raises(RuntimeError, match="no memory left"):
        run_to_end(job)
    job, _ = begin(config)
    with pytest.raises(RuntimeError, match="no memory left"):
        run_to_end(job)
    job, _ = begin(config)  # the second from that checkpoint
    with pytest.raises(RuntimeError, match="no memory left"):
        run_to_end(job)
    job, begun = begin(config)
    assert begun == job.advance(budget_s=0.0) == {"ended": True, "failed": "rank 0: RuntimeError: no memory left"}
    monkeypatch.undo()
    job = SessionJob(Group.alone())
    job.begin(config=config.to_flat(), folder=os.getcwd(), run_id="the next command")
    assert run_to_end(job)["row"]["stop_reason"] == "finished"


def test_a_run_that_is_killed_twice_gives_up_too(config: TrainConfig) -> None:
    for _ in range(2):
        begin(config)
    assert begin(config)[1] == {"ended": True, "failed": UNSAID}


def test_bad_input_is_a_reply_and_no_error(config: TrainConfig) -> None:
    _, begun = begin(config.replace(model_name="./no/such/model"))
    assert "no/such/model" in begun["refused"]
