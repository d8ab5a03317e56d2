"""What a task is: a model, rows in splits, batches and scores, behind one small interface.

A loop that knows only `Task` trains and unlearns on images, on a user's own data, or on text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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


class Data(Protocol):
    """Rows as they are loaded, before a model's view of them: numpy and plain Python, so that processes can share them."""

    @property
    def name(self) -> str:
        """Of the dataset, for records."""

    @property
    def sha256(self) -> str:
        """64 hex digits over the rows."""

    @property
    def n_bytes(self) -> int:
        """Of the rows in memory."""


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
    """Scores of each row of a batch, (n_rows,) float64 each, on the model's device; of several labels a row, their means."""

    loss: Tensor
    """Cross-entropy, nats; exp(-loss) is the row's mean probability, geometric over its labels."""
    correct: Tensor
    """1 where the largest logit is the label's, else 0; of several labels the share of them."""
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
    can_compile: bool
    """Whether its batches are of few shapes, so that compiling the model pays."""

    def n_rows(self, split: str) -> int:
        """Return the number of rows in a split of `SPLITS`; 0 for test rows that are not given."""

    def batch(self, split: str, positions: Tensor) -> Any:
        """Return the rows at the positions (n,) int64, each in [0, n_rows(split)), of a split; it has `labels` and `n_rows`."""

    def parts(self, split: str, positions: Tensor, size: int) -> list[Tensor]:
        """Share positions (n,) out to passes of `size` rows at most; which rows go together is the task's to choose."""

    def probe_rows(self, split: str, n: int) -> Tensor:
        """Return the positions of n rows of the size that `n_probes` counts in."""

    def n_probes(self, split: str, size: int) -> float:
        """Return how many rows of `probe_rows` take as much memory as the largest pass of a step of `size` rows."""

    def logits(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Return the logits (n_labels, n_classes) with their graph, of a model or of what `frozen` has made."""

    def row_scores(self, model: nn.Module, batch: Any) -> RowScores:
        """Score each row, without a graph."""

    @property
    def has_extra_metrics(self) -> bool:
        """Whether `extra_metrics` has something to measure."""

    def extra_metrics(self, model: nn.Module) -> dict[str, float]:
        """Measure what is asked for beside `row_scores`, once at the end of a run; nothing of most tasks."""

    def frozen(self, model: nn.Module) -> Callable[..., Any]:
        """Return the model as it is now, for `logits`: later changes of the weights do not reach it."""

    def new_model(self, seed: int) -> nn.Module:
        """Return a model to train from, the same for the same seed, on the task's device."""

    def load_model(self, path: str | Path) -> nn.Module:
        """Return the model saved in a folder, on the task's device.

        Raises:
            CheckpointError: there is none, or it does not fit the task.
        """

    def save_model(self, model: nn.Module, path: str | Path, record: Mapping[str, Any]) -> None:
        """Write a model folder that `load_model` reads, with `record` in its `record.json`."""

    def facts(self) -> dict[str, Any]:
        """What a model must have been made for to fit: the arguments of `check_start` that the rows decide."""


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

    has_extra_metrics = False
    can_compile = True

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

    def parts(self, split: str, positions: Tensor, size: int) -> list[Tensor]:
        """Share positions out to passes in their order."""
        return list(positions.split(size))

    def probe_rows(self, split: str, n: int) -> Tensor:
        """Return the first rows: all are of one size."""
        return torch.arange(n) % self.n_rows(split)

    def n_probes(self, split: str, size: int) -> float:
        """Return `size`."""
        return size

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the model's logits (n_rows, n_classes) with their graph."""
        return logits_of(model, batch.inputs)

    @torch.no_grad()
    def row_scores(self, model: nn.Module, batch: Batch) -> RowScores:
        """Score each row, without a graph; computed in float32 at least, returned in float64."""
        logits = self.logits(model, batch)
        loss = cross_entropy_rows(logits, batch.labels).double()
        return RowScores(
            loss=loss,
            correct=correct_rows(logits, batch.labels),
            entropy=entropy_rows(logits).double(),
            min_k=-loss,  # a row has one label, and the lowest of one log-probability is itself
        )

    def extra_metrics(self, model: nn.Module) -> dict[str, float]:
        """Give none."""
        return {}

    def frozen(self, model: nn.Module) -> nn.Module:
        """Return a copy."""
        return copy.deepcopy(model).eval().requires_grad_(False)

    def facts(self) -> dict[str, Any]:
        """Give none."""
        return {}

    def _rows_of(self, split: str) -> Tensor:
        if split not in self._rows:
            raise DataError(unknown("split", split, SPLITS))
        return self._rows[split]
