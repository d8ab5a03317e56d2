"""`hamu.unlearn` on a model and datasets of one's own: metrics before and after, in place, with clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import hamu


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
