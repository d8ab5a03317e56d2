"""A trial slot: runs trial after trial in a process, or in the processes of a group. Knows nothing of Ray.

    slot = Slot(shared, fetch)          # once a process
    slot.begin(trial_id)                # swaps in the trial's forget set and the original's weights
    while not (metrics := slot.advance())["ended"]:
        ...

In a group every process makes its slot and calls it alike (lockstep); the first one holds the trial's lock, records, and writes
its row and its model. The row is written when the model is saved: from then on the trial has ended, whatever becomes of the
process. An exception that every process can be told of ends the trial as failed; one that it cannot be told of (in the middle of
a step of a group, or of the device, which leaves the process unfit) is noted and raised, and the trial tried again in new ones.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hamu.cli.security import keep_secret
from hamu.errors import CheckpointError, CorruptError, LeaseError
from hamu.storage import mount
from hamu.training.artifacts import make_record, start_model_of
from hamu.training.groups import Group, is_partner_gone
from hamu.training.loop import TrainingRun
from hamu.training.memory import cap_memory, is_device_error, keep_freed_memory, peak_memory, reset_peak_memory
from hamu.training.original import save_model
from hamu.training.records import Recorder
from hamu.training.stop import StopReason
from launch.attempts import UNSAID
from launch.plan import PlannedTrial
from launch.results import SweepFolder
from launch.shared import Shared, failed_row, identity
from launch.states import STATE, write_origin
from launch.trial_folder import TrialFolder
from launch.trial_row import memory_words, numbers, plain_metrics, said
from launch.warm import WarmParts

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 1.5

_GO, _GO_FOREIGN, _OVER, _ERROR = range(4)  # what the first process has found when a trial begins


class Slot:
    """Runs one trial at a time, and keeps what the next one can use.

    Args:
        shared: what the sweep shares.
        fetch: turns an entry of `shared.data` and `shared.originals` into the object.
        group: processes of a trial; default: this one alone.
        device: where tensors live; default: the group's, or what `shared` says.
        node: id of the node that this process is on, by which a death is told from the loss of its node.
        gone: gives the ids of the nodes that are dead or about to be taken away, now.
        say: has the driver print a line.
    """

    def __init__(
        self,
        shared: Shared,
        fetch: Callable[[Any], Any],
        group: Group | None = None,
        device: torch.device | str | None = None,
        *,
        node: str = "",
        gone: Callable[[], Collection[str]] | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        torch.set_num_threads(shared.n_threads)
        keep_freed_memory()
        keep_secret({name: os.environ[name] for name in shared.secret_names if name in os.environ})
        self._shared, self._group = shared, group or Group.alone(device or shared.device)
        self._device = self._group.device
        self._is_first = self._group.is_first
        cap_memory(self._device, shared.gpu_share)
        self._folder = SweepFolder(Path(shared.folder))
        self._trials = {trial.trial_id: trial for trial in shared.plan.trials}
        self._warm = WarmParts(shared, fetch, device=self._device, size=self._group.size)
        self._gone, self._say = gone, say
        self._nodes = sorted({each for each in self._group.gather_texts(node) if each}) if self._group.size > 1 else [node]
        self._own: TrialFolder | None = None
        self._run: TrainingRun | None = None
        self._recorder: Recorder | None = None
        self._reports: Iterator[dict[str, Any]] = iter(())
        self._metrics: dict[str, Any] = {"ended": True}

    def begin(
        self,
        trial_id: str,
        overrides: Mapping[str, Any] | None = None,
        load_from: str | None = None,
        started_at: float | None = None,
    ) -> dict[str, Any]:
        """Set a trial up. What goes wrong here ends the trial; only what leaves the process unfit for another one is raised.

        Args:
            trial_id: a trial of the plan.
            overrides: settings in place of the plan's, such as a scheduler has chosen.
            load_from: a folder that `save` has filled, for this trial or another: go on from there. Default: from the trial's
                own checkpoint, if it has one.
            started_at: when it was asked for, unix seconds; default: now.

        Returns:
            As `advance`.
        """
        self.close()
        self._started_at = time.time() if started_at is None else started_at
        self._setup_s: float | None = None
        self._estimate: int | None = None
        self._said_before: dict[str, Any] = {}
        self._trial: PlannedTrial = self._trials[trial_id]
        self._overrides, self._config = dict(overrides or {}), self._shared.plan.configs[trial_id]
        self._own = TrialFolder(self._folder.trial(trial_id), self._shared.run_id, nodes=self._nodes, gone=self._gone)
        self._metrics = {"ended": False}
        reset_peak_memory(self._device)
        found = _GO
        error: Exception | None = None
        row: dict[str, Any] = {}
        try:
            if self._overrides:
                self._config = self._config.replace(**self._overrides)
            if (reference := self._retain_reference()) is not None:
                self._config = self._config.replace(retain_reference=reference)
            if self._is_first:
                found, row = self._open(load_from)
        except Exception as caught:
            error = caught
        found = self._agreed(found, error)
        if found == _OVER:
            self._end(row)
        elif found != _ERROR:
            try:
                self._set_up(is_foreign=found == _GO_FOREIGN)
            except Exception as caught:
                error = caught
            if self._agreed(found, error) != _ERROR:
                self._guarded(self._take_up)
        return self._said()

    def advance(self, budget_s: float = REPORT_EVERY_S, *, saves: bool = False) -> dict[str, Any]:
        """Train until the next evaluation, for `budget_s` seconds at most (or one step), or to the trial's end.

        saves: save the trial's own checkpoint first.

        Returns:
            Numbers of the trial so far; `ended`: whether it is over, and then `stop_reason` and `status`; `save_s`: seconds
            that saving took, if it did; `nodes`: ids of the nodes that the trial is on.
        """
        self._metrics.pop("save_s", None)
        if not self._metrics["ended"]:
            self._guarded(lambda: self._advance(budget_s, saves=saves))
        return self._said()

    def prune(self) -> dict[str, Any]:
        """End the trial here for good: it is evaluated, and its model, records and row are kept. Returns as `advance`."""
        if not self._metrics["ended"]:
            self._guarded(self._prune)
        return self._said()

    def hold(self) -> dict[str, Any]:
        """Save the trial's own checkpoint and leave the trial, in order: whoever begins it next goes on from here."""
        if not self._metrics["ended"]:
            self._guarded(self._save_own)
        self.close()
        return {"ended": True}

    def leave(self) -> dict[str, Any]:
        """Leave the trial at hand. One that has been stopped meanwhile (the sweep has written it down as pruned) is pruned."""
        if not self._metrics["ended"]:
            is_stopped = self._is_first and self._own is not None and self._own.row().get("status") == "pruned"
            # Without a step behind it there is no model but the original's to keep: the sweep's own words stand.
            if self._group.first(is_stopped) and self._has_stepped():
                return self.prune()
            if self._recorder is not None:
                self._recorder.flush()
        self.close()
        return {"ended": True}

    def _has_stepped(self) -> bool:
        assert self._run is not None
        return self._run.step > 0

    def save(self, folder: str) -> dict[str, Any]:
        """Write the trial's state into a folder that all processes see, for `begin(load_from=...)`."""
        if self._run is not None and not self._metrics["ended"]:
            self._guarded(lambda: self._save(Path(folder)))
        return self._said()

    def close(self) -> None:
        """Leave the trial at hand, ended or not, as it is."""
        if self._own is not None:
            self._own.close()
        self._recorder = self._run = None
        self._reports = iter(())
        self._metrics = self._metrics | {"ended": True}

    def _said(self) -> dict[str, Any]:
        return {**self._metrics, "nodes": self._nodes}

    def _open(self, load_from: str | None) -> tuple[int, dict[str, Any]]:
        """Take the trial for this process group: its folder, an attempt, and the state that it goes on from."""
        row, died_of = self._place.take()
        if row:
            return _OVER, row
        if died_of is not None:
            self._fail(died_of)
            return _OVER, dict(self._metrics)
        state = self._place.take_state(load_from, trial_id=self._trial.trial_id, recipe=self._config.recipe_hash())
        is_foreign, self._said_before = state
        return _GO_FOREIGN if is_foreign else _GO, {}

    @property
    def _place(self) -> TrialFolder:
        assert self._own is not None, "a trial has been begun"
        return self._own

    def _retain_reference(self) -> str | None:
        """Folder of the sweep's own retain-only model, for a trial that is measured against one and names none."""
        logging = self._config.logging
        if not logging.eval_tofu or logging.retain_reference is not None or self._trial.reference is None:
            return None
        folder = self._shared.retain_references.get(self._trial.reference)
        if folder is not None:  # trained on another node, perhaps
            mount.fetch(Path(folder), only=lambda name: name.endswith(".json"))
        return folder

    def _set_up(self, *, is_foreign: bool) -> None:
        config, trial = self._config, self._trial
        self._task, self._data = self._warm.task(trial, config)
        model = self._warm.model(trial, self._task)
        if self._is_first:
            self._recorder = self._place.recorder(self._folder.records, self._identity())
        self._run = TrainingRun(
            config,
            self._task,
            model,
            recorder=self._recorder,
            checkpoint_path=self._place.checkpoint,
            group=self._group,
            adopt_checkpoint=is_foreign,
        )
        self._estimate = self._warm.estimate(trial, self._task, self._run).total
        self._reports = iter(self._run)
        self._metrics |= {"step": 0, **self._said_before, "total_steps": self._run.total_steps, "n_classes": self._task.n_classes}
        self._setup_s = time.time() - self._started_at

    def _agreed(self, found: int, error: Exception | None) -> int:
        """Tell all processes what the first one has found; an error of any of them ends the trial in all."""
        if isinstance(error, LeaseError):  # another process has the trial: what becomes of it is that one's to write
            raise error
        if error is not None and is_device_error(error):
            self._raise_noted(error)
        mine = torch.tensor([found, error is not None], dtype=torch.float64, device=self._device)
        codes = self._group.gather_numbers(mine).cpu()
        if not codes[:, 1].any():
            return int(codes[0, 0])
        texts = self._group.gather_texts("" if error is None else said(error))
        trace = "".join(traceback.format_exception(error)) if error is not None else "\n".join(filter(None, texts))
        self._fail(next(filter(None, texts)), trace)
        return _ERROR

    def _take_up(self) -> None:
        """Go on from the trial's checkpoint; one that is broken is named and set aside, and the trial begins anew."""
        assert self._run is not None
        broken: CorruptError | None = None
        try:
            self._run.take_up()
        except CorruptError as error:  # the checkpoint, or a part of the records that it counts on
            broken = error
        if not self._group.any(broken is not None):
            return
        if self._is_first:
            aside = self._place.set_checkpoint_aside()
            what = f" ({broken.path.name}: {broken.why})" if broken is not None else ""
            self._say(
                f"trial {self._trial.trial_id} begins anew, since what it had saved is broken{what}; see {mount.shown(aside)}"
            )
        self._group.any(False)  # nobody looks for the file before it is away
        self._set_up(is_foreign=False)
        self._run.take_up()

    def _advance(self, budget_s: float, *, saves: bool) -> None:
        assert self._run is not None
        if saves:
            started = time.monotonic()
            self._save_own()
            self._metrics["save_s"] = time.monotonic() - started
        self._run.pause_at(time.monotonic() + budget_s)
        for report in self._reports:
            self._metrics |= self._run.metrics | numbers(report)
            if report.get("stop_reason"):
                continue  # told when its row is written: whoever stops the trial on it must not cut that off
            # A state saved between a step and its evaluation would lack the latter.
            if report["kind"] == "evaluation" or (self._run.is_pause_due and not self._is_evaluation_due(report["step"])):
                return
        self._finish()

    def _is_evaluation_due(self, step: int) -> bool:
        assert self._run is not None
        every = self._config.logging.every("eval", self._run.plan.steps_per_epoch)
        return every is not None and step % every == 0

    def _prune(self) -> None:
        assert self._run is not None
        self._save_own()  # should this process not be given the time, another one completes the trial from here
        self._run.request_stop(StopReason.PRUNED)
        for _ in self._reports:
            pass
        self._finish()

    def _save_own(self) -> None:
        assert self._run is not None
        self._place.check()
        self._run.save()

    def _save(self, folder: Path) -> None:
        assert self._run is not None
        self._place.check()
        self._run.save(folder / STATE)
        if self._is_first:
            metrics = {key: value for key, value in numbers(self._metrics).items() if key != "ended"}
            write_origin(folder, trial_id=self._trial.trial_id, recipe=self._config.recipe_hash(), metrics=metrics)

    def _finish(self) -> None:
        run = self._run
        assert run is not None and run.result is not None, "the run's iterator ended without a result"
        self._place.check()
        peaks = self._group.gather_numbers(torch.tensor([peak_memory(self._device)], dtype=torch.int64, device=self._device))
        result = run.result.row()
        if self._is_first:
            record = make_record(
                self._config,
                data_sha256=self._data.sha256,
                split_sha256=self._task.forget_set.sha256,
                result=result,
                start_model=start_model_of(self._warm.start_folder(self._trial)),
            )
            path = self._place.model
            save_model(self._task, run.model, path, record)
            status = "pruned" if run.result.stop_reason is StopReason.PRUNED else "finished"
            row = {**self._identity(), "status": status, "error": None, **result, "model_path": mount.shown(path)}
            self._write_row(row | {"n_classes": self._task.n_classes, "peak_bytes_per_rank": peaks.flatten().tolist()})
            self._place.drop_checkpoint()
        else:
            self._end(result)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except LeaseError:  # this process was taken for dead: another one writes the trial now
            self._place.abandon()
            raise
        except Exception as error:
            if isinstance(error, CheckpointError) and self._is_first:  # tried again, it would fail the same way
                self._place.drop_checkpoint()
            if self._group.size > 1 or is_device_error(error):
                self._raise_noted(error)
            self._fail(said(error), traceback.format_exc())

    def _raise_noted(self, error: Exception) -> None:
        """Raise what this process may not survive, with a note for whoever begins the trial next."""
        text = UNSAID if is_partner_gone(error) else said(error)
        if is_device_error(error):
            text += f" ({memory_words(peak=peak_memory(self._device), estimate=self._estimate)})"
        self._place.abandon(error, text)
        raise error

    def _fail(self, text: str, trace: str | None = None) -> None:
        row = {
            **failed_row(self._shared.plan, self._trial, text, self._config),
            "train_s": self._run.train_s if self._run is not None else 0.0,
            "steps_s": self._run.steps_s if self._run is not None else 0.0,
            "steps": self._run.step if self._run is not None else 0,
            "total_steps": self._run.total_steps if self._run is not None else None,
        }
        if self._is_first:
            if trace is not None:
                self._place.write_trace(trace)
            self._write_row(row)
        else:
            self._end(row)

    def _identity(self) -> dict[str, Any]:
        split = {"split_sha256": self._task.forget_set.sha256}
        return {**identity(self._shared.plan, self._trial, self._config), **split}

    def _write_row(self, row: dict[str, Any]) -> None:
        peaks = row.get("peak_bytes_per_rank") or [peak_memory(self._device)]
        row = row | {
            "reference": self._trial.reference,
            "started_at": self._started_at,
            "ended_at": time.time(),
            "setup_s": time.time() - self._started_at if self._setup_s is None else self._setup_s,
            "attempts": self._place.n_attempts,
            "memory_estimate_bytes": self._estimate,
            "peak_rss_bytes": max(peaks),
            "peak_bytes_per_rank": peaks,
            "config": json.dumps({**self._trial.config, **self._overrides}),
            "slot": os.getpid(),
        }
        self._place.write_row(row)
        self._end(row)

    def _end(self, row: Mapping[str, Any]) -> None:
        ended = {"ended": True, "stop_reason": row.get("stop_reason") or "failed"}
        self._metrics = {**self._metrics, **plain_metrics(row), **ended}
        self.close()
