"""A trial slot: what stays in a process while trial after trial runs in it. Knows nothing of Ray.

    slot = Slot(shared, fetch)          # once a process
    slot.begin(trial_id)                # swaps in the trial's forget set and the original's weights
    while not (metrics := slot.advance())["ended"]:
        ...

A trial's row.json is written here, when its model is saved: from then on the trial has ended, whatever becomes of the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hamu.data.sources import ImageData
from hamu.errors import CheckpointError
from hamu.methods.catalog import find_method
from hamu.tasks.vision import VisionTask, task_for
from hamu.training.artifacts import make_record, start_model_of
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.original import save_model
from hamu.training.records import Recorder
from launch.plan import PlannedTrial, data_key
from launch.results import SweepFolder, trial_lock, write_json
from launch.shared import Original, Shared, failed_row, identity

REPORT_EVERY_S = 1.5
_MAX_TASKS = 4
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Slot:
    """Runs one trial at a time and keeps what the next one can use: the images on the device, and the models."""

    def __init__(self, shared: Shared, fetch: Callable[[Any], Any]) -> None:
        torch.set_num_threads(shared.n_threads)
        self._shared, self._fetch = shared, fetch
        self._folder = SweepFolder(Path(shared.folder))
        self._trials = {trial.trial_id: trial for trial in shared.plan.trials}
        self._tasks: dict[tuple[Any, ...], VisionTask] = {}
        self._models: dict[str, nn.Module] = {}
        self._frozen: dict[str, nn.Module] = {}
        self._held = contextlib.ExitStack()
        self._metrics: dict[str, Any] = {"ended": True}
        self.is_broken = False
        """Whether a device error has left this process unfit for more trials."""

    def begin(self, trial_id: str, *, started_at: float | None = None) -> None:
        """Set a trial up. Does not raise: what goes wrong here ends the trial at its first `advance`.

        Args:
            trial_id: a trial of the plan.
            started_at: when it was asked for, unix seconds; default: now.
        """
        self.close()
        self._started_at = time.time() if started_at is None else started_at
        self._setup_s: float | None = None
        self._trial: PlannedTrial = self._trials[trial_id]
        self._row_path = self._folder.trial(trial_id) / "row.json"
        self._metrics = {"ended": False}
        self._run: TrainingRun | None = None
        _reset_peak_memory()
        try:
            self._held.enter_context(trial_lock(self._folder.trial(trial_id)))
            row = _read_row(self._row_path)
            if row.get("status") == "finished":  # written by a process that died before it could say so
                self._end(row)
                return
            self._row_path.unlink(missing_ok=True)
            self._set_up()
        except Exception as error:
            self._fail(error)

    def advance(self, budget_s: float = REPORT_EVERY_S) -> dict[str, Any]:
        """Train until the next evaluation, for `budget_s` seconds at most (or one step), or to the trial's end.

        Returns:
            Numbers of the trial so far; `ended`: whether it is over, and then `stop_reason` and `status`.
        """
        if self._metrics["ended"]:
            return dict(self._metrics)
        deadline = time.monotonic() + budget_s
        try:
            for report in self._reports:
                # Why a run ends is told when its row is written: whoever stops the trial on it must not cut that off.
                self._metrics |= {key: value for key, value in report.items() if _is_number(value)}
                if report["kind"] == "evaluation" or time.monotonic() > deadline:
                    return dict(self._metrics)
            self._finish()
        except Exception as error:
            self._fail(error)
        return dict(self._metrics)

    def close(self) -> None:
        """Leave the trial at hand, ended or not."""
        self._reports: Iterator[dict[str, Any]] = iter(())
        self._held.close()

    def _set_up(self) -> None:
        self._config = self._shared.plan.configs[self._trial.trial_id]
        self._task, self._data = self._task_of(self._config)
        run = self._new_run()
        self._run = run
        self._reports = iter(run)
        self._metrics |= {"total_steps": run.total_steps, "step": 0}
        self._setup_s = time.time() - self._started_at

    def _new_run(self) -> TrainingRun:
        folder = self._folder.trial(self._trial.trial_id)
        # One model for all trials from one original: each begins with the original's weights copied in.
        model = self._load(self._models)
        recorder = Recorder(self._folder.records, self._identity())
        return TrainingRun(
            self._config,
            self._task,
            model,
            original=self._load(self._frozen) if find_method(self._config.method_name).needs_original else None,
            recorder=recorder,
            checkpoint_path=folder / "checkpoint.pt",
        )

    @property
    def _start_folder(self) -> Path:
        original: Original = self._fetch(self._shared.originals[self._trial.original])
        path = Path(original.path)
        if not path.is_dir():
            raise CheckpointError(
                f"no model folder {original.path!r}; trials need the original: resume the sweep to train it anew"
            )
        return path

    def _load(self, models: dict[str, nn.Module]) -> nn.Module:
        key = self._trial.original
        original: Original = self._fetch(self._shared.originals[key])
        if key not in models:
            models[key] = self._task.load_model(Path(original.path))
        model = models[key]
        # torch.tensor copies: the arrays are shared by all slots, and torch would write into them.
        model.load_state_dict({name: torch.tensor(array) for name, array in original.arrays.items()})
        for param in model.parameters():
            param.requires_grad_(models is self._models)
            param.grad = None
        return model

    def _task_of(self, config: TrainConfig) -> tuple[VisionTask, ImageData]:
        data: ImageData = self._fetch(self._shared.data[data_key(config)])
        drawn = config.data
        key = (
            data_key(config), config.run.model_name, config.run.img_size, drawn.forget_class, drawn.hard_probability,
            config.run.seed, drawn.split_ratio, drawn.k_pct, self._trial.original,
        )  # fmt: skip
        if key not in self._tasks:
            while len(self._tasks) >= _MAX_TASKS:
                self._tasks.pop(next(iter(self._tasks)))
            self._tasks[key] = task_for(config, data, device=self._shared.device, start=self._start_folder)
        return self._tasks[key], data

    def _identity(self) -> dict[str, Any]:
        return {**identity(self._shared.plan, self._trial), "split_sha256": self._task.forget_set.sha256}

    def _finish(self) -> None:
        run = self._run
        assert run is not None and run.result is not None, "the run's iterator ended without a result"
        result = run.result.row()
        folder = self._folder.trial(self._trial.trial_id)
        record = make_record(
            self._config,
            data_sha256=self._data.sha256,
            split_sha256=self._task.forget_set.sha256,
            result=result,
            start_model=start_model_of(self._start_folder),
        )
        save_model(self._task, run.model, folder / "model", record)
        row = {**self._identity(), "status": "finished", "error": None, **result, "model_path": str(folder / "model")}
        row["n_classes"] = self._task.n_classes
        self._write_row(row)
        (folder / "checkpoint.pt").unlink(missing_ok=True)

    def _fail(self, error: Exception) -> None:
        self.is_broken = isinstance(error, torch.AcceleratorError)
        folder = self._folder.trial(self._trial.trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
        if isinstance(error, CheckpointError):  # tried again, it would fail the same way
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        text = " ".join(str(error).split()) or "no message"
        row = {
            **failed_row(self._shared.plan, self._trial, f"{type(error).__name__}: {text}"),
            "train_s": self._run.train_s if self._run is not None else 0.0,
            "steps": self._run.step if self._run is not None else 0,
        }
        self._write_row(row)

    def _write_row(self, row: dict[str, Any]) -> None:
        row = row | {
            "started_at": self._started_at,
            "ended_at": time.time(),
            "setup_s": time.time() - self._started_at if self._setup_s is None else self._setup_s,
            "peak_rss_bytes": _peak_memory(),
            "config": json.dumps(dict(self._trial.config)),
            "slot": os.getpid(),
        }
        write_json(self._row_path, row)
        self._end(row)

    def _end(self, row: Mapping[str, Any]) -> None:
        said = {key: value for key, value in row.items() if isinstance(value, (bool, int, float, str)) and key != "config"}
        self._metrics = {**self._metrics, **said, "ended": True, "stop_reason": row.get("stop_reason") or "failed"}
        self.close()


def _read_row(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float))


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # Linux: the peak counts from here, so each trial has its own


def _peak_memory() -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
