"""Models to start from: trained once, kept by recipe, never published half-made, and no folder of a user's is touched."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hamu.errors import CheckpointError, ConfigError
from hamu.tasks.vision import task_for
from hamu.training.artifacts import read_record
from hamu.training.config import TrainConfig
from hamu.training.original import choose_device, load_data, provide_model, save_model

Build = Callable[..., TrainConfig]


def original(tiny: Build, **settings: Any) -> TrainConfig:
    return tiny(add_forget_to_train=True, **settings)


def provide(config: TrainConfig) -> Path:
    return provide_model(config, load_data(config))


def content(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_two_recipes_never_overwrite_each_other_and_each_is_trained_once(tiny: Build) -> None:
    first = provide(original(tiny))
    kept = content(first)
    second = provide(original(tiny, lr=2e-3))
    assert first.name == "full"
    assert second == first.with_name(f"full-{read_record(second)['recipe']}")
    assert provide(original(tiny)) == first
    assert provide(original(tiny, lr=2e-3, rho=0.5)) == second  # an original does not depend on rho
    assert content(first) == kept
    assert {path.name for path in first.parent.iterdir() if not path.match(".full.lease.*")} == {"full", second.name}


def _provide_in_process(flat: dict[str, Any], barrier: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    config = TrainConfig.from_flat(flat)
    data = load_data(config)
    barrier.wait()
    path = provide_model(config, data)
    answers.put((str(path), (path / "model.safetensors").stat().st_ino))


@pytest.mark.slow
def test_two_processes_that_ask_for_one_model_train_it_once(tmp_path: Path) -> None:
    flat = {"artifact_root": str(tmp_path), "add_forget_to_train": True, "epochs": 0.1, "batch_size": 64, "device": "cpu"}
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_provide_in_process, args=(flat, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    # Trained twice, the second would have replaced the first's files by new ones.
    assert found[0] == found[1]
    assert os.stat(Path(found[0][0]) / "model.safetensors").st_ino == found[0][1]


def test_a_diverged_original_is_refused_and_not_published(tiny: Build) -> None:
    config = original(tiny, lr=1e30)
    with pytest.raises(CheckpointError, match=r"non_finite.*learning_rate below 1e\+30") as caught:
        provide(config)
    assert "\n" not in str(caught.value)
    assert list((Path(config.run.artifact_root)).rglob("record.json")) == []


@pytest.mark.parametrize("reason", ["cancelled", "non_finite"])
def test_a_model_of_an_unfit_end_is_trained_again(tiny: Build, reason: str) -> None:
    path = provide(original(tiny))
    record = read_record(path)
    (path / "record.json").write_text(json.dumps({**record, "result": {**record["result"], "stop_reason": reason}}))
    assert provide(original(tiny)) == path
    assert read_record(path)["result"]["stop_reason"] == "finished"


def test_a_missed_target_is_warned_of(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    provide(original(tiny, target_test_accuracy=1.0))
    assert any("target_test_accuracy 1 was not reached" in line for line in caplog.messages)


def test_a_published_checkpoint_without_a_record_is_adopted(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    path = provide(original(tiny))
    (path / "record.json").unlink()
    kept = content(path)
    with caplog.at_level(logging.INFO):
        assert provide(original(tiny, lr=5e-3)) == path
    assert content(path) == kept
    assert any("published checkpoint" in line for line in caplog.messages)


def test_saving_replaces_the_same_recipe_whole_and_nothing_else(tiny: Build, tmp_path: Path) -> None:
    config = tiny()
    task = task_for(config, load_data(config))
    model, target = task.new_model(0), tmp_path / "out"
    save_model(task, model, target, {"recipe": "aaaa"})
    (target / "left over").write_text("")
    save_model(task, model, target, {"recipe": "aaaa", "auc": float("nan")})
    assert not (target / "left over").exists()
    said = json.loads((target / "record.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert said["auc"] is None
    assert said["normalisation"] == {"mean": list(task.mean), "std": list(task.std), "scale": 1 / 255}
    with pytest.raises(CheckpointError, match="recipe aaaa, this run is bbbb"):
        save_model(task, model, target, {"recipe": "bbbb"})
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("meow")
    with pytest.raises(CheckpointError, match="not overwritten"):
        save_model(task, model, photos, {"recipe": "aaaa"})
    assert (photos / "cat.jpg").read_text() == "meow"
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_a_save_that_fails_leaves_the_old_model(tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    task = task_for(config, load_data(config))
    target = tmp_path / "out"
    save_model(task, task.new_model(0), target, {"recipe": "aaaa"})
    kept, rename = content(target), os.rename

    def full_disk(source: Any, place: Any) -> None:
        if Path(source).name == "new":
            raise OSError("no space left on device")
        rename(source, place)

    monkeypatch.setattr(os, "rename", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(task, task.new_model(0), target, {"recipe": "aaaa"})
    assert content(target) == kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_a_gpu_that_is_not_there_is_refused(tiny: Build) -> None:
    with pytest.raises(ConfigError, match="device 'cuda' is not there"):
        choose_device(tiny(device="cuda"))
    assert choose_device(tiny(device=None)).type == "cpu"


def test_a_model_whose_weights_are_cut_is_set_aside_and_trained_again(tmp_path: Path) -> None:
    config = TrainConfig.from_flat({"artifact_root": str(tmp_path), "add_forget_to_train": True, "num_train_epochs": 0.1})
    data = load_data(config)
    path = provide_model(config, data)
    [weights] = path.glob("*.safetensors")
    whole = weights.read_bytes()
    os.truncate(weights, len(whole) // 2)
    assert provide_model(config, data) == path
    assert weights.read_bytes() == whole
    assert (path.parent / f"{path.name}.corrupt-1").is_dir()
