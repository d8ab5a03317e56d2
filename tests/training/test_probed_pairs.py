"""What a probe says of a run's first steps is what the run then finds: no trial is ruled out that would take its first step."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hamu.errors import ConfigError
from hamu.methods.names import STOPPING_RULES
from hamu.tasks.own import OwnTask
from hamu.tasks.vision import VisionTask
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.probe import ProbedPairs, probe_run
from hamu.training.stop import StopReason
from tests.training.small_digits import copy_of, ended, unlearning

N_PAIRS = 3
STOPS = (StopReason.CRITERION, StopReason.INFEASIBLE)
MODES: dict[str, dict[str, Any]] = {
    "blocks": {},
    "full_grad": {"full_grad": True},
    "uniform": {"distribute_constraint_uniform": True},
    "softmax": {"distribute_constraint_softmax_dp": True, "continue_on_failed_feasibility": True},
    "steps on": {"continue_on_failed_feasibility": True},
    "soft": {"stopping_softness": 0.2, "continue_on_failed_feasibility": True},
    "patient": {"stopping_patience": 2},
    "fixed radius": {"hamu_radius": 0.002, "use_lr_radius": False, "continue_on_failed_feasibility": True},
    "infeasible alone": {"stop_on_stopping_criterion": False},
}


@pytest.fixture(scope="module")
def probed(digits_task: VisionTask, digits_model: nn.Module) -> ProbedPairs:
    return probe_run(TrainingRun(unlearning(), digits_task, copy_of(digits_model)), N_PAIRS)


def stops_at_0(config: TrainConfig, task: VisionTask, model: nn.Module) -> bool:
    run = TrainingRun(config, task, copy_of(model))
    for _ in run:
        if run.step:
            return False
    assert run.result is not None
    return run.result.stop_reason in STOPS


def every_mode(*fast: tuple[str, str]) -> pytest.MarkDecorator:
    """All modes of both methods; all but a few only in `make test-all`."""
    return pytest.mark.parametrize(
        ("mode", "method"),
        [
            pytest.param(mode, method, marks=() if (mode, method) in fast else pytest.mark.slow)
            for mode in MODES
            for method in ("hamu-q", "hamu-u")
        ],
    )


@every_mode(("blocks", "hamu-u"), ("full_grad", "hamu-q"), ("patient", "hamu-q"))
def test_a_trial_that_fires_at_pair_0_ends_at_step_0_and_no_other_does(
    mode: str, method: str, probed: ProbedPairs, digits_task: VisionTask, digits_model: nn.Module
) -> None:
    settings = {"method": method, "stop_on_stopping_criterion": True, "epochs": 0.2, "eval_at_ends": False, "eval_strategy": "no"}
    seen = set()
    largest = probed.largest_ratio(unlearning(**settings | MODES[mode]))[0]
    near = [largest * factor for factor in (1 - 1e-6, 1 + 1e-6, 1 + 1e-2)] if 0 < largest < 0.45 else []
    rules = STOPPING_RULES if mode != "soft" else ("aggregate", "feasible")
    for rule, is_relative in itertools.product(rules, (False, True)):
        shares = [0.1, 0.7, 1.0] if is_relative else [0.0, 1e-3, 0.45, *near]
        for ratio in shares:
            config = unlearning(**settings | MODES[mode], stopping_rule=rule, relative_constraint=is_relative).replace(
                constraint_ratio=ratio
            )
            is_stopped = stops_at_0(config, digits_task, digits_model)
            seen.add(is_stopped)
            assert probed.fires(config, slack=0)[0] == is_stopped, (rule, ratio, is_relative)
            assert not probed.fires(config)[0] or is_stopped
    assert seen == {False, True}, "the case must see both"


def test_the_default_slack_lets_a_trial_at_the_bound_run(probed: ProbedPairs) -> None:
    config = unlearning(stop_on_stopping_criterion=True, continue_on_failed_feasibility=True)
    largest = probed.largest_ratio(config)[0]
    just_above, well_above = (config.replace(constraint_ratio=largest * factor) for factor in (1 + 1e-5, 1 + 1e-2))
    assert probed.fires(just_above, slack=0)[0] and not probed.fires(just_above)[0]
    assert probed.fires(well_above)[0]


@pytest.mark.parametrize("settings", [{}, {"full_grad": True}, {"method": "hamu-u", "hamu_radius": 0.01, "use_lr_radius": False}])
def test_pair_0_has_the_hardness_of_the_first_step_to_the_bit(
    settings: dict[str, Any], digits_task: VisionTask, digits_model: nn.Module
) -> None:
    config = unlearning(constraint_ratio=1e-4, **settings)
    pairs = probe_run(TrainingRun(config, digits_task, copy_of(digits_model)), 1)
    hardness = ended(TrainingRun(config, digits_task, copy_of(digits_model))).hardness
    assert pairs.product[0] == hardness["gradient_product"] == pairs.product_of(config)
    assert pairs.feasible_bound[0] == hardness["max_constraint_ratio"]


def test_every_pair_is_that_of_its_step_at_the_first_weights(digits_task: VisionTask, digits_model: nn.Module) -> None:
    """A run that never moves sees the same gradients: its learning rate is lost in the weights' rounding."""
    config = unlearning(lr=1e-12, constraint_ratio=1e-6, stop_on_stopping_criterion=False)
    pairs = probe_run(TrainingRun(config, digits_task, copy_of(digits_model)), N_PAIRS)
    rows = [row for row in TrainingRun(config, digits_task, copy_of(digits_model)) if row["kind"] == "step"][:N_PAIRS]
    # 1e-5: BatchNorm's and float32's rounding after weights moved by 1e-12.
    assert pairs.product == pytest.approx([row["gradient_product"] for row in rows], rel=1e-5)
    assert pairs.whole_kappa == pytest.approx([row["kappa"] for row in rows], rel=1e-5)
    assert np.allclose(pairs.aggregate_bound, [row["stopping_rhs"] / config.lr for row in rows], rtol=1e-5)
    assert len(set(pairs.product)) == N_PAIRS, "the batches differ"


