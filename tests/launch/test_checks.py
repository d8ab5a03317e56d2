"""A plan is looked at before anything starts: quickly, however many trials it has."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.checks import check_plan
from launch.plan import Plan, make_plan, read_overrides
from launch.shared import Original
from tune_spaces.space import Space

SPACE = Space(
    name="digits/many",
    summary="360 trials on six forget sets",
    base={"dataset_name": "digits"},
    grids=(
        {
            "unlearning_method": ("hamu-q", "hamu-u"), "constraint_ratio": tuple(index / 10 for index in range(1, 11)),
            "learning_rate": (1e-4, 1e-3, 1e-2), "hard_probability": (0.0, 0.5, 1.0), "seed": (1, 2),
        },
    ),
)  # fmt: skip


def plan_of(root: Path, *assignments: str, with_reference: bool = True) -> Plan:
    return make_plan(SPACE, name="many", overrides=read_overrides(assignments), root=root, with_reference=with_reference)


def test_retain_only_models_beside_an_original_of_the_users_own_are_refused(tmp_path: Path, original: Original) -> None:
    own = f"model_name={original.path}"
    with pytest.raises(
        ConfigError, match="is the original itself, so how to train a retain-only model .* give --no-with-reference"
    ):
        check_plan(plan_of(tmp_path, own))
    check_plan(plan_of(tmp_path, own, with_reference=False))


def test_a_plan_of_360_trials_is_looked_at_in_two_seconds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert len(plan.configs) == 360
    started = time.process_time()
    check_plan(plan)
    assert time.process_time() - started < 2
