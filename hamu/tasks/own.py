"""A user's own model and data as a task: any module that maps inputs to logits, and datasets of (input, label)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hamu.data.hashing import sha256_arrays
from hamu.data.splits import ForgetSet
from hamu.errors import CheckpointError, DataError
from hamu.hub import one_line
from hamu.models.classifiers import replaced_files
from hamu.tasks.base import RowsInMemory

Rows = tuple[Tensor, Tensor] | Dataset[Any]
"""A pair of tensors (inputs (n, ...), labels (n,)), or a dataset whose rows are (input, label)."""

_WEIGHTS = "model.safetensors"


class OwnTask(RowsInMemory):
    """Rows and a model that the user brings."""

    def __init__(
        self,
        retain: Rows,
        forget: Rows,
        test: Rows | None = None,
        *,
        model: nn.Module | Callable[[int], nn.Module],
        n_classes: int | None = None,
        name: str = "own",
        device: str | torch.device = "cpu",
    ) -> None:
        """Read all rows into memory, each once: a dataset with random augmentation is frozen at one draw.

        Args:
            retain: rows to keep.
            forget: rows to forget; the same inputs' shape.
            test: unseen rows, or None.
            model: a module that maps inputs (n, ...) to logits (n, classes), or a function of a seed that makes one.
                The module itself is left as it is: `new_model` copies it, whatever the seed.
            n_classes: None: the largest label + 1.
            name: for records.
            device: of batches and models.

        Raises:
            DataError: a set has no rows, or its rows are not (input, class label) with inputs of one shape.
        """
        parts = {"retain": _read(retain, "retain"), "forget": _read(forget, "forget")}
        inputs, labels = parts["retain"]
        parts["test"] = _read(test, "test") if test is not None else (inputs[:0], labels[:0])
        for split, (other, _) in parts.items():
            if other.shape[1:] != inputs.shape[1:] or other.dtype != inputs.dtype:
                raise DataError(f"{split} inputs are {_describe(other)} a row, retain inputs {_describe(inputs)}; give one form")
        n_retain, n_forget = len(labels), len(parts["forget"][1])
        hashes = {split: sha256_arrays(_array(rows[0]), rows[1].numpy()) for split, rows in parts.items()}
        forget_set = ForgetSet(
            forget=np.arange(n_retain, n_retain + n_forget, dtype=np.int64),
            retain=np.arange(n_retain, dtype=np.int64),
            provenance={"rule": "given", "n_rows": n_retain + n_forget, "rows_sha256": hashes},
            # The numbers of the rows say nothing here, so that the hash is of the rows themselves.
            sha256=sha256_arrays(*(np.frombuffer(hashes[split].encode(), np.uint8) for split in ("forget", "retain"))),
        )
        largest = max(int(rows[1].max()) for rows in parts.values() if len(rows[1]))
        if n_classes is not None and largest >= n_classes:
            raise DataError(f"n_classes is {n_classes}, but there is a label {largest}; classes are numbered from 0")
        super().__init__(
            name=name,
            n_classes=n_classes or largest + 1,
            forget_set=forget_set,
            train=(torch.cat((inputs, parts["forget"][0])), torch.cat((labels, parts["forget"][1]))),
            test=parts["test"],
            device=device,
        )
        self._model = model

    def new_model(self, seed: int) -> nn.Module:
        """Return a copy of the user's model, or what the user's function makes of `seed`, on the task's device."""
        if isinstance(self._model, nn.Module):
            return copy.deepcopy(self._model).to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._model(seed).to(self.device)

    def load_model(self, path: str | Path) -> nn.Module:
        """Return the user's model with the weights saved in a folder.

        Raises:
            CheckpointError: there are none, or they are of another model.
        """
        file = Path(path) / _WEIGHTS
        if not file.is_file():
            raise CheckpointError(f"no model at {str(file)!r}; give a folder that save_model wrote")
        model = self.new_model(seed=0)
        try:
            load_safetensors(model, file, device=str(self.device))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{str(file)!r} does not fit the model ({one_line(error)}); give weights saved from it"
            ) from error
        return model

    def save_model(self, model: nn.Module, path: str | Path, record: Mapping[str, Any]) -> None:
        """Write the weights (safetensors) and `record` (as `record.json`) into a folder."""
        with replaced_files(path, record) as scratch:
            save_safetensors(getattr(model, "_orig_mod", model), os.fspath(scratch / _WEIGHTS))


def _read(rows: Rows, split: str) -> tuple[Tensor, Tensor]:
    """All rows as inputs (n, ...) and labels (n,) int64, on the CPU."""
    if isinstance(rows, TensorDataset):
        rows = rows.tensors  # type: ignore[assignment]
    if isinstance(rows, (tuple, list)) and len(rows) == 2 and all(isinstance(part, Tensor) for part in rows):
        inputs, labels = rows[0].detach().cpu(), rows[1].detach().cpu()
    elif isinstance(rows, tuple):
        raise DataError(f"{split} is a tuple of {len(rows)}; give a pair of tensors (inputs, labels), or a dataset")
    else:
        inputs, labels = _stack(rows, split)
    if labels.ndim != 1 or len(labels) != len(inputs) or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"{split} has inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)} {labels.dtype}; "
            "give one integer class label a row"
        )
    if len(labels) == 0:
        raise DataError(f"the {split} set is empty; it needs at least one row: give more rows")
    if int(labels.min()) < 0:
        raise DataError(f"{split} has the label {int(labels.min())}; classes are numbered from 0")
    return inputs, labels.long()


def _stack(rows: Any, split: str) -> tuple[Tensor, Tensor]:
    if not isinstance(rows, Sized) or not hasattr(rows, "__getitem__"):
        raise DataError(f"{split} is a {type(rows).__name__}; give a dataset with a length and rows by number")
    inputs, labels = [], []
    for number in range(len(rows)):
        row = rows[number]
        try:
            one_input, label = row
            inputs.append(torch.as_tensor(one_input))
            labels.append(int(label))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"row {number} of {split} is not (tensor, class label) ({one_line(error)}); give rows of that form, "
                "such as images made tensors by a transform"
            ) from error
    if not inputs:
        raise DataError(f"the {split} set is empty; it needs at least one row: give more rows")
    shapes = {tuple(one.shape) for one in inputs}
    if len(shapes) > 1:
        few = ", ".join(map(str, sorted(shapes)[:3]))
        raise DataError(f"{split} has inputs of {len(shapes)} shapes ({few}, ...); give all rows one shape")
    return torch.stack(inputs).detach().cpu(), torch.tensor(labels, dtype=torch.int64)


def _array(inputs: Tensor) -> np.ndarray:
    """The rows' numbers for hashing; numpy has no bfloat16, so its bits are read as integers."""
    return (inputs.view(torch.int16) if inputs.dtype == torch.bfloat16 else inputs).numpy()


def _describe(inputs: Tensor) -> str:
    return f"{tuple(inputs.shape[1:])} {str(inputs.dtype).removeprefix('torch.')}"