def test_nothing_is_changed_by_a_probe(digits_task: VisionTask) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10))
    twin = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10))
    twin.load_state_dict(model.state_dict())
    config = unlearning(freeze_batchnorm=False, constraint_ratio=1e-4, continue_on_failed_feasibility=True)
    results = []
    for net, is_probed in ((model, True), (twin, False)):
        torch.manual_seed(7)
        run = TrainingRun(config, digits_task, net)
        if is_probed:
            probe_run(run, N_PAIRS)
        results.append(ended(run))
    assert results[0].hardness == results[1].hardness
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_random_passes_rule_nothing_out(digits_task: VisionTask) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    config = unlearning(constraint_ratio=0.99, distribute_constraint_uniform=True)
    pairs = probe_run(TrainingRun(config, digits_task, model), 2)
    assert pairs.is_random and pairs.fires(config) == [False, False]
    model[2].p = 0.0
    pairs = probe_run(TrainingRun(config, digits_task, model), 2)
    assert not pairs.is_random and pairs.fires(config) == [True, True]


def test_blocks_have_names_angles_and_lengths(probed: ProbedPairs, digits_model: nn.Module) -> None:
    assert probed.blocks == tuple(name for name, _ in digits_model.named_parameters())
    shape = (N_PAIRS, len(probed.blocks))
    assert probed.retain_norm.shape == probed.forget_norm.shape == probed.kappa.shape == probed.angle.shape == shape
    product = probed.retain_norm * probed.forget_norm
    assert np.allclose(probed.kappa, product * np.cos(probed.angle), rtol=0, atol=1e-12)
    assert np.allclose(probed.product, product.sum(axis=1))
    assert (np.sqrt((probed.retain_norm**2).sum(axis=1)) <= 1).all(), "after clipping"
    assert np.allclose(probed.aggregate_bound, (product * np.sin(probed.angle)).sum(axis=1))
    whole = np.sqrt((probed.retain_norm**2).sum(axis=1) * (probed.forget_norm**2).sum(axis=1))
    assert np.allclose(probed.whole_kappa, whole * np.cos(probed.whole_angle))
    assert (probed.aggregate_bound <= probed.feasible_bound).all() and (probed.feasible_bound <= probed.product).all()


