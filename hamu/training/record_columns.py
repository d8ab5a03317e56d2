"""The columns of what a run records: one list for records/ (steps and evaluations), one for trials.parquet.

An older file that lacks a column is read as null there, so columns may be added, never renamed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hamu.tasks.catalog import modality_of
from hamu.tasks.tofu_names import TOFU_COLUMNS

if TYPE_CHECKING:
    from hamu.training.config import TrainConfig

SPLITS = ("retain", "forget", "test")
IDENTITY_FIELDS = [
    ("trial_id", pa.string()), ("sweep", pa.string()), ("task", pa.string()), ("method", pa.string()),
    ("seed", pa.int64()), ("rho", pa.float64()), ("forget_class", pa.int64()), ("learning_rate", pa.float64()),
    ("constraint_ratio", pa.float64()), ("relative_constraint", pa.bool_()), ("split_sha256", pa.string()),
    ("forget_set", pa.string()),
]  # fmt: skip
METRIC_COLUMNS = (
    *(f"{split}_{metric}" for split in SPLITS for metric in ("loss", "accuracy", "entropy", "probability", "min_k")),
    "retain_forget_loss_auc", "forget_test_loss_auc", "retain_forget_min_k_auc", "forget_test_min_k_auc",
    "forget_quality", "retain_utility", *(f"{split}_rouge" for split in SPLITS), *TOFU_COLUMNS,
)  # fmt: skip
STEP_COLUMNS = (
    "retain_batch_loss", "forget_batch_loss", "retain_grad_norm", "forget_grad_norm", "kappa", "gradient_product",
    "stopping_rhs", "stopping_margin", "feasible_margin", "predicted_margin", "max_constraint_ratio",
    "predicted_retain_change", "predicted_forget_change", "direct_share", "rectified_share", "colinear_share",
    "infeasible_share", "zero_forget_grad_share",
)  # fmt: skip
HARDNESS_COLUMNS = ("gradient_product", "max_constraint_ratio", "kappa")


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """The identity columns that follow from a configuration; whose run it is and its forget set are the caller's to add."""
    return {
        "method": config.method_name,
        "seed": config.run.seed,
        "rho": None if config.is_text else config.data.hard_probability,
        "forget_class": None if config.is_text else config.data.forget_class,
        "forget_set": modality_of(config).group(config, "retain"),
        "learning_rate": config.lr,
        "constraint_ratio": config.constraint_ratio,
        "relative_constraint": config.method.relative_constraint if config.is_hamu else None,
    }


def _floats(names: Iterable[str]) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.float64()) for name in names]


RECORD_SCHEMA = pa.schema([
    *IDENTITY_FIELDS, ("kind", pa.string()), ("step", pa.int64()), *_floats(("epoch", "wall_s", "train_s")),
    *_floats(METRIC_COLUMNS), *_floats(STEP_COLUMNS), ("stop_reason", pa.string()),
])  # fmt: skip
"""Columns of a row of records/; `kind` is "step" or "evaluation", losses are in nats, `*_s` seconds from the start."""

TRIAL_SCHEMA = pa.schema([
    *IDENTITY_FIELDS, ("status", pa.string()), ("error", pa.string()), ("stop_reason", pa.string()),
    ("message", pa.string()), ("steps", pa.int64()), ("total_steps", pa.int64()),
    *_floats(("epochs", "started_at", "ended_at", "setup_s", "train_s", "steps_s")), *_floats(METRIC_COLUMNS),
    *_floats(f"original_{split}_{metric}" for split in SPLITS for metric in ("loss", "accuracy")),
    *_floats(("original_forget_test_loss_auc", "forget_closeness")), ("reference", pa.string()),
    *_floats(HARDNESS_COLUMNS),
    ("n_classes", pa.int64()), ("attempts", pa.int64()), ("memory_estimate_bytes", pa.int64()), ("peak_rss_bytes", pa.int64()),
    ("peak_bytes_per_rank", pa.list_(pa.int64())), ("model_path", pa.string()), ("config", pa.string()),
])  # fmt: skip
"""Columns of trials.parquet.

status: "finished", "failed", "pruned" (ended early by a scheduler or a stopper; its model is kept as any other's), or "dropped"
(never run, because a probe found it infeasible; `message` says why).
total_steps: planned. steps_s: seconds inside steps alone; train_s has the evaluations too. relative_constraint: whether
constraint_ratio is a share of gradient_product, S. reference: key of the retain-only model's recipe in the plan.
forget_closeness: filled by readers from the references.
started_at, ended_at: unix seconds. attempts: times the trial was begun, more than one where a process died, it was paused, or
another's state was handed on. The memory columns are bytes a process, of the GPU where there is one: the estimate, the largest
peak of its processes, and each one's.
"""
