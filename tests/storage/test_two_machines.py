"""What two machines do to one sweep in a store: nothing that one has written is lost or written over by the other.

The machines are two mirrors of one bucket (conftest.py).
"""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from rich.console import Console

from hamu.data.sources import load_image_data
from hamu.errors import CheckpointError, ConfigError
from hamu.storage import mount
from hamu.storage.files import read_json, write_json, write_new_json
from hamu.storage.shared_json import changing_json
from hamu.training.config import TrainConfig
from launch.attempts import Attempts, attempts_at, begun_among, was_begun
from launch.follow import Follow
from launch.left_out import without_failed
from launch.live import Board
from launch.originals import _pin
from launch.plan import Plan, make_plan
from launch.references import add_references, is_ready, known_references
from launch.results import SweepFolder, check_free
from launch.shared import Original, failed_row
from launch.signals import Signals
from launch.standing import has_ended
from launch.states import STATE, next_folder, take_state, write_origin
from launch.words import Words
from tests.launch.small_sweep import SmallSweep, run_to_end, small_original
from tune_spaces.search import SearchSettings
from tune_spaces.space import load_space


def plan_at(root: Path, **more: Any) -> Plan:
    return make_plan(load_space("digits/quickstart"), name="mine", overrides={"unlearning_method": ("ft",)}, root=root, **more)


def folder_at(root: Path) -> SweepFolder:
    return SweepFolder(root / "results" / "digits" / "mine")


def finished(plan: Plan, root: Path, index: int = 0) -> str:
    """A trial's slot on some machine writes its row."""
    trial = plan.trials[index]
    path = folder_at(root).trial(trial.trial_id) / "row.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**failed_row(plan, trial, ""), "status": "finished", "error": None, "started_at": 1.0, "ended_at": 2.0})
    return trial.trial_id


def tunes(trial_id: str, **last: Any) -> Trial:
    """Tune's trial as the driver sees it, with what it was told last."""
    trial = Trial("x", stub=True, config={"trial_id": trial_id}, trial_name_creator=lambda each: trial_id)
    trial.run_metadata.last_result = last
    trial.storage = SimpleNamespace(trial_driver_staging_path="")  # without a file of what it died of
    return trial


class Driver:
    """The driver of a sweep in a mirror."""

    def __init__(self, root: Path) -> None:
        self.plan, self.folder = plan_at(root), folder_at(root)
        self.folder.start(self.plan)
        self.said = io.StringIO()
        self.told: dict[str, Any] = {}
        board = Board(self.plan, Console(file=self.said, width=400))
        self.follow = Follow(
            self.plan, self.folder, board, Signals(), tell=lambda key, row: self.told.update({key: row["status"]})
        )

    def status(self, trial_id: str) -> str | None:
        return self.folder.row(trial_id).get("status")


ENDED: dict[str, Any] = {"said": '{"status": "finished", "step": 3}'}
RUNNING: dict[str, Any] = {"said": '{"step": 3}'}


@pytest.mark.parametrize("last", [ENDED, RUNNING, {}], ids=["said so", "stopped meanwhile", "silent"])
@pytest.mark.parametrize("event", ["on_trial_complete", "on_trial_error"])
def test_the_row_of_a_trial_of_another_machine_is_not_written_over(
    here: Path, there: Path, event: str, last: dict[str, Any]
) -> None:
    driver = Driver(here)
    trial_id = finished(driver.plan, there)
    getattr(driver.follow, event)(0, [], tunes(trial_id, **last))
    assert driver.status(trial_id) == folder_at(there).row(trial_id)["status"] == "finished"
    assert driver.told == {trial_id: "finished"}
    assert driver.follow.to_complete() == {}


