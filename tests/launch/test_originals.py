"""A sweep trains what its trials start from once, survives one that fails, and starts from the same weights when resumed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import launch.originals
from hamu.data.sources import ImageData
from hamu.errors import CheckpointError
from hamu.storage.files import read_json
from hamu.training.config import TrainConfig
from launch.machine import Machine, Slots
from launch.originals import Provided, _one_of_each_kind, _pin, provide_models
from launch.plan import Plan, data_key, make_plan, read_overrides
from launch.references import error_words
from launch.results import SweepFolder
from launch.shared import Original
from launch.signals import Signals
from launch.words import Words
from tune_spaces.space import Space

SPACE = Space(
    name="digits/starts",
    summary="two seeds, two rhos",
    base={"dataset_name": "digits", "num_train_epochs": 0.5, "learning_rate": 0.01, "constraint_ratio": 0.1},
    grids=({"unlearning_method": ("hamu-q", "ft"), "seed": (41, 42), "hard_probability": (0.0, 0.5)},),
    original={"num_train_epochs": 0.2},
)


def test_other_weights_than_the_sweep_began_with_are_refused(tmp_path: Path) -> None:
    pins = tmp_path / "originals.json"
    first = Original(path="there", arrays={"w": np.ones(3, np.float32)})
    _pin(pins, "a", first)
    _pin(pins, "b", Original(path="elsewhere", arrays={"w": np.zeros(3, np.float32)}))
    _pin(pins, "a", first)
    with pytest.raises(CheckpointError, match="has other weights .* start a sweep of another --name"):
        _pin(pins, "a", Original(path="there", arrays={"w": np.full(3, 2, np.float32)}))


TEXT = {"modality": "llm", "model_name": "tiny-llama", "dataset_name": "authors", "method": "hamu-q"}
IMAGE = {"model_name": "resnet20", "method": "hamu-q"}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (IMAGE, {"model_name": "torchvision/resnet18"}),
        (IMAGE, {"img_size": 64}),
        (IMAGE, {"freeze_batchnorm": False}),
        (IMAGE, {"method": "kl"}),
        (IMAGE, {"use_optimizer": True}),
        (IMAGE, {"bf16": True}),
        (IMAGE, {"per_device_eval_batch_size": 64}),
        (IMAGE | {"method": "gru"}, {"gru_beta": 0.5}),
        (TEXT, {"max_length": 256}),
        (TEXT, {"gradient_checkpointing": True}),
        (TEXT, {"add_lora": True}),
        (TEXT | {"add_lora": True}, {"lora_r": 64}),
        (TEXT | {"add_lora": True}, {"lora_targets": "q_proj"}),
    ],
)
def test_the_memory_of_trials_that_differ_in_what_it_depends_on_is_estimated_for_each(
    base: dict[str, Any], changes: dict[str, Any]
) -> None:
    one, other = TrainConfig.from_flat(base), TrainConfig.from_flat(base | changes)
    assert _one_of_each_kind([one, other]) == (one, other)


def test_of_trials_that_take_memory_alike_the_largest_batch_is_estimated() -> None:
    alike = [
        TrainConfig.from_flat(IMAGE | {"batch_size": size, "lr": lr, "constraint_ratio": ratio, "seed": seed, "rho": 0.5})
        for size, lr, ratio, seed in ((64, 0.1, 0.2, 1), (256, 0.2, 0.1, 2), (128, 0.3, 0.3, 3))
    ]
    assert _one_of_each_kind(alike) == (alike[1],)


def test_a_task_that_fills_the_memory_is_told_apart_from_one_that_is_killed() -> None:
    import ray

    assert "ran out of memory each time" in error_words(ray.exceptions.OutOfMemoryError("1 worker(s) were killed"))
    assert error_words(ray.exceptions.WorkerCrashedError()).startswith("its process died")
    assert error_words(CheckpointError("no model\nthere")) == "no model there"
    assert error_words(ValueError("a shape")) == "ValueError: a shape"


class Sweep:
    """A plan in a folder, and what `provide_models` says of it."""

    def __init__(self, root: Path, data: Mapping[str, Any], ray: Any, plan: Plan) -> None:
        self.root, self.plan, self.ray = root, plan, ray
        self.folder = SweepFolder(root / "results" / "digits" / "starts")
        if not self.folder.path.exists():
            self.folder.start(plan)
        self.data = {key: ray.put(data[key]) for key in plan.datasets()}
        self.sizes = {key: item.n_bytes for key, item in data.items()}
        self.said = io.StringIO()
        self.ids = [trial.trial_id for trial in plan.trials]

    def provide(self, **more: Any) -> Provided:
        return provide_models(
            self.plan,
            more.pop("todo", self.ids),
            self.data,
            self.sizes,
            slots=Slots(count=2),
            machine=Machine(cpus=2, cpu_name="a core", memory_bytes=2**34, gpus=0),
            words=Words(Console(file=self.said)),
            signals=Signals(),
            folder=self.folder,
            **more,
        )

    def key_of(self, seed: int) -> str:
        return next(trial.original for trial in self.plan.trials if trial.config["seed"] == seed)


def sweep_of(root: Path, digits: ImageData, ray: Any, *assignments: str, with_reference: bool = False) -> Sweep:
    overrides = read_overrides(assignments)
    plan = make_plan(SPACE, name="starts", overrides=overrides, root=root, with_reference=with_reference)
    return Sweep(root, dict.fromkeys(plan.datasets(), digits), ray, plan)


def on_ray(test: Any) -> Any:
    for mark in (pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)):
        test = mark(test)
    return test


@on_ray
def test_one_original_a_seed_whatever_the_rho_is_trained_once_and_then_loaded(
    tmp_path: Path, digits: ImageData, ray_cluster: Any
) -> None:
    sweep = sweep_of(tmp_path, digits, ray_cluster)
    provided = sweep.provide()
    assert set(provided.originals) == {sweep.key_of(41), sweep.key_of(42)}
    assert not provided.failed
    assert provided.memory_bytes is None
    places = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("checkpoints/**/record.json"))
    assert places == [f"checkpoints/digits/seed_{seed}/forget_0_0.0/full" for seed in (41, 42)]
    original: Original = ray_cluster.get(provided.originals[sweep.key_of(41)])
    assert original.path == str(tmp_path / places[0])
    assert original.hardness["gradient_product"] > 0
    assert f"training the original {sweep.key_of(41)}" in sweep.said.getvalue()

    again = sweep_of(tmp_path, digits, ray_cluster)
    provided = again.provide(todo=again.ids[:1], wants_memory=True)
    assert "training" not in again.said.getvalue()
    assert f"loading the original {again.plan.trials[0].original}" in again.said.getvalue()
    assert provided.memory_bytes is not None and 2**20 < provided.memory_bytes < 2**32


@on_ray
def test_a_failed_original_takes_its_own_trials_down_and_the_sweep_goes_on(
    tmp_path: Path, digits: ImageData, ray_cluster: Any
) -> None:
    sweep = sweep_of(tmp_path, digits, ray_cluster)
    seed = tmp_path / "checkpoints" / "digits" / "seed_41"
    seed.parent.mkdir(parents=True)
    seed.write_text("in the way")
    provided = sweep.provide()
    assert set(provided.originals) == {sweep.key_of(42)}
    assert set(provided.failed) == {sweep.key_of(41)}
    line = provided.failed[sweep.key_of(41)]
    assert line.startswith(f"the original {sweep.key_of(41)} failed, so its 4 trials cannot start: ")
    assert "seed_41" in line and "\n" not in line
    assert line in sweep.said.getvalue()


@on_ray
def test_when_all_originals_fail_for_want_of_other_settings_the_user_is_told(
    tmp_path: Path, digits: ImageData, ray_cluster: Any
) -> None:
    sweep = sweep_of(tmp_path, digits, ray_cluster, "original.learning_rate=1e30")
    with pytest.raises(CheckpointError, match="no model to start from; train it with a learning_rate below 1e[+]30"):
        sweep.provide()


@on_ray
def test_an_original_whose_process_dies_each_time_is_tried_three_times(
    tmp_path: Path, digits: ImageData, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = str(tmp_path / "seen")

    def die(*given: Any, **more: Any) -> None:
        with open(seen, "a") as file:
            file.write("x")
        os._exit(1)

    monkeypatch.setattr(launch.originals, "provide", die)
    sweep = sweep_of(tmp_path, digits, ray_cluster, "seed=41")
    provided = sweep.provide()
    assert Path(seen).read_text() == "xxx"
    assert not provided.originals
    assert "its process died (killed, or out of memory), 3 times" in provided.failed[sweep.key_of(41)]


@on_ray
def test_an_original_whose_process_dies_once_is_had_by_another_one(
    tmp_path: Path, digits: ImageData, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, provide = str(tmp_path / "seen"), launch.originals.provide

    def die_once(*given: Any, **more: Any) -> Original:
        if not os.path.exists(seen):
            open(seen, "w").close()
            os._exit(1)
        return provide(*given, **more)

    monkeypatch.setattr(launch.originals, "provide", die_once)
    sweep = sweep_of(tmp_path, digits, ray_cluster, "seed=41")
    provided = sweep.provide()
    assert set(provided.originals) == {sweep.key_of(41)}
    assert not provided.failed


@on_ray
def test_retain_only_models_are_one_a_forget_set_measured_and_kept(tmp_path: Path, digits: ImageData, ray_cluster: Any) -> None:
    sweep = sweep_of(tmp_path, digits, ray_cluster, "seed=41", with_reference=True)
    provided = sweep.provide()
    known = provided.references.wait()
    assert set(known) == {str(trial.reference) for trial in sweep.plan.trials}
    assert provided.references.n_pending == 0
    by_place = {str(Path(entry["path"]).relative_to(tmp_path)): entry["result"] for entry in known.values()}
    assert sorted(by_place) == [f"checkpoints/digits/seed_41/forget_0_{rho}/retain" for rho in ("0.0", "0.5")]
    for result in by_place.values():
        assert {f"{split}_{what}" for split in ("retain", "forget", "test") for what in ("loss", "accuracy")} <= set(result)
        assert result["forget_test_loss_auc"] is not None
    whole_class = by_place["checkpoints/digits/seed_41/forget_0_0.0/retain"]
    assert whole_class["forget_accuracy"] == 0  # it has never seen the class
    assert read_json(sweep.folder.references_path).keys() == known.keys()
    assert provided.references.folders() == {key: entry["path"] for key, entry in known.items()}

    again = sweep_of(tmp_path, digits, ray_cluster, "seed=41", with_reference=True)
    references = again.provide().references
    assert references.n_pending == 0
    assert references.poll() == known


@on_ray
def test_a_failed_retain_only_model_leaves_the_trials_and_says_so(tmp_path: Path, digits: ImageData, ray_cluster: Any) -> None:
    sweep = sweep_of(tmp_path, digits, ray_cluster, "seed=41", "hard_probability=0.5", with_reference=True)
    place = tmp_path / "checkpoints" / "digits" / "seed_41" / "forget_0_0.5"
    place.parent.mkdir(parents=True)
    place.write_text("in the way")
    provided = sweep.provide()
    assert set(provided.originals) == {sweep.key_of(41)}
    known = provided.references.wait()
    (entry,) = known.values()
    assert "forget_0_0.5" in entry["error"]
    assert provided.references.folders() == {}
    assert "failed, so its trials are not compared with one" in sweep.said.getvalue()


@on_ray
def test_another_recipe_of_retain_only_models_overwrites_none(tmp_path: Path, digits: ImageData, ray_cluster: Any) -> None:
    first = sweep_of(tmp_path, digits, ray_cluster, "seed=41", "rho=0", with_reference=True).provide().references.wait()
    other = sweep_of(
        tmp_path, digits, ray_cluster, "seed=41", "rho=0", "original.num_train_epochs=0.4", with_reference=True
    ).provide().references.wait()  # fmt: skip
    paths = [entry["path"] for entry in (*first.values(), *(other[key] for key in other.keys() - first.keys()))]
    assert len(paths) == len(set(paths)) == 2
    assert Path(paths[1]).name.startswith("retain-")


TEXTS = Space(
    name="authors/starts",
    summary="a text trial that is compared by TOFU's metrics",
    base={
        "modality": "llm", "dataset_name": "authors", "model_name": "tiny-llama", "unlearning_method": "ft",
        "num_train_epochs": 0.2, "eval_tofu": True,
    },
    grids=({"learning_rate": (1e-4,)},),
    original={"num_train_epochs": 0.2},
)  # fmt: skip


@on_ray
def test_retain_only_models_of_texts_have_the_truth_ratios_that_trials_read(tmp_path: Path, ray_cluster: Any) -> None:
    from hamu.tasks.catalog import modality_of

    plan = make_plan(TEXTS, name="starts", overrides={}, root=tmp_path, with_reference=True)
    (config,) = plan.configs.values()
    data = {data_key(config): modality_of(config).load_data(config)}
    sweep = Sweep(tmp_path, data, ray_cluster, plan)
    folders = sweep.provide().references.folders()  # waited for, since trials read them
    (folder,) = folders.values()
    ratios = Path(folder) / "truth_ratios.json"
    first = ratios.read_bytes()

    ratios.unlink()  # as of a model that was trained before its truth ratios were asked for
    (again,) = Sweep(tmp_path, data, ray_cluster, plan).provide().references.folders().values()
    assert again == folder
    assert json.loads(ratios.read_bytes())["forget"] == pytest.approx(json.loads(first)["forget"], rel=1e-4)
