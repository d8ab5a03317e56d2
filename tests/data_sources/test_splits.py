"""The draw of a forget set: golden index sets of published runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hamu.data.splits import ForgetSet, draw_forget_set
from hamu.errors import ConfigError, DataError

DATA = Path(__file__).resolve().parents[1] / "data"
SPLITS = [case for case in json.loads((DATA / "golden_data.json").read_text())["cases"] if case["group"] == "split"]
ARRAYS = np.load(DATA / "golden_data.npz")
LABELS = np.repeat(np.arange(4), 25)


@pytest.mark.parametrize("case", SPLITS, ids=lambda case: case["name"])
def test_draw_equals_golden_rows_in_golden_order(case: dict[str, Any]) -> None:
    params = case["params"]
    drawn = draw_forget_set(
        ARRAYS[case["labels"]],
        forget_class=params["cls"],
        rho=params["rho"],
        seed=params["seed"],
        split_ratio=params["split_ratio"],
    )
    assert drawn.forget.tolist() == ARRAYS[f"{case['arrays']}/forget"].tolist()
    assert drawn.retain.tolist() == ARRAYS[f"{case['arrays']}/retain"].tolist()
    assert drawn.forget.dtype == drawn.retain.dtype == np.int64


def test_there_are_ten_golden_draws() -> None:
    assert len(SPLITS) == 10


@pytest.mark.parametrize("rho", [0.0, 0.01, 0.3, 0.99, 1.0])
def test_forget_and_retain_rows_are_disjoint_and_cover_the_split(rho: float) -> None:
    drawn = draw_forget_set(LABELS, forget_class=2, rho=rho, seed=7, split_ratio=0.25)
    assert len(drawn.forget) == 25
    assert sorted(np.concatenate((drawn.forget, drawn.retain)).tolist()) == list(range(100))


def test_hash_is_fixed_and_differs_between_draws() -> None:
    drawn = {
        (rho, seed): draw_forget_set(LABELS, forget_class=1, rho=rho, seed=seed).sha256
        for rho in (0.25, 0.5, 1.0)
        for seed in (1, 2)
    }
    assert len(set(drawn.values())) == 6
    # stable across machines and library versions
    assert drawn[0.25, 1] == "925943ceb57890d0e4699b4b56d75ceb09eb50f51947b13596988abc5585fc6c"


def test_provenance_names_the_draw() -> None:
    drawn = draw_forget_set(LABELS, forget_class=np.int64(1), rho=0.5, seed=3)
    assert drawn.provenance == {
        "rule": "class with random rows",
        "forget_class": 1,
        "rho": 0.5,
        "seed": 3,
        "split_ratio": 0.1,
        "n_rows": 100,
    }
    json.dumps(drawn.provenance)


@pytest.mark.parametrize("rho", [-0.1, 1.5, float("nan")])
def test_rho_out_of_range_is_refused(rho: float) -> None:
    with pytest.raises(ConfigError, match=r"rho .* is .*; .* give 0 to 1"):
        draw_forget_set(LABELS, forget_class=0, rho=rho, seed=0)


def test_class_without_rows_is_refused_naming_the_classes() -> None:
    with pytest.raises(DataError, match="forget_class is 17, which has no training rows; give a class of 0 to 3"):
        draw_forget_set(LABELS, forget_class=17, rho=0.0, seed=0)
    with pytest.raises(DataError, match="give one of 0, 5"):
        draw_forget_set(np.array([0, 5]), forget_class=1, rho=0.0, seed=0)


def test_empty_forget_set_is_refused() -> None:
    with pytest.raises(DataError, match="the forget set is empty .*split_ratio 0"):
        draw_forget_set(LABELS, forget_class=0, rho=1.0, seed=0, split_ratio=0.0)
    with pytest.raises(DataError, match="the forget set is empty"):
        ForgetSet(forget=np.empty(0, np.int64), retain=np.arange(3))


def test_empty_retain_set_is_refused() -> None:
    with pytest.raises(DataError, match="the retain set is empty"):
        draw_forget_set(np.zeros(5, np.int64), forget_class=0, rho=0.0, seed=0)


def test_errors_are_one_line() -> None:
    for settings in ({"rho": 2.0}, {"forget_class": 9}, {"split_ratio": -1.0}, {"seed": -1}):
        with pytest.raises((ConfigError, DataError)) as error:
            draw_forget_set(LABELS, **{"forget_class": 0, "rho": 0.0, "seed": 0, **settings})
        assert "\n" not in str(error.value)