def test_a_row_that_another_machine_writes_in_the_same_moment_stays(
    here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(here)
    monkeypatch.setattr(driver.follow, "_row", lambda trial_id: finished(driver.plan, there) and {})  # after the driver looked
    trial_id = driver.plan.trials[0].trial_id
    driver.follow.on_trial_error(0, [], tunes(trial_id))
    assert driver.told == {trial_id: "finished"}
    assert folder_at(there).row(trial_id)["status"] == "finished"


def test_a_trial_that_was_stopped_with_a_checkpoint_on_another_machine_is_completed(here: Path, there: Path) -> None:
    driver = Driver(here)
    saved, unsaved = (trial.trial_id for trial in driver.plan.trials[:2])
    checkpoint = folder_at(there).trial(saved) / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("weights")
    mount.publish(checkpoint)
    for trial_id in (saved, unsaved):
        driver.follow.on_trial_complete(0, [], tunes(trial_id, **RUNNING))
        assert folder_at(there).row(trial_id)["status"] == "pruned"
    assert list(driver.follow.to_complete()) == [saved]
    assert not (driver.folder.trial(saved) / "checkpoint.pt").exists()  # asked for, not fetched


def test_a_new_sweep_does_not_take_the_place_of_one_of_another_machine(here: Path, there: Path) -> None:
    plan, folder = plan_at(here), folder_at(here)
    folder.start(plan)
    other, space = folder_at(there), plan.space
    with pytest.raises(ConfigError, match=r"sweep 'mine' exists in s3://.*/results/digits/mine \(0 of 3 trials finished\)"):
        check_free(other, space=space, root=there)
    longer = make_plan(load_space("digits/quickstart"), name="mine", overrides={"seed": (1, 2)}, root=there)
    with pytest.raises(ConfigError, match=r"s3://.*/mine holds another sweep's plan \(3 trials of 'digits/quickstart'\)"):
        folder_at(there).start(longer)
    assert folder.read_plan(here) == plan
    something = SweepFolder(there / "results" / "digits" / "other")
    check_free(something, space=space, root=there)
    (here / "results" / "digits" / "other").mkdir()
    write_json(here / "results" / "digits" / "other" / "thesis.json", {})
    with pytest.raises(ConfigError, match=r"s3://.*/other exists and is no sweep's folder"):
        check_free(something, space=space, root=there)


def test_attempts_of_several_machines_are_all_kept(here: Path, there: Path) -> None:
    ours, theirs = folder_at(here).trial("t"), folder_at(there).trial("t")
    first = Attempts(ours, "run", nodes=["a"])
    assert first.open() is None
    assert was_begun(theirs) and attempts_at(theirs) == 1
    assert begun_among(folder_at(there).trials, ["t", "u"]) == ["t"]
    assert Attempts(theirs, "run", nodes=["b"]).note("out of memory")  # a rank of the same trial on another node
    assert not first.note("its partner is gone")
    assert first.open() is None
    assert Attempts(theirs, "run").open() == "out of memory"
    Attempts(theirs, "run").close()
    assert [(each["nodes"], each["error"], each["closed"]) for each in read_json(theirs / "attempts.json")] == [
        (["a"], "out of memory", False), (["a"], None, True),
    ]  # fmt: skip


def test_a_note_of_a_trial_that_was_never_begun_writes_nothing(here: Path) -> None:
    folder = folder_at(here).trial("t")
    assert not Attempts(folder, "run").note("no news")
    assert not mount.exists(folder / "attempts.json")


def test_a_failed_row_of_another_machine_that_a_search_takes_back_goes_from_the_store(here: Path, there: Path) -> None:
    plan, folder = plan_at(here, search=SearchSettings(name="random", trials=2)), folder_at(here)
    folder.start(plan)
    ids = [trial.trial_id for trial in plan.trials]
    words, failed = Words(Console(file=io.StringIO())), {plan.trials[0].original: "no room"}
    assert without_failed(plan, ids, folder_at(there), failed, words) == []
    assert {row["status"] for row in folder.rows().values()} == {"failed"}
    assert without_failed(plan, ids, folder, {}, words) == ids
    assert folder_at(there).rows() == {}


def test_shares_on_several_machines_keep_each_others_references_and_originals(here: Path, there: Path) -> None:
    ours, theirs = folder_at(here), folder_at(there)
    model = here / "checkpoints" / "retain"
    model.mkdir(parents=True)
    (model / "record.json").write_text("{}")
    mount.publish(model)
    good = {"path": mount.shown(model), "result": {"forget_loss": 1.0}}
    for folder in (ours, theirs):
        known_references(folder.references_path)
        folder.path.mkdir(parents=True, exist_ok=True)
    add_references(ours.references_path, {"a": good})
    assert add_references(theirs.references_path, {"b": {"error": "no room"}, "a": {"error": "no room"}}).keys() == {"a", "b"}
    assert ours.references() == theirs.references() == {"a": good, "b": {"error": "no room"}}
    assert is_ready(theirs.references()["a"], with_truth_ratios=False, near=theirs.path)
    assert not is_ready(theirs.references()["a"], with_truth_ratios=True, near=theirs.path)
    assert not is_ready(theirs.references()["b"], with_truth_ratios=False, near=theirs.path)

    def original(value: float) -> Original:
        return Original(path=str(model), arrays={"w": np.full(3, value, np.float32)})

    _pin(ours.originals, "a", original(1))
    _pin(theirs.originals, "b", original(2))
    with pytest.raises(CheckpointError, match="the original 's3://.*/retain' has other weights"):
        _pin(theirs.originals, "a", original(3))
    assert ours.originals.exists() and set(read_json(theirs.originals)) == {"a", "b"}


def test_a_checkpoint_that_was_fetched_is_still_the_state_that_it_was_taken_of(here: Path, there: Path) -> None:
    state = next_folder(here / "a")
    (state / STATE).write_text("of a")
    mount.publish(state)
    write_origin(state, trial_id="a", recipe="one", metrics={})
    (here / "b").mkdir()
    assert take_state(state, here / "b", trial_id="b", recipe="two")
    mount.fetch(there)  # the trial is begun again on another machine
    again = there / state.relative_to(here)
    assert take_state(again, there / "b", trial_id="b", recipe="two")
    (there / "b" / "checkpoint.pt").write_text("of b")
    assert not take_state(again, there / "b", trial_id="b", recipe="two")


def test_the_place_of_a_url_is_in_the_mirror_at_hand(here: Path, there: Path, tmp_path: Path) -> None:
    said = mount.shown(here / "a" / "model")
    assert said.startswith("s3://")
    assert mount.place_of(said, near=there / "b") == there / "a" / "model"
    assert mount.place_of("a/model", near=there) == mount.place_of("a/model", near=tmp_path) == Path("a/model")


def test_of_many_that_create_a_file_in_a_store_one_does(here: Path, there: Path) -> None:
    made: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: made.append(n) if write_new_json((here, there)[n % 2] / "a.json", {"n": n}) else None)
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    for root in (here, there):
        mount.fetch(root / "a.json")
        assert read_json(root / "a.json") == {"n": made[0]}


