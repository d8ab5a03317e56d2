"""How many trials are left is counted once: for a dry run, the first and the last line of a sweep, and the runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.machine import Machine, Slots
from launch.plan import Plan, make_plan
from launch.plan_text import plan_text
from launch.standing import lacking_references, left_words, resume_command, standing
from tune_spaces.search import SearchSettings
from tune_spaces.space import load_space


def plan_of(root: Path, *, with_reference: bool = False, **search: Any) -> Plan:
    overrides = {"unlearning_method": ("ft",), "learning_rate": tuple(0.01 * i for i in range(1, 7))}
    space = load_space("digits/quickstart")
    settings = SearchSettings(**search)
    return make_plan(space, name="mine", overrides=overrides, root=root, search=settings, with_reference=with_reference)


def rows_of(plan: Plan, *statuses: str) -> dict[str, dict[str, Any]]:
    return {trial.trial_id: {"status": status} for trial, status in zip(plan.trials, statuses, strict=False)}


@pytest.mark.parametrize(
    ("statuses", "n_ended", "n_left", "words"),
    [
        ((), 0, 3, "3 of 3 trials to run (of 6, picked by tpe)"),
        (("dropped", "dropped", "finished"), 1, 2, "2 of 3 trials to run (of 6, picked by tpe), 2 dropped before"),
        (("dropped",) * 4 + ("finished",), 1, 1, "1 of 2 trials to run (of 6, picked by tpe), 4 dropped before"),
        (("failed", "pruned", "finished"), 1, 2, "2 of 3 trials to run (of 6, picked by tpe)"),
        (("finished",) * 5, 5, 0, "0 of 5 trials to run (of 6, picked by tpe)"),
    ],
)
def test_dropped_trials_use_up_none_of_a_searchs_budget(
    tmp_path: Path, statuses: tuple[str, ...], n_ended: int, n_left: int, words: str
) -> None:
    plan = plan_of(tmp_path, name="tpe", trials=3)
    stand = standing(plan, rows_of(plan, *statuses))
    assert (stand.n_ended, stand.n_left, stand.n_total) == (n_ended, n_left, n_ended + n_left)
    assert left_words(plan, stand) == words


def test_dropped_trials_are_no_part_of_a_grids_total(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    stand = standing(plan, rows_of(plan, "dropped", "finished"))
    assert left_words(plan, stand) == "4 of 5 trials to run, 1 dropped before"
    machine = Machine(cpus=2, cpu_name="a core", memory_bytes=2**30, gpus=0)
    lines = plan_text(plan, machine=machine, slots=Slots(count=2), folder="here", stand=stand).splitlines()
    assert "finished   1 of 5; 1 dropped as infeasible; the others would run" in lines


def test_trials_that_cannot_be_run_are_not_left_unless_they_have_ended(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    out = [trial.trial_id for trial in plan.trials[:3]]
    stand = standing(plan, rows_of(plan, "finished", "dropped"), out)
    assert (stand.n_ended, stand.n_left) == (1, 3)


def test_a_model_to_compare_with_is_lacking_until_it_was_measured(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, with_reference=True)
    [key] = plan.references
    ids = [trial.trial_id for trial in plan.trials]
    assert lacking_references(plan, {}, ids) == lacking_references(plan, {key: {"error": "x"}}, ids) == [key]
    assert lacking_references(plan, {key: {"path": "there", "result": {"forget_loss": 1.0}}}, ids) == []
    assert lacking_references(plan, {}, []) == lacking_references(plan_of(tmp_path), {}, ids) == []


def test_the_command_that_goes_on_names_another_root(tmp_path: Path) -> None:
    assert resume_command(plan_of(Path("artifacts"))) == "python launch/sweep.py --resume mine"
    assert resume_command(plan_of(tmp_path)) == f"python launch/sweep.py --resume mine --storage-path {tmp_path}"
