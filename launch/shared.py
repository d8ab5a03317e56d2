"""What the driver and the slots of a sweep give each other. Torch-free: the driver of a sweep never imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hamu.cli.security import without_secrets
from hamu.training.config import TrainConfig
from hamu.training.ray_workers import WorkerSettings
from hamu.training.record_columns import identity_of
from launch.plan import Plan, PlannedTrial


@dataclass(frozen=True, kw_only=True)
class Original:
    """A model that trials start from: its folder, and its weights as numpy arrays that may be read-only.

    result: its metrics, where its record has them. hardness: S, the largest feasible constraint ratio and kappa for the
    first HAMU trial that starts from it, where there is one. memory_bytes: what a trial that starts from it should need at most,
    of its own, where that was asked for.
    """

    path: str
    arrays: Mapping[str, np.ndarray]
    result: Mapping[str, Any] = field(default_factory=dict)
    hardness: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every slot of a sweep is given. `data` and `originals` hold whatever the slot's `fetch` turns into the object.

    run_id: of this run of the sweep. workers: the processes of a slot; None: one, in which Tune runs the trial. gpu_share: of a
    GPU's memory that the slot's process may take; None: no cap. retain_references: folders of the retain-only models that are
    ready, by `PlannedTrial.reference`. scratch: a folder or URL for Ray's own files that all nodes see; "": Ray has one node, and
    they lie in its temporary folder. notices: the actor of the driver's `Notices`, if it has them. save_every_s: seconds after
    which a running trial is saved, whatever its save_strategy. secret_names: variables whose values are written nowhere.
    """

    plan: Plan
    folder: str
    data: Mapping[str, Any]
    originals: Mapping[str, Any]
    device: str = "cpu"
    n_threads: int = 1
    run_id: str = ""
    workers: WorkerSettings | None = None
    gpu_share: float | None = None
    retain_references: Mapping[str, str] = field(default_factory=dict)
    scratch: str = ""
    notices: Any = None
    save_every_s: float = 60.0
    secret_names: tuple[str, ...] = ()


def identity(plan: Plan, trial: PlannedTrial, config: TrainConfig | None = None) -> dict[str, Any]:
    """The columns that say which trial a row is of, but for the hash of its forget set. config: default: as planned."""
    own = {"trial_id": trial.trial_id, "sweep": plan.name, "task": plan.task}
    return own | identity_of(config or plan.configs[trial.trial_id])


def failed_row(plan: Plan, trial: PlannedTrial, error: str, config: TrainConfig | None = None) -> dict[str, Any]:
    """The row of a trial that could not be run to its end; its times are the caller's to add."""
    settings = json.dumps(dict(trial.config))
    return {**identity(plan, trial, config), "status": "failed", "error": without_secrets(error)[:2000], "config": settings}
