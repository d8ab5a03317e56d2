"""A constraint that is a share of S: resolved once from the run's first gradients, and then a constraint like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hamu.cli.train import hardness_line
from hamu.errors import ConfigError
from hamu.tasks.own import OwnTask
from hamu.tasks.vision import VisionTask
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.records import Recorder, read_records
from hamu.training.stop import StopReason
from tests.training.processes import Ranks
from tests.training.small_digits import copy_of, ended, unlearning

MODES: dict[str, dict[str, Any]] = {
    "blocks": {}, "full_grad": {"full_grad": True}, "hamu-u": {"method": "hamu-u"}, "clipped": {"max_grad_norm": 0.05},
    "cosine": {"lr_scheduler_type": "cosine"}, "fixed radius": {"hamu_radius": 0.05, "use_lr_radius": False},
}  # fmt: skip


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_a_share_of_s_takes_the_steps_of_the_ratio_that_it_resolves_to(
    mode: str, digits_task: VisionTask, digits_model: nn.Module
) -> None:
    settings = {"continue_on_failed_feasibility": True, "constraint_ratio": 1e-4, **MODES[mode]}
    relative = unlearning(**settings | {"relative_constraint": True, "constraint_ratio": 0.25})
    one, other = copy_of(digits_model), copy_of(digits_model)
    found = ended(TrainingRun(relative, digits_task, one))
    product = found.hardness["gradient_product"]
    assert 0 < product < 1
    # Given in nats, so that ratio * S * lr is rounded as in the run.
    resolved = relative.replace(relative_constraint=False, hamu_constraint=0.25 * relative.lr * product)
    assert ended(TrainingRun(resolved, digits_task, other)).hardness == found.hardness
    assert not equal_weights(one, digits_model)
    assert equal_weights(one, other)  # to the bit


def test_measuring_s_changes_neither_random_state_nor_statistics(digits_task: VisionTask) -> None:
    torch.manual_seed(3)
    with_dropout = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10))
    torch.manual_seed(5)
    run = TrainingRun(unlearning(freeze_batchnorm=False, relative_constraint=True), digits_task, with_dropout)
    state = torch.get_rng_state()
    mean = with_dropout[2].running_mean.clone()
    report = next(iter(run))
    assert report["kind"] == "evaluation"
    assert run._state.hardness["gradient_product"] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(with_dropout[2].running_mean, mean)


@pytest.mark.parametrize("die_at", [0, 7])
def test_s_is_kept_in_the_checkpoint(die_at: int, digits_task: VisionTask, digits_model: nn.Module, tmp_path: Path) -> None:
    config = unlearning(
        relative_constraint=True, constraint_ratio=0.1, save_strategy="steps", save_steps=3, continue_on_failed_feasibility=True
    )

    def run(folder: Path, die: bool = False) -> tuple[TrainingRun, nn.Module]:
        model = copy_of(digits_model)
        made = TrainingRun(config, digits_task, model, checkpoint_path=folder / "checkpoint.pt")
        for row in made:
            if die and row["step"] == die_at:
                made.save()
                break
        return made, model

    whole, whole_model = run(tmp_path / "whole")
    run(tmp_path / "parts", die=True)
    resumed, resumed_model = run(tmp_path / "parts")
    assert whole.result is not None and resumed.result is not None
    assert resumed.result.hardness == whole.result.hardness
    assert equal_weights(resumed_model, whole_model)


@pytest.mark.parametrize(
    ("reason", "ratio", "settings"),
    [
        (StopReason.INFEASIBLE, 0.9, {"distribute_constraint_uniform": True}),
        (StopReason.CRITERION, 1.0, {"stop_on_stopping_criterion": True}),
    ],
)
def test_an_early_end_names_the_share_and_what_it_resolved_to(
    reason: StopReason, ratio: float, settings: dict[str, Any], digits_task: VisionTask, digits_model: nn.Module
) -> None:
    config = unlearning(relative_constraint=True, constraint_ratio=ratio, **settings)
    result = ended(TrainingRun(config, digits_task, copy_of(digits_model)))
    assert result.stop_reason is reason and result.steps == 0 and result.message is not None
    assert f"constraint ratio {ratio:g} of S = {ratio * result.hardness['gradient_product']:.4g} " in result.message


def test_records_hold_the_ratio_as_given_and_that_it_is_a_share(
    digits_task: VisionTask, digits_model: nn.Module, tmp_path: Path
) -> None:
    from hamu.training.record_columns import identity_of

    config = unlearning(relative_constraint=True, constraint_ratio=0.1, epochs=0.2, continue_on_failed_feasibility=True)
    recorder = Recorder(tmp_path, {"trial_id": "one", **identity_of(config)})
    ended(TrainingRun(config, digits_task, copy_of(digits_model), recorder=recorder))
    rows = read_records(tmp_path).to_pylist()
    assert {(row["constraint_ratio"], row["relative_constraint"]) for row in rows} == {(0.1, True)}
    assert identity_of(unlearning())["relative_constraint"] is False
    assert identity_of(TrainConfig.from_flat({"method": "ft"}))["relative_constraint"] is None


def test_the_words_before_a_run_say_what_the_share_resolves_to() -> None:
    config = unlearning(relative_constraint=True, constraint_ratio=0.5)
    hardness = {"gradient_product": 0.004, "max_constraint_ratio": 0.003, "kappa": 0.0}
    assert hardness_line(config, hardness).endswith("(asked for: 0.5 of S = 0.002)\n")
    assert hardness_line(unlearning(constraint_ratio=0.5), hardness).endswith("(asked for: 0.5)\n")


def test_gradients_that_are_not_finite_end_the_run_as_such(digits_task: VisionTask, digits_model: nn.Module) -> None:
    model = copy_of(digits_model)
    with torch.no_grad():
        model[5].bias[0] = torch.nan
    result = ended(TrainingRun(unlearning(relative_constraint=True), digits_task, model))
    assert result.stop_reason is StopReason.NON_FINITE and result.steps == 0


def test_a_share_above_one_and_a_constraint_in_nats_are_refused() -> None:
    with pytest.raises(ConfigError, match="constraint_ratio 1.5 of S .* at most 1"):
        unlearning(relative_constraint=True, constraint_ratio=1.5)
    with pytest.raises(ConfigError, match="relative_constraint .* hamu_constraint 0.01"):
        unlearning(relative_constraint=True, constraint_ratio=None, hamu_constraint=0.01)
    # The other way round this is too much: 1 * lr is more than lr * max_grad_norm^2.
    assert unlearning(relative_constraint=True, constraint_ratio=1.0, max_grad_norm=0.1).constraint_ratio == 1.0
    with pytest.raises(ConfigError, match="larger than radius"):
        unlearning(constraint_ratio=1.0, max_grad_norm=0.1)


def hardness_and_weights(settings: dict[str, Any]) -> tuple[dict[str, float], np.ndarray]:
    """A short run on noise, in one process or on this rank of a group."""
    import torch.distributed as dist

    from hamu.training.groups import Group

    group = Group.current("cpu") if dist.is_initialized() else Group.alone()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    images = torch.randn(40, 12, generator=generator, dtype=torch.float64) + 0.3 * labels[:, None]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    task = OwnTask((images[:24], labels[:24]), (images[24:], labels[24:]), model=model)
    flat = {"method": "hamu-q", "lr": 0.05, "constraint_ratio": 0.2, "batch_size": 8, "epochs": 2, "eval_strategy": "no"}
    config = TrainConfig.from_flat({**flat, "continue_on_failed_feasibility": True, **settings})
    result = ended(TrainingRun(config, task, model, group=group))
    return result.hardness, torch.cat([param.detach().flatten() for param in model.parameters()]).numpy()


@pytest.mark.slow
def test_a_split_pair_resolves_the_share_as_one_process_does(ranks: Ranks) -> None:
    settings = {"relative_constraint": True}
    ((one, weights),) = ranks.run(hardness_and_weights, settings, n=1)
    for two, split_weights in ranks.run(hardness_and_weights, settings, n=2):
        # 1e-12: float64 sums in another order.
        assert two == pytest.approx(one, rel=1e-12)
        assert np.allclose(split_weights, weights, rtol=0, atol=1e-12)
    ((_, fixed),) = ranks.run(hardness_and_weights, {}, n=1)
    assert np.abs(fixed - weights).max() > 1e-6, "the share matters"


def test_unlearn_takes_a_share_of_s(digits_task: VisionTask, digits_model: nn.Module) -> None:
    from hamu import unlearn

    def rows(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        batch = digits_task.batch(split, torch.arange(100))
        return batch.inputs, batch.labels

    settings = {"lr": 0.01, "batch_size": 50, "distribute_constraint_uniform": True, "progress": False}
    result = unlearn(
        copy_of(digits_model), rows("retain"), rows("forget"), constraint_ratio=0.9, relative_constraint=True, **settings
    )
    assert result.stop_reason == "infeasible" and result.message is not None and "0.9 of S = " in result.message
