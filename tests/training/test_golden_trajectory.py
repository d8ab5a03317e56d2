"""Ten steps of the engine reproduce two recorded reference trajectories: losses, norms, criteria, branches and every weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hamu.methods.catalog import METHODS
from hamu.methods.combine import StepRules
from hamu.training.batches import BatchPlan
from hamu.training.engine import PairedEngine

DATA = Path(__file__).parent.parent / "data"
GOLDEN = json.loads((DATA / "golden_trajectory.json").read_text())
ARRAYS = np.load(DATA / "golden_trajectory.npz")
BATCH = 32


@dataclass
class Batch:
    images: Tensor
    labels: Tensor


class PlainTask:
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch.images)


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).double()
    names = ("conv.weight", "conv.bias", "fc.weight", "fc.bias")
    with torch.no_grad():
        for param, name in zip(model.parameters(), names, strict=True):
            param.copy_(torch.from_numpy(ARRAYS[f"trajectory/init/{name}"]))
    return model


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]])
def test_ten_steps_equal_the_reference(case: dict[str, Any]) -> None:
    params = case["params"]
    digits = load_digits()
    rows = np.random.default_rng(0).permutation(len(digits.target))[:1437]
    images = torch.from_numpy(digits.images[rows] / 2).unsqueeze(1)
    labels = torch.from_numpy(digits.target[rows].astype(np.int64))
    sets = {role: torch.from_numpy(ARRAYS[f"rows/{role}"].astype(np.int64)) for role in ("retain", "forget")}
    plan = BatchPlan(n_retain=len(sets["retain"]), n_forget=len(sets["forget"]), rows_per_step=BATCH, seed=None)

    model = small_model()
    engine = PairedEngine(PlainTask(), model, METHODS[params["method"]])
    rules = StepRules(constraint=params["constraint"])
    for index, expected in enumerate(case["expected"]["steps"]):
        parts = {}
        for role, positions in (("retain", plan.retain(index)), ("forget", plan.forget(index))):
            taken = sets[role][positions]
            # Two parts of unequal size: accumulation must not change the numbers.
            parts[role] = [Batch(images[part], labels[part]) for part in taken.split(20)]
        engine.gradients(parts["retain"], parts["forget"])
        report = engine.decide(lr=params["lr"], rules=rules, max_grad_norm=params["max_grad_norm"])
        hardness = report.decision.hardness
        for value, key in (
            (report.retain_loss, "retain_loss"),
            (report.forget_loss, "forget_loss"),
            (report.retain_grad_norm, "retain_grad_norm_preclip"),
            (report.forget_grad_norm, "forget_grad_norm_preclip"),
            (hardness.gradient_product, "constraint_grad_norm_product"),
            (hardness.stopping_rhs, "aggregate_stopping_rhs"),
            (hardness.stopping_margin, "stopping_margin"),
        ):
            # 1e-9: float64 sums in another order, over ten steps; the contract asks for 1e-6.
            assert value == pytest.approx(expected[key], rel=1e-9), f"{key} at step {index}"
        assert list(report.decision.branches) == expected["branches"]
        assert list(report.decision.constraints) == pytest.approx(expected["local_constraints"], rel=1e-9)
        engine.apply(report.decision, lr=params["lr"])
        weights = torch.cat([param.detach().flatten() for param in model.parameters()]).numpy()
        np.testing.assert_allclose(weights, ARRAYS[f"{case['arrays']}/weights_after_each_step"][index], rtol=1e-9, atol=1e-12)
