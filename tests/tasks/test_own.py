"""A user's own model and data: forms of rows, copies of the model, weights to a folder and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hamu.errors import CheckpointError, DataError
from hamu.tasks.own import OwnTask


class Pairs(Dataset[Any]):
    """Rows (input, label) as a user writes them: label a plain int."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.inputs[number], int(self.labels[number])


def rows(n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, 5, generator=generator), torch.arange(n_rows) % 3


def make_task(**settings: Any) -> OwnTask:
    return OwnTask(rows(9, 0), rows(4, 1), rows(6, 2), **{"model": nn.Linear(5, 3), **settings})


def test_datasets_and_tensors_give_the_same_task() -> None:
    model = nn.Linear(5, 3)
    tasks = [
        OwnTask(form(*rows(9, 0)), form(*rows(4, 1)), form(*rows(6, 2)), model=model)  # type: ignore[operator]
        for form in (lambda *pair: pair, TensorDataset, Pairs)
    ]
    for task in tasks:
        assert task.n_classes == 3
        assert {split: task.n_rows(split) for split in ("retain", "forget", "test", "train")} == {
            "retain": 9,
            "forget": 4,
            "test": 6,
            "train": 13,
        }
        for split, (inputs, labels) in {"retain": rows(9, 0), "forget": rows(4, 1), "test": rows(6, 2)}.items():
            batch = task.batch(split, torch.arange(task.n_rows(split)))
            assert torch.equal(batch.inputs, inputs)
            assert torch.equal(batch.labels, labels)
    assert len({task.forget_set.sha256 for task in tasks}) == 1


def test_hash_follows_the_rows() -> None:
    other = OwnTask(rows(9, 0), rows(4, 5), model=nn.Linear(5, 3))
    assert other.forget_set.sha256 != make_task().forget_set.sha256


def test_bfloat16_rows_are_rows_like_any_others() -> None:
    half = [(inputs.bfloat16(), labels) for inputs, labels in (rows(9, 0), rows(4, 1), rows(4, 5))]
    task = OwnTask(half[0], half[1], model=nn.Linear(5, 3))
    assert task.batch("retain", torch.arange(9)).inputs.dtype == torch.bfloat16
    assert task.forget_set.sha256 != OwnTask(half[0], half[2], model=nn.Linear(5, 3)).forget_set.sha256


def test_task_without_test_rows_has_none() -> None:
    assert OwnTask(rows(9, 0), rows(4, 1), model=nn.Linear(5, 3)).n_rows("test") == 0


def test_new_model_is_a_copy_of_the_users() -> None:
    model = nn.Linear(5, 3)
    task = make_task(model=model)
    copied = task.new_model(0)
    assert torch.equal(copied.weight, model.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        copied.weight.zero_()  # type: ignore[union-attr, operator]
    assert model.weight.abs().sum() > 0


def test_model_function_is_called_with_the_seed() -> None:
    seeds: list[int] = []

    def make(seed: int) -> nn.Module:
        seeds.append(seed)
        return nn.Linear(5, 3)

    task = make_task(model=make)
    one, again = task.new_model(7), task.new_model(7)
    assert seeds == [7, 7]
    assert torch.equal(one.weight, again.weight)  # type: ignore[arg-type]


def test_tied_weights_round_trip(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    model[1].weight = model[0].weight
    task = make_task(model=model)
    task.save_model(model, tmp_path, {"by": "me"})
    loaded = task.load_model(tmp_path)
    batch = task.batch("test", torch.arange(6))
    assert torch.equal(task.logits(loaded, batch), task.logits(model, batch))
    assert (tmp_path / "record.json").is_file()


def test_missing_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    task = make_task()
    with pytest.raises(CheckpointError, match="no model at"):
        task.load_model(tmp_path)
    make_task(model=nn.Linear(5, 4)).save_model(nn.Linear(5, 4), tmp_path, {})
    with pytest.raises(CheckpointError, match="does not fit the model") as error:
        task.load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ((torch.empty(0, 5), torch.empty(0, dtype=torch.int64)), "the forget set is empty"),
        (Pairs(torch.empty(0, 5), torch.empty(0)), "the forget set is empty"),
        ((torch.zeros(2, 4), torch.tensor([0, 1])), r"forget inputs are \(4,\) float32 a row, retain inputs \(5,\)"),
        ((torch.zeros(2, 5), torch.tensor([0.0, 1.0])), "one integer class label a row"),
        ((torch.zeros(2, 5), torch.tensor([0, -1])), "label -1"),
        ((torch.zeros(2, 5),), "is a tuple of 1"),
        ([(torch.zeros(5), 0), ("a", 0)], r"row 1 of forget is not \(tensor, class label\)"),
        (iter([]), "give a dataset with a length"),
        (Pairs(torch.zeros(2, 5), torch.tensor([0, 7])), "n_classes is 3, but there is a label 7"),
    ],
)
def test_rows_of_another_form_are_refused(forget: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        OwnTask(rows(9, 0), forget, model=nn.Linear(5, 3), n_classes=3)
    assert "\n" not in str(error.value)


def test_inputs_of_several_shapes_are_refused() -> None:
    class Ragged(Pairs):
        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            return torch.zeros(number + 1), 0

    with pytest.raises(DataError, match=r"inputs of 3 shapes \(\(1,\), \(2,\), \(3,\)"):
        OwnTask(Ragged(*rows(3, 0)), rows(4, 1), model=nn.Linear(5, 3))