def test_a_result_is_pickled_and_read_without_torch(probed: ProbedPairs, tmp_path: Path) -> None:
    path = tmp_path / "pairs"
    path.write_bytes(pickle.dumps(probed))
    code = (
        "import pickle, sys; pairs = pickle.load(open(sys.argv[1], 'rb')); "
        "print(len(pairs), pairs.angle.shape, pairs.whole_angle.shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == f"{N_PAIRS} {probed.kappa.shape} ({N_PAIRS},) False".split()


def test_a_zero_gradient_has_no_angle_and_no_bound() -> None:
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    rows = torch.zeros(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    run = TrainingRun(unlearning(batch_size=6), OwnTask(rows, rows, model=model), model)
    pairs = probe_run(run, 1)
    assert np.isnan(pairs.angle).any() and pairs.feasible_bound[0] == pytest.approx(0, abs=1e-6)
    assert all(pairs.fires(unlearning(batch_size=6)))


def test_a_run_gives_no_more_pairs_than_it_has_steps_and_only_of_hamu(digits_task: VisionTask, digits_model: nn.Module) -> None:
    short = TrainingRun(unlearning(epochs=0.2), digits_task, copy_of(digits_model))
    assert len(probe_run(short, 50)) == short.total_steps
    with pytest.raises(ConfigError, match="n_pairs must be at least 1, got 0"):
        probe_run(short, 0)
    other = TrainingRun(TrainConfig.from_flat({"method": "ft"}), digits_task, copy_of(digits_model))
    with pytest.raises(ConfigError, match="'ft' has no constraint"):
        probe_run(other, 1)
    with pytest.raises(ConfigError, match="'kl' has no constraint"):
        probe_run(short, 1).fires(TrainConfig.from_flat({"method": "kl"}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "hamu-u"},
        {"full_grad": True},
        {"hamu_radius": 0.01, "use_lr_radius": False, "constraint_ratio": 0.01},
        {"method": "hamu-u", "hamu_radius": 0.01, "use_lr_radius": False, "constraint_ratio": 0.01},
    ],
)
def test_the_bounds_of_the_blocks_add_up_to_the_feasible_bound_and_follow_its_formula(
    settings: dict[str, Any], digits_task: VisionTask, digits_model: nn.Module
) -> None:
    config = unlearning(**settings)
    pairs = probe_run(TrainingRun(config, digits_task, copy_of(digits_model)), 2)
    is_whole = config.method.full_grad
    assert pairs.block_bounds.shape == (2, 1 if is_whole else len(pairs.blocks))
    assert np.allclose(pairs.block_bounds.sum(axis=1), pairs.feasible_bound, rtol=1e-12)
    if is_whole:
        return
    free, bound = pairs.retain_norm, pairs.forget_norm
    if config.method_name == "hamu-u":
        free, bound = bound, free
    radius = free if config.radius is None else config.radius / config.lr
    sin = np.where(pairs.kappa > 0, np.sin(pairs.angle), 1.0)
    assert (pairs.kappa > 0).any() and (pairs.kappa <= 0).any(), "both branches are seen"
    # 1e-6: the sine of a small angle, by way of arctan2, against the root of its square.
    assert np.allclose(pairs.block_bounds, radius * bound * sin, rtol=1e-6, atol=0)


def test_the_angle_of_blocks_together_is_that_of_their_gradients_joined(probed: ProbedPairs) -> None:
    assert np.array_equal(probed.angle_of(slice(None)), probed.whole_angle)
    for index in (0, len(probed.blocks) - 1):
        assert np.array_equal(probed.angle_of(np.array([index])), probed.angle[:, index])
    some = np.array([0, 3, 5])
    lengths = [np.sqrt((norm[:, some] ** 2).sum(axis=1)) for norm in (probed.retain_norm, probed.forget_norm)]
    assert np.allclose(np.cos(probed.angle_of(some)) * lengths[0] * lengths[1], probed.kappa[:, some].sum(axis=1), atol=1e-12)
