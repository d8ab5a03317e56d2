"""Trials that are asked to save themselves while they run: a sweep that is told to end, a node that is to be taken away."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hamu.data.sources import ImageData
from launch.follow import MAX_BARREN, Follow
from launch.live import Board
from launch.machine import Slots
from launch.notices import Notices
from launch.on_tune import run_on_tune
from launch.shared import Original
from launch.signals import Interrupted, Signals
from launch.trainable import UnlearningTrial
from tests.launch.launched import is_alive
from tests.launch.small_sweep import SmallSweep, run_to_end
from tune_spaces.space import Space

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

SPACE = Space(
    name="digits/long",
    summary="one trial of some seconds",
    base={"dataset_name": "digits", "num_train_epochs": 8, "learning_rate": 0.01, "eval_strategy": "no"},
    grids=({"unlearning_method": ("ft",)},),
)


class Disturbed(Follow):
    """Does something when the first report of a trial has come."""

    disturb: Callable[[], None]
    n_reports = 0
    pid = 0
    """Of the slot that reported last."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        super().on_trial_result(iteration, trials, trial, result, **info)
        self.n_reports += 1
        self.pid = result["pid"]
        if self.n_reports == 1:
            self.disturb()


class Sweep(SmallSweep):
    """One trial on the session's Ray, in a sweep that has notices."""

    def __init__(self, root: Path, digits: ImageData, original: Original) -> None:
        super().__init__(root, digits, original, space=SPACE)
        self.signals, self.out = Signals(), StringIO()

    def run(
        self, ray: Any, disturb: Callable[[Notices, Disturbed], None], trial: type[UnlearningTrial] = UnlearningTrial
    ) -> None:
        notices = Notices()
        shared = self.shared_by(ray.put, notices=notices.actor, scratch=str(self.folder.path / ".ray"))
        with Board(self.plan, Console(file=self.out, width=200)) as board:
            follow = Disturbed(self.plan, self.folder, board, self.signals, notices=notices)
            follow.disturb = lambda: disturb(notices, follow)
            run_on_tune(shared, self.ids, Slots(count=1), follow, trial=trial)

    def attempts(self) -> list[dict[str, Any]]:
        return json.loads((self.folder.trial(self.ids[0]) / "attempts.json").read_text())


@pytest.fixture
def sweep(tmp_path: Path, digits: ImageData, original: Original) -> Sweep:
    return Sweep(tmp_path / "tuned", digits, original)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: ImageData, original: Original) -> dict[str, float]:
    torch.set_num_threads(1)
    alone = Sweep(tmp_path_factory.mktemp("alone"), digits, original)
    run_to_end(alone.slot(), alone.ids[0])
    return alone.metrics(alone.ids[0])


@pytest.mark.soak  # the rule in short: test_faults_in_short.py
def test_a_signal_has_running_trials_save_themselves_and_the_sweep_goes_on_from_there(
    ray_cluster: Any, sweep: Sweep, undisturbed: dict[str, float]
) -> None:
    came: list[float] = []

    def disturb(notices: Notices, follow: Disturbed) -> None:
        came.append(time.monotonic())
        sweep.signals.number = signal.SIGTERM

    with pytest.raises(Interrupted):
        sweep.run(ray_cluster, disturb)
    assert time.monotonic() - came[0] < 12
    checkpoint = sweep.folder.trial(sweep.ids[0]) / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)["step"]
    assert saved > 0
    assert [each["closed"] for each in sweep.attempts()] == [True]
    sweep.signals.number = None
    run_to_end(sweep.slot(run_id="second"), sweep.ids[0])
    assert sweep.metrics(sweep.ids[0]) == undisturbed


def test_a_trial_leaves_a_node_that_is_to_go_and_ends_elsewhere_with_the_same_numbers(
    ray_cluster: Any, sweep: Sweep, undisturbed: dict[str, float]
) -> None:
    node = ray_cluster.get_runtime_context().get_node_id()

    def disturb(notices: Notices, follow: Disturbed) -> None:
        notices.drain({node: time.time() + 30})
        recover = follow.on_trial_recover

        def recovered(*given: Any, **named: Any) -> None:
            recover(*given, **named)
            notices.drain({})  # here the only node stays, after all

        follow.on_trial_recover = recovered  # type: ignore[method-assign]

    sweep.run(ray_cluster, disturb)
    assert sweep.metrics(sweep.ids[0]) == undisturbed
    assert [each["closed"] for each in sweep.attempts()] == [True, True]
    assert f"{sweep.ids[0]} is saved and leaves its node, which is to be taken away" in sweep.out.getvalue()
    assert not (sweep.folder.path / ".ray").exists()


@pytest.mark.soak
def test_a_slot_that_is_told_to_end_saves_its_trial_which_goes_on_elsewhere_with_the_same_numbers(
    ray_cluster: Any, sweep: Sweep, undisturbed: dict[str, float]
) -> None:
    told: list[int] = []

    def disturb(notices: Notices, follow: Disturbed) -> None:
        told.append(follow.pid)
        os.kill(follow.pid, signal.SIGTERM)

    sweep.run(ray_cluster, disturb)
    assert sweep.metrics(sweep.ids[0]) == undisturbed
    assert [each["closed"] for each in sweep.attempts()] == [True, True]  # left in order, not found dead
    assert f"{sweep.ids[0]} is saved and leaves" in sweep.out.getvalue()
    assert sweep.row(sweep.ids[0])["slot"] != told[0]
    assert not is_alive(told[0])


class Stillborn(UnlearningTrial):
    """Its process dies before it can begin any trial."""

    def step(self) -> dict[str, Any]:
        raise RuntimeError("no such device")


@pytest.mark.soak
def test_a_trial_whose_slots_die_before_they_can_begin_it_is_given_up(ray_cluster: Any, sweep: Sweep) -> None:
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not find the tests' modules
    try:
        sweep.run(ray_cluster, lambda *_: None, trial=Stillborn)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    row = sweep.row(sweep.ids[0])
    assert row["status"] == "failed"
    assert row["error"].startswith(f"its process died {MAX_BARREN + 1} times before it could begin: ")
    assert "no such device" in row["error"]
