"""The rows of each step: full forget batches, short last retain batches, equal compute, the published order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hamu.training.batches import BatchPlan

PLAN = BatchPlan(n_retain=1298, n_forget=139, rows_per_step=128, seed=42)


def test_an_epoch_covers_every_retain_row_once() -> None:
    assert PLAN.steps_per_epoch == 11
    rows = torch.cat([PLAN.retain(step) for step in range(PLAN.steps_per_epoch)])
    assert sorted(rows.tolist()) == list(range(1298))
    assert len(PLAN.retain(10)) == 1298 - 10 * 128, "a short last batch is used as it is"
    assert torch.equal(PLAN.retain(0), PLAN.retain(11)), "the order is drawn once"


def test_forget_batches_are_full_and_cycle_by_rows() -> None:
    rows = torch.cat([PLAN.forget(step) for step in range(139)])
    assert all(len(PLAN.forget(step)) == 128 for step in range(20))
    assert torch.bincount(rows).tolist() == [128] * 139


def test_a_forget_set_smaller_than_a_batch_still_fills_it() -> None:
    plan = BatchPlan(n_retain=10, n_forget=3, rows_per_step=8, seed=None)
    assert plan.forget(0).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_methods_of_one_role_see_as_many_rows_a_step_as_a_pair() -> None:
    for step in range(PLAN.steps_per_epoch):
        assert len(PLAN.retain_alone(step)) == len(PLAN.forget_alone(step)) == 2 * 128


@pytest.mark.parametrize("name", ["class0_seed42_rho0.0", "class3_seed42_rho1.0"])
def test_the_order_is_that_of_published_runs(name: str) -> None:
    data = np.load(Path(__file__).parent.parent / "data" / "golden_orders.npz")
    retain, forget = data[f"{name}/retain"], data[f"{name}/forget"]
    plan = BatchPlan(n_retain=len(retain), n_forget=len(forget), rows_per_step=len(retain), seed=42)
    assert retain[plan.retain(0).numpy()].tolist() == data[f"{name}/retain_shuffled"].tolist()
    plan = BatchPlan(n_retain=len(retain), n_forget=len(forget), rows_per_step=len(forget), seed=42)
    assert forget[plan.forget(0).numpy()].tolist() == data[f"{name}/forget_shuffled"].tolist()
