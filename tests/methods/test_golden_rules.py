"""Updates, branches, criteria and splits agree with recorded reference numbers (tests/data/golden_rules.*).

Where the published code departs from its paper, the paper's form is expected: full-gradient mode is one block, and GRU and PCGrad
project where <g_r, g_f> > 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamu import combine_gradients

DATA = Path(__file__).parent.parent / "data"
CASES = json.loads((DATA / "golden_rules.json").read_text())["cases"]
ARRAYS = np.load(DATA / "golden_rules.npz")

TOLERANCE = {"f64": 1e-6, "f32": 2e-5}
"""Relative to the update's norm: 1e-6 is what the contract asks of float64, 2e-5 is float32 rounding through the projection."""


def cases_of(group: str) -> list[Any]:
    return [pytest.param(case, id=f"{case['name']}-{case['dtype']}") for case in CASES if case["group"] == group]


def assert_update_close(update: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    error = float(np.linalg.norm(update.ravel() - expected.ravel()))
    assert error <= TOLERANCE[dtype] * float(np.linalg.norm(expected)), f"off by {error}"


@pytest.mark.parametrize("case", cases_of("hamu_update"))
def test_one_block_update_and_branch_equal_the_reference(case: dict[str, Any]) -> None:
    params, expected = case["params"], case["expected"]
    retain, forget = (torch.from_numpy(ARRAYS[f"{case['arrays']}/{role}_grad"]) for role in ("retain", "forget"))
    step = combine_gradients(
        params["variant"],
        [retain],
        [forget],
        lr=params["lr"],
        constraint=params["constraint"],
        radius=None if params["use_lr_radius"] else params["radius"],
        on_infeasible="stop" if params["stop_on_infeasible"] else "continue",
    )
    # Parallel float32 vectors differ by rounding: the reference then takes a direction made of noise, we call it colinear.
    branch = "colinear" if case["name"].startswith("colinear") else expected["branch"]
    assert step.branches == (branch,)
    assert (step.stop_reason == "infeasible") == expected["nan_in_delta"]
    if expected["nan_in_delta"]:
        assert not step.updates[0].any()
    elif not (case["name"].startswith("colinear") and case["dtype"] == "f32"):
        assert_update_close(step.updates[0].numpy(), ARRAYS[f"{case['arrays']}/update"], case["dtype"])
    logs = expected["logs"]
    scale = params["lr"] if params["use_lr_radius"] else params["radius"] / logs["retain_grad_norm"]
    if not case["name"].startswith("colinear") and not case["name"].startswith("both_zero"):
        rhs = logs["stopping_criterion"] * scale
        assert step.stopping_rhs == pytest.approx(rhs, rel=TOLERANCE[case["dtype"]], abs=0)
        # Orthogonal gradients: what is left of kappa is the rounding of its terms, which ||g_r|| ||g_f|| bounds.
        rounding = float(np.finfo(retain.numpy().dtype).eps) * step.gradient_product
        assert step.kappa == pytest.approx(logs["gradient_dot_product"], rel=TOLERANCE[case["dtype"]], abs=rounding)


@pytest.mark.parametrize("case", cases_of("optimizer"))
def test_blocks_share_the_constraint_as_the_reference(case: dict[str, Any]) -> None:
    params, expected = case["params"], case["expected"]
    pair = []
    for role in ("retain", "forget"):
        flat, start = torch.from_numpy(ARRAYS[f"{case['inputs']}/{role}"]), 0
        tensors = []
        for shape in case["shapes"]:
            count = int(np.prod(shape))
            tensors.append(flat[start : start + count].view(shape))
            start += count
        pair.append(tensors)
    mode = params["mode"]
    step = combine_gradients(
        params["variant"],
        *pair,
        lr=params["lr"],
        constraint=params["constraint"],
        radius=params["radius"],
        split=mode.removesuffix("_unnorm") if mode != "full_grad" else "grad_norm",
        full_grad=mode == "full_grad",
        normalize_split=not mode.endswith("_unnorm"),
        on_infeasible="stop" if params["stop_on_failed_feasibility"] else "continue",
    )
    tolerance = TOLERANCE[case["dtype"]]
    logs = expected["preprocess_logs"]
    assert step.stopping_rhs == pytest.approx(logs["aggregate_stopping_rhs"][0], rel=tolerance, abs=0)
    assert step.stopping_margin == pytest.approx(logs["stopping_margin"][0], rel=20 * tolerance, abs=0)
    if "constraint_grad_norm_product" in logs:
        assert step.gradient_product == pytest.approx(logs["constraint_grad_norm_product"][0], rel=tolerance, abs=0)
    if expected["stop_reason"] == "failed_feasibility":  # the reference ends at its first infeasible block
        assert step.stop_reason == "infeasible" and step.branches[0] == "infeasible"
        assert all(not update.any() for update in step.updates)
        return
    assert step.stop_reason is None
    assert list(step.branches) == expected["branches"]
    assert list(step.constraints) == pytest.approx(expected["local_constraints"], rel=tolerance, abs=0)
    key = "weight_delta_concatenated" if f"{case['arrays']}/weight_delta_concatenated" in ARRAYS else "weight_delta"
    update = np.concatenate([update.numpy().ravel() for update in step.updates])
    assert_update_close(update, ARRAYS[f"{case['arrays']}/{key}"], case["dtype"])
    if key == "weight_delta":
        assert step.predicted_retain_change == pytest.approx(expected["dot_delta_retain"], rel=tolerance, abs=0)
        assert step.predicted_forget_change == pytest.approx(expected["dot_delta_forget"], rel=tolerance, abs=0)


@pytest.mark.parametrize("case", cases_of("baseline"))
def test_baselines_equal_the_papers_form(case: dict[str, Any]) -> None:
    arrays = {name: torch.from_numpy(ARRAYS[f"{case['arrays']}/{name}"]) for name in ("retain_grad", "forget_grad")}
    kl = {name: torch.from_numpy(ARRAYS[f"{case['arrays']}/{name}"]) for name in ("retain_kl_grad", "forget_kl_grad")}
    scrub_retain = 0.001 * kl["retain_kl_grad"] + 0.99 * arrays["retain_grad"]
    lr = 0.5
    for method, retain, forget, key in (
        ("gdiff", arrays["retain_grad"], arrays["forget_grad"], "out_gdiff"),
        ("kl", kl["retain_kl_grad"], arrays["forget_grad"], "out_kl"),
        ("scrub", scrub_retain, kl["forget_kl_grad"], "out_scrub_a0.001_g0.99"),
        ("gru", arrays["retain_grad"], arrays["forget_grad"], "own_gru_projected_on_conflict"),
        ("pcgrad", arrays["retain_grad"], arrays["forget_grad"], "own_pcgrad_projected_on_conflict"),
    ):
        step = combine_gradients(method, [retain], [forget], lr=lr)
        assert step.branches == ("combined",)
        assert_update_close(step.updates[0].numpy(), -lr * ARRAYS[f"{case['arrays']}/{key}"], "f64")
