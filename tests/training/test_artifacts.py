"""Places and records: a recipe is what decides a model's numbers, and nothing is overwritten by another one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hamu.errors import CheckpointError
from hamu.models.record import json_text
from hamu.training.artifacts import (
    canonical,
    check_replaceable,
    make_record,
    place_for,
    read_record,
    recipe_of,
    results_path,
    start_model_of,
    stop_reason_at,
    trained_model_path,
)
from hamu.training.config import TrainConfig
from hamu.training.stop import StopReason


def config(**flat: object) -> TrainConfig:
    return TrainConfig.from_flat(flat)


def put_record(folder: Path, **record: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_published_places_are_those_of_the_published_code() -> None:
    made = config(rho=0.5, seed=7, forget_class=3, dataset_name="uoft-cs/cifar10", artifact_root="root")
    base = Path("root/checkpoints/cifar/seed_7")
    assert trained_model_path(made, variant="full") == base / "forget_3_0.0/full"
    assert trained_model_path(made, variant="retain") == base / "forget_3_0.5/retain"


def test_an_original_has_one_recipe_for_every_rho() -> None:
    recipes = {recipe_of(canonical(config(add_forget_to_train=True, rho=rho)), "data") for rho in (0.0, 0.5, 1.0)}
    assert len(recipes) == 1
    assert canonical(config(rho=0.5)).data.rho == 0.5  # a retain-only model does depend on it
    assert canonical(config(method="hamu-q", rho=0.5)).data.rho == 0.5


def test_recipe_is_of_settings_data_and_start_model() -> None:
    base = config(method="hamu-q")
    recipes = {
        recipe_of(base, "data"),
        recipe_of(base, "other data"),
        recipe_of(base.replace(lr=1e-3), "data"),
        recipe_of(base, "data", {"path": "a", "recipe": "11111111"}),
        recipe_of(base, "data", {"path": "a", "recipe": "22222222"}),
    }
    assert len(recipes) == 5
    here, there = ({"path": path, "recipe": "11111111"} for path in ("here", "there"))
    assert recipe_of(base, "data", here) == recipe_of(base, "data", there)  # where it lies decides nothing
    assert results_path(base, "abcd1234").name == "hamu-q-abcd1234"


def test_another_recipe_gets_a_suffix_and_a_free_place_none(tmp_path: Path) -> None:
    place = tmp_path / "full"
    assert place_for(place, "aaaa") == place
    place.mkdir()
    assert place_for(place, "aaaa") == place
    put_record(place, recipe="aaaa")
    assert place_for(place, "aaaa") == place
    assert place_for(place, "bbbb") == tmp_path / "full-bbbb"
    (place / "record.json").write_text("{broken")
    assert place_for(place, "aaaa") == tmp_path / "full-aaaa"


def test_only_a_folder_of_the_same_recipe_is_replaceable(tmp_path: Path) -> None:
    for free in (tmp_path / "none", tmp_path / "empty"):
        check_replaceable(free, "aaaa")
        free.mkdir(exist_ok=True)
    ours = put_record(tmp_path / "ours", recipe="aaaa")
    check_replaceable(ours, "aaaa")
    check_replaceable(ours)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("")
    foreign = put_record(tmp_path / "foreign", artist="someone")
    for place, recipe in ((ours, "bbbb"), (photos, "aaaa"), (photos, None), (tmp_path / "file", "aaaa"), (foreign, "aaaa")):
        with pytest.raises(CheckpointError) as caught:
            check_replaceable(place, recipe)
        assert "\n" not in str(caught.value)
        assert str(place) in str(caught.value)


def test_start_model_is_named_by_its_recipe_or_by_its_weights(tmp_path: Path) -> None:
    assert start_model_of(put_record(tmp_path / "ours", recipe="aaaa"))["recipe"] == "aaaa"
    names = []
    for weights in (b"one", b"two", b"one"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        names.append(start_model_of(tmp_path)["recipe"])
    assert names[0] == names[2] != names[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        start_model_of(tmp_path / "empty")


def test_record_says_how_the_model_was_made_and_is_json(tmp_path: Path) -> None:
    start = {"path": "there", "recipe": "11111111"}
    row = {"stop_reason": StopReason.FINISHED, "auc": float("nan"), "loss": np.float32(0.5), "steps": np.int64(3)}
    record = make_record(config(method="ft"), data_sha256="d", split_sha256="s", result=row, start_model=start)
    (tmp_path / "record.json").write_text(json_text(record))
    assert "NaN" not in (tmp_path / "record.json").read_text()
    read = read_record(tmp_path)
    assert read["start_model"] == start
    assert read["result"] == {"stop_reason": "finished", "auc": None, "loss": 0.5, "steps": 3}
    assert TrainConfig.from_flat(read["config"]) == config(method="ft")
    assert stop_reason_at(tmp_path, read["recipe"]) == "finished"
    assert stop_reason_at(tmp_path, "another") is None
    assert stop_reason_at(tmp_path / "none", read["recipe"]) is None


def test_json_text_has_no_number_that_json_lacks() -> None:
    said = {"a": math.inf, "b": [-math.inf, math.nan], "c": (True, None, 1), "d": Path("x")}
    assert json.loads(json_text(said)) == {"a": None, "b": [None, None], "c": [True, None, 1], "d": "x"}


def test_broken_record_is_refused_in_one_line(tmp_path: Path) -> None:
    for text in ("{", "[1]"):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(CheckpointError, match="no readable record.json"):
            read_record(tmp_path)
