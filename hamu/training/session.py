"""A single run from its configuration to its folders: what `python -m hamu.cli.train` does."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hamu.errors import CheckpointError
from hamu.models.record import json_text
from hamu.tasks.base import Data, Task
from hamu.training.artifacts import (
    PUBLISHED,
    canonical,
    check_replaceable,
    make_record,
    place_for,
    read_record,
    recipe_of,
    results_path,
    start_model_of,
    stop_reason_at,
    task_name,
)
from hamu.training.checkpoints import load_checkpoint
from hamu.training.config import TrainConfig
from hamu.training.groups import Group
from hamu.training.inputs import check_start, is_local_path, start_differences
from hamu.training.loop import TrainingRun
from hamu.training.memory import keep_freed_memory
from hamu.training.original import (
    adopts,
    choose_device,
    load_data,
    publish_model,
    published_path,
    save_model,
    task_for,
    warn_of_missed_target,
)
from hamu.training.outcome import RunResult
from hamu.training.progress import watch
from hamu.training.record_columns import identity_of
from hamu.training.records import Recorder, replacing
from hamu.training.stop import StopReason

logger = logging.getLogger(__name__)

_RUN_NAME = "run.json"
_EXTRA_SETTINGS = ("eval_tofu", "eval_generation_rows", "retain_reference")


class Session:
    """The data, the model and the folders of one run. Nothing is written before `start`.

    A run's recipe is its settings, its data and the model it starts from. It names the run's folder, and stands in `run.json`
    there: a checkpoint is never gone on with from another model or on other data.

    Args:
        config: a checked configuration.
        device: of model and rows; default: as the configuration says.

    Raises:
        ConfigError, DataError, CheckpointError: before any work, for whatever the configuration asks that is not there.
    """

    def __init__(self, config: TrainConfig, *, device: torch.device | None = None) -> None:
        self.config = config = canonical(config)
        device = device or choose_device(config)
        start = check_start(config)
        self.data: Data = load_data(config)
        self.task: Task = task_for(config, self.data, device=device, start=start)
        self.start_folder = self._checked_start()
        self.start_model = None if self.start_folder is None else start_model_of(self.start_folder)
        self.recipe = recipe_of(config, self.data.sha256, self.start_model)
        self.folder = Path(config.run.output_dir) if config.run.output_dir else results_path(config, self.recipe)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.model_folder = self._model_folder()
        self._check_folders()

    def ended(self) -> dict[str, Any] | None:
        """The result of this run, where it has ended before; a cancelled run has not. Sets `model_folder` to where it is."""
        for folder in dict.fromkeys((self.model_folder, self.folder / "model")):
            if stop_reason_at(folder, self.recipe) not in (None, StopReason.CANCELLED):
                self.model_folder = folder
                return dict(read_record(folder)["result"])
        return None

    def ended_before(self) -> dict[str, Any] | None:
        """The result of this run, where it need not be run: it resumes one that has ended, or trains what is published."""
        if not (self.config.run.resume or self.is_published()) or (row := self.ended()) is None:
            return None
        if self._lacks_extra_metrics():
            return self._with_extra_metrics(row)
        logger.info(
            "this run has ended already (%s, %s steps): nothing to do; its model is %s%s",
            row["stop_reason"],
            row.get("steps"),
            self.model_folder,
            "" if self.config.is_unlearning else " (remove that folder to train it anew)",
        )
        return row

    def _lacks_extra_metrics(self) -> bool:
        """Whether something is asked for that is measured at the end of a run, and was not when this one was measured last."""
        then = read_record(self.model_folder).get("config", {})
        now = {name: getattr(self.config.logging, name) for name in _EXTRA_SETTINGS}
        return any(value and value != then.get(name) for name, value in now.items())

    def _with_extra_metrics(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the model that an ended run has kept, and add that to its record."""
        logger.info("this run has ended already; measuring its model %s ...", self.model_folder)
        model = self.task.load_model(self.model_folder)
        more = dict(row) | self.task.extra_metrics(model.eval())
        record = read_record(self.model_folder)
        asked = {name: getattr(self.config.logging, name) for name in _EXTRA_SETTINGS}
        record |= {"result": more, "config": {**record.get("config", {}), **asked}}
        save_model(self.task, model, self.model_folder, record)
        return more

    def is_published(self) -> bool:
        """Whether this run trains a model that lies at its published place already."""
        is_own_place = self.config.run.final_model_output_dir is not None
        return not (self.config.is_unlearning or is_own_place) and stop_reason_at(self.model_folder, self.recipe) is not None

    def start_afresh(self) -> None:
        """Remove the checkpoint of an earlier run of this recipe, unless this run resumes."""
        if not self.config.run.resume:
            self.checkpoint.unlink(missing_ok=True)
        elif not self.checkpoint.exists():
            logger.info("no checkpoint at %s, starting at step 0", self.checkpoint)

    def start(self, group: Group | None = None) -> TrainingRun:
        """Load the model and set the run up; nothing has been trained yet. A checkpoint that is there is gone on with.

        Of a group all processes call it, and the first one writes.
        """
        model = self.load_start()
        recorder = None
        if group is None or group.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / _RUN_NAME) as temporary:
                temporary.write_text(json_text(self._run_record(), indent=1) + "\n")
            recorder = Recorder(self.folder / "records", self._identity())
        return TrainingRun(self.config, self.task, model, recorder=recorder, checkpoint_path=self.checkpoint, group=group)

    def hardness_so_far(self) -> dict[str, float] | None:
        """S, kappa and the largest feasible ratio at the first step of the run that is gone on with; None: there is none."""
        if not (self.config.run.resume and self.checkpoint.exists()):
            return None
        return dict(load_checkpoint(self.checkpoint).get("hardness") or {})

    def finish(self, run: TrainingRun) -> RunResult:
        """Keep the model with its record; a run that ended early keeps them too.

        A cancelled run's model stays in the run's own folder, with the checkpoint that `resume` goes on from; so does a
        trained model that is not fit to start from. `model_folder` says where.
        """
        result = run.result
        assert result is not None
        record = make_record(
            self.config,
            data_sha256=self.data.sha256,
            split_sha256=self.task.forget_set.sha256,
            result=result.row(),
            start_model=self.start_model,
        )
        is_training = not self.config.is_unlearning
        if result.stop_reason is StopReason.CANCELLED or (is_training and result.stop_reason not in PUBLISHED):
            self.model_folder = self.folder / "model"
            save_model(self.task, run.model, self.model_folder, record)
        elif is_training and not self.config.run.final_model_output_dir:
            self.model_folder = publish_model(self.config, self.task, run.model, record)
        else:
            save_model(self.task, run.model, self.model_folder, record)
        if result.stop_reason is not StopReason.CANCELLED:
            self.checkpoint.unlink(missing_ok=True)
            self._remove_cancelled()
            warn_of_missed_target(self.config, result)
        return result

    def _remove_cancelled(self) -> None:
        """Remove the model that this run left when it was cancelled before, now that its end lies elsewhere."""
        folder = self.folder / "model"
        if folder != self.model_folder and stop_reason_at(folder, self.recipe) == StopReason.CANCELLED:
            shutil.rmtree(folder)

    def load_start(self) -> nn.Module:
        """The model that the run starts from; training takes new weights, or those of a folder with a head that fits."""
        if self.start_folder is None or not self.config.is_unlearning:
            return self.task.new_model(self.config.run.seed)
        return self.task.load_model(self.start_folder)

    def _checked_start(self) -> Path | None:
        known: dict[str, Any] = {"data_sha256": self.data.sha256, **self.task.facts()}
        folder = check_start(self.config, **known)
        if folder is not None and self.config.is_unlearning:
            if not is_local_path(self.config.run.model_name):
                adopts(folder)
            for difference in start_differences(self.config, folder, **known):
                logger.warning("the start model %s: %s", folder, difference)
        return folder

    def _model_folder(self) -> Path:
        if self.config.run.final_model_output_dir:
            return Path(self.config.run.final_model_output_dir)
        if self.config.is_unlearning:
            return self.folder / "model"
        return place_for(published_path(self.config), self.recipe)

    def _check_folders(self) -> None:
        """Refuse to overwrite a model of another recipe, or the checkpoint of another run."""
        check_replaceable(self.model_folder, self.recipe)
        check_replaceable(self.folder / "model", self.recipe)
        if not self.checkpoint.exists():
            return
        try:
            found = json.loads((self.folder / _RUN_NAME).read_text()).get("recipe")
        except (OSError, ValueError, AttributeError):
            found = None
        if found != self.recipe:
            raise CheckpointError(
                f"checkpoint {str(self.checkpoint)!r} is of another run (recipe {found}, this run is {self.recipe}): other "
                "settings, other data, or another start model; give another --output_dir, or remove it"
            )

    def _run_record(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "start_model": self.start_model,
            "data_sha256": self.data.sha256,
            "split_sha256": self.task.forget_set.sha256,
            "config": self.config.to_flat(),
        }

    def _identity(self) -> dict[str, object]:
        return {
            "trial_id": f"{self.config.method_name}-{self.recipe}",
            "task": task_name(self.config),
            **identity_of(self.config),
            "split_sha256": self.task.forget_set.sha256,
        }


def run_training(
    config: TrainConfig,
    progress: bool = True,
    on_start: Callable[[TrainingRun, Session], None] | None = None,
) -> tuple[dict[str, Any], Session]:
    """Run one configuration to its end and keep its model, metrics and records.

    With `resume`, a run that has ended already is not run again: its result is given as it was recorded. Nor is a model trained
    again that lies at its published place already: sweeps may have started from it, and another training can differ in rounding.

    Args:
        config: what to run.
        progress: draw a progress line on a terminal.
        on_start: called with the run and its session before the first step, so that a signal handler can ask it to stop.

    Returns:
        The result as a trial's row (`RunResult.row`), and the session, whose `model_folder` holds the model.
    """
    keep_freed_memory()
    session = Session(config)
    if (row := session.ended_before()) is not None:
        return row, session
    session.start_afresh()
    run = session.start()
    if on_start is not None:
        on_start(run, session)
    title = config.method_name if config.is_unlearning else "training"
    for _ in watch(run, title=title, enabled=progress):
        pass
    return session.finish(run).row(), session