def test_what_several_add_to_a_file_in_a_store_is_all_there(here: Path, there: Path) -> None:
    def add(n: int) -> None:
        with changing_json((here, there)[n % 2] / "a.json", {}) as value:
            value[str(n)] = n

    threads = [threading.Thread(target=add, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mount.fetch(here / "a.json")
    assert read_json(here / "a.json") == {str(n): n for n in range(6)}


@pytest.mark.slow
def test_a_slot_says_where_in_the_store_its_model_is(here: Path, there: Path) -> None:
    data = load_image_data(TrainConfig().data)
    sweep = SmallSweep(here, data, small_original(data, here / "original"), "method=ft", "num_train_epochs=0.1")
    trial_id = sweep.ids[0]
    run_to_end(sweep.slot(), trial_id)
    row = SweepFolder(there / "small").row(trial_id)
    assert has_ended(row)
    assert row["model_path"] == f"{mount.shown(here)}/small/trials/{trial_id}/model"
    model = mount.place_of(row["model_path"], near=there)
    mount.fetch(model)
    assert model == there / "small" / "trials" / trial_id / "model"
    assert (model / "model.safetensors").is_file()
    store, folder = mount.store_of(here) or (None, "")
    assert store is not None
    assert not [name for name in store.find(folder) if ".tmp" in name]
