"""What a task is: a model, rows in splits, batches and scores, behind one small interface.

A loop that knows only `Task` trains and unlearns on images, on a user's own data, or on text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hamu.data.splits import ForgetSet
from hamu.errors import DataError, unknown
from hamu.models.classifiers import logits_of
from hamu.scores import correct_rows, cross_entropy_rows, entropy_rows

SPLITS = ("retain", "forget", "test", "train")
"""`train` is the retain rows followed by the forget rows."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows ready for the model, on its device."""

    inputs: Tensor
    """(n_rows, ...)."""
    labels: Tensor
    """(n_rows,), int64."""
    n_rows: int


@dataclass(frozen=True, eq=False)
class RowScores:
    """Scores of each row of a batch, (n_rows,) float64 each, on the model's device."""

    loss: Tensor
    """Cross-entropy, nats."""
    correct: Tensor
    """1 where the largest logit is the label's, else 0."""
    entropy: Tensor
    """Of the model's distribution, nats."""
    min_k: Tensor
    """Mean of the lowest log-probabilities of the row's labels, nats; for one label a row that is minus the loss."""


class Task(Protocol):
    """A model family on data with a forget set."""

    name: str
    n_classes: int
    forget_set: ForgetSet
    device: torch.device
    n_bytes: int
    """Of its rows on the device."""

    def n_rows(self, split: str) -> int:
        """Return the number of rows in a split of `SPLITS`; 0 for test rows that are not given."""

    def batch(self, split: str, positions: Tensor) -> Batch:
        """Return the rows at the positions (n,) int64, each in [0, n_rows(split)), of a split."""

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits (n_rows, n_classes) with their graph."""

    def row_scores(self, logits: Tensor, batch: Batch) -> RowScores:
        """Score each row, without a graph."""

    def new_model(self, seed: int) -> nn.Module:
        """Return a model to train from, the same for the same seed, on the task's device."""

    def load_model(self, path: str | Path) -> nn.Module:
        """Return the model saved in a folder, on the task's device.

        Raises:
            CheckpointError: there is none, or it does not fit the task.
        """

    def save_model(self, model: nn.Module, path: str | Path, record: Mapping[str, Any]) -> None:
        """Write a model folder that `load_model` reads, with `record` in its `record.json`."""


class RowsInMemory:
    """The half of a classification task that does not depend on the model: splits, batches and scores.

    The rows lie in memory as two tables, training and test; a batch is an index selection and `prepare`.
    """

    def __init__(
        self,
        *,
        name: str,
        n_classes: int,
        forget_set: ForgetSet,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        device: str | torch.device = "cpu",
    ) -> None:
        """Keep the tables; no copy is made on the CPU, and none is ever written into.

        Args:
            name: of the task, for records.
            n_classes: number of classes.
            forget_set: which rows of `train` to forget and to keep.
            train: inputs (n, ...) and labels (n,) int64.
            test: the same for the test rows, perhaps none.
            device: where batches are made.

        Raises:
            DataError: the forget set names rows that `train` does not have.
        """
        self.name, self.n_classes, self.forget_set = name, n_classes, forget_set
        self.device = torch.device(device)
        self._tables = {
            "train": (train[0].to(self.device), train[1].to(self.device)),
            "test": (test[0].to(self.device), test[1].to(self.device)),
        }
        n_train = len(train[1])
        largest = int(max(forget_set.forget.max(), forget_set.retain.max()))
        if largest >= n_train:
            raise DataError(f"the forget set names row {largest}, but there are {n_train} training rows; draw it anew")
        retain, forget = torch.tensor(forget_set.retain), torch.tensor(forget_set.forget)
        rows = {"retain": retain, "forget": forget, "train": torch.cat((retain, forget))}
        rows["test"] = torch.arange(len(test[1]))
        self.n_bytes = sum(part.nbytes for table in self._tables.values() for part in table)
        self._rows = {split: index.to(self.device) for split, index in rows.items()}

    def n_rows(self, split: str) -> int:
        """Return the number of rows in a split of `SPLITS`; 0 for test rows that are not given.

        Raises:
            DataError: there is no such split.
        """
        return len(self._rows_of(split))

    def batch(self, split: str, positions: Tensor) -> Batch:
        """Return the rows at the positions (n,) int64, each in [0, n_rows(split)), of a split."""
        rows = self._rows_of(split).index_select(0, positions.to(self.device, non_blocking=True))
        inputs, labels = self._tables["test" if split == "test" else "train"]
        return Batch(self.prepare(inputs.index_select(0, rows)), labels.index_select(0, rows), len(rows))

    def prepare(self, inputs: Tensor) -> Tensor:
        """Turn stored rows (n, ...) into what the model takes; as they are unless a task says otherwise."""
        return inputs

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits (n_rows, n_classes) with their graph."""
        return logits_of(model, batch.inputs)

    @torch.no_grad()
    def row_scores(self, logits: Tensor, batch: Batch) -> RowScores:
        """Score each row, without a graph; computed in float32 at least, returned in float64."""
        loss = cross_entropy_rows(logits, batch.labels).double()
        return RowScores(
            loss=loss,
            correct=correct_rows(logits, batch.labels),
            entropy=entropy_rows(logits).double(),
            min_k=-loss,  # a row has one label, and the lowest of one log-probability is itself
        )

    def _rows_of(self, split: str) -> Tensor:
        if split not in self._rows:
            raise DataError(unknown("split", split, SPLITS))
        return self._rows[split]
