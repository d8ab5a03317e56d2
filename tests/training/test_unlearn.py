"""`hamu.unlearn` on a model and datasets of one's own: metrics before and after, in place, with clear errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import hamu
from hamu.training.config import KNOWN
from hamu.training.unlearn import READ_SETTINGS

RATIO_0: dict[str, dict[str, float]] = {"hamu-q": {"constraint_ratio": 0.0}, "kl": {}}


def blobs(n: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three Gaussian blobs in the plane; class 2 will be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 2.0], [2.0, 0.0], [-2.0, -2.0]])
    return centres[labels] + 0.7 * torch.randn(n, 2, generator=generator), labels


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    inputs, labels = blobs(600, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):  # not to convergence: gradients of a converged model leave no feasible step
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def test_a_users_module_and_datasets_are_unlearned_in_place(model: nn.Module) -> None:
    inputs, labels = blobs(600, seed=0)
    is_forget = labels == 2
    retain = TensorDataset(inputs[~is_forget], labels[~is_forget])
    forget = TensorDataset(inputs[is_forget], labels[is_forget])
    test = blobs(90, seed=1)
    probe = hamu.unlearn(model, retain, forget, method="hamu-q", constraint_ratio=0.0, lr=1e-9, epochs=1, progress=False)
    largest = probe.hardness["max_constraint_ratio"]
    report = hamu.unlearn(
        model, retain, forget, test=test, method="hamu-q", constraint_ratio=0.5 * largest, lr=1.0, epochs=10, batch_size=64
    )
    assert report.after["forget_loss"] > report.before["forget_loss"] + 0.1
    assert report.after["retain_accuracy"] > 0.95 and "test_accuracy" in report.after
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(inputs[is_forget]), labels[is_forget]).item()
    assert loss == pytest.approx(report.after["forget_loss"], rel=1e-5), "the model itself was changed"


def test_bad_input_is_said_before_any_work(model: nn.Module) -> None:
    rows = blobs(30, seed=0)
    with pytest.raises(hamu.ConfigError, match="did you mean 'hamu-q'"):
        hamu.unlearn(model, rows, rows, method="hamuq", lr=0.1)
    with pytest.raises(hamu.ConfigError, match="did you mean 'constraint_ratio'"):
        hamu.unlearn(model, rows, rows, lr=0.1, constraint_ration=0.5)
    with pytest.raises(hamu.ConfigError, match="larger than radius"):
        hamu.unlearn(model, rows, rows, lr=0.1, constraint_ratio=3.0)
    with pytest.raises(hamu.DataError, match="forget"):
        hamu.unlearn(model, rows, (rows[0][:0], rows[1][:0]), lr=0.1, constraint_ratio=0.1)


@pytest.mark.parametrize("method", ["hamu-q", "kl"])
def test_the_modules_mode_and_gradients_are_left_as_they_were(model: nn.Module, method: str) -> None:
    inputs, labels = blobs(60, seed=0)
    rows = (inputs, labels)
    model.train()
    model[1].eval()  # type: ignore[index]
    model.zero_grad()
    mine = torch.ones_like(model[0].weight)  # type: ignore[index]
    model[0].weight.grad = mine  # type: ignore[index]
    hamu.unlearn(model, rows, rows, method=method, lr=0.01, progress=False, **RATIO_0[method])
    assert (model.training, model[0].training, model[1].training) == (True, True, False)  # type: ignore[index]
    assert model[0].weight.grad is mine  # type: ignore[index]
    assert torch.equal(mine, torch.ones_like(mine))
    assert model[2].weight.grad is None  # type: ignore[index]


def test_a_run_that_is_interrupted_leaves_mode_and_gradients_too(model: nn.Module) -> None:
    rows = blobs(60, seed=0)
    model.train().zero_grad()

    def interrupt(report: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hamu.unlearn(model, rows, rows, method="ft", lr=0.01, on_report=interrupt)
    assert model.training
    assert all(param.grad is None for param in model.parameters())


def test_a_fixed_radius_is_checked_with_the_models_own_number_of_blocks(model: nn.Module) -> None:
    """Four tensors: the limit is radius * sqrt(4) * max_grad_norm, not that of a network known by name."""
    rows = blobs(30, seed=0)
    with pytest.raises(hamu.ConfigError, match=r"sqrt\(4 blocks\)"):
        hamu.unlearn(model, rows, rows, lr=0.1, hamu_radius=0.01, hamu_constraint=0.03)
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(35)), nn.Linear(2, 3))  # 72 tensors, more than resnet20's 65
    report = hamu.unlearn(many, rows, rows, lr=0.1, hamu_radius=0.01, hamu_constraint=0.083, epochs=0.01)
    assert report.stop_reason in ("infeasible", "finished")


def test_settings_without_effect_are_warned_of(model: nn.Module) -> None:
    rows = blobs(30, seed=0)
    with pytest.warns(UserWarning, match="weight_decay 0.1: no effect on plain SGD") as caught:
        hamu.unlearn(model, rows, rows, method="ft", lr=0.01, weight_decay=0.1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="use_optimizer: AdamW changes HAMU's step"):
        hamu.unlearn(model, rows, rows, lr=1e-3, constraint_ratio=0.0, use_optimizer=True)


def test_plain_settings_are_not_warned_of(model: nn.Module) -> None:
    rows = blobs(30, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hamu.unlearn(model, rows, rows, lr=1e-3, constraint_ratio=0.0, seed=3, batch_size=16, max_grad_norm=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"forget_class": 3}, {"hard_probability": 0.0}, {"rho": 0.5}, {"model_name": "resnet20"}, {"dataset_name": "digits"},
        {"output_dir": "here"}, {"resume": True}, {"save_strategy": "epoch"}, {"device": "cpu"}, {"k_pct": 0.2},
        {"add_forget_to_train": True}, {"num_workers": 1}, {"eval_on_start": True}, {"use_wandb": True}, {"dry_run": True},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_that_own_rows_and_an_own_model_do_not_read_are_refused(model: nn.Module, settings: dict[str, Any]) -> None:
    rows = blobs(30, seed=0)
    ((name, value),) = settings.items()
    with pytest.raises(hamu.ConfigError, match=f"{name} {value!r} is not read by hamu.unlearn.*leave it out") as caught:
        hamu.unlearn(model, rows, rows, lr=0.1, **settings)
    assert "\n" not in str(caught.value)


def test_every_setting_that_is_read_is_known() -> None:
    assert set(KNOWN) >= READ_SETTINGS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "none"}, "method 'none' trains"),
        ({"learning_rate": 0.1}, "learning_rate is given twice"),
        ({"unlearning_method": "ga"}, "unlearning_method is given twice"),
        ({"target_test_accuracy": 0.5}, "target_test_accuracy 0.5 needs test rows"),
    ],
)
def test_a_setting_that_says_nothing_or_another_thing_twice_is_refused(
    model: nn.Module, settings: dict[str, Any], message: str
) -> None:
    rows = blobs(30, seed=0)
    with pytest.raises(hamu.ConfigError, match=message):
        hamu.unlearn(model, rows, rows, lr=0.1, **settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Flatten(), "has 0 parameters and none that requires a gradient"),
        (lambda: nn.Linear(2, 3).requires_grad_(False), "has 2 parameters and none that requires a gradient"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3).double()), "float32 on cpu and float64 on cpu"),
        (lambda: torch.nn.functional.relu, "the model is a "),
    ],
    ids=["no-parameters", "all-frozen", "mixed-types", "no-module"],
)
def test_a_model_that_cannot_be_unlearned_is_refused_in_one_line(build: Callable[[], Any], message: str) -> None:
    rows = blobs(30, seed=0)
    with pytest.raises(hamu.ConfigError, match=message) as caught:
        hamu.unlearn(build(), rows, rows, method="ft", lr=0.1)
    assert "\n" not in str(caught.value)


def test_frozen_parameters_of_another_type_stay_as_they_are() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 4).double().requires_grad_(False)
            self.head = nn.Linear(4, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(inputs.double()).float())

    model, rows = Head(), blobs(30, seed=0)
    body, head = model.body.weight.clone(), model.head.weight.clone()
    hamu.unlearn(model, rows, rows, method="ga", lr=0.1)
    assert torch.equal(model.body.weight, body)
    assert not torch.equal(model.head.weight, head)
