"""A single run from its configuration to its folders: what `python -m hamu.cli.train` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from hamu.data.sources import ImageData
from hamu.errors import CheckpointError
from hamu.tasks.vision import VisionTask, task_for
from hamu.training.artifacts import make_record, place_for, recipe_of, results_path, task_name, trained_model_path
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.original import choose_device, load_data, save_model
from hamu.training.outcome import RunResult
from hamu.training.progress import watch
from hamu.training.records import Recorder

logger = logging.getLogger(__name__)


class Session:
    """The data, the model and the folders of one run.

    Args:
        config: a checked configuration.

    Raises:
        ConfigError, DataError, CheckpointError: before any work, for whatever the configuration asks that is not there.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.data: ImageData = load_data(config)
        self.task: VisionTask = task_for(config, self.data, device=choose_device(config))
        self.folder = Path(config.run.output_dir) if config.run.output_dir else results_path(config)
        self.model_folder = self._model_folder()
        self.start_folder = self._start_folder()

    def start(self) -> TrainingRun:
        """Load the model and set the run up; nothing has been trained yet."""
        checkpoint = self.folder / "checkpoint.pt"
        if not self.config.run.resume:
            checkpoint.unlink(missing_ok=True)
        recorder = Recorder(self.folder / "records", self._identity())
        return TrainingRun(self.config, self.task, self.load_start(), recorder=recorder, checkpoint_path=checkpoint)

    def finish(self, run: TrainingRun) -> RunResult:
        """Keep the model with its record; a run that ended early keeps them too."""
        assert run.result is not None
        record = make_record(
            self.config,
            data_sha256=self.data.sha256,
            split_sha256=self.task.forget_set.sha256,
            result=run.result.row(),
        )
        save_model(self.task, run.model, self.model_folder, record)
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        return run.result

    def _identity(self) -> dict[str, object]:
        config = self.config
        return {
            "trial_id": f"{config.method_name}-{config.recipe_hash()}",
            "task": task_name(config),
            "method": config.method_name,
            "seed": config.run.seed,
            "rho": config.data.hard_probability,
            "forget_class": config.data.forget_class,
            "learning_rate": config.lr,
            "constraint_ratio": config.constraint_ratio,
            "split_sha256": self.task.forget_set.sha256,
        }

    def _model_folder(self) -> Path:
        if self.config.run.final_model_output_dir:
            return Path(self.config.run.final_model_output_dir)
        if self.config.is_unlearning:
            return self.folder / "model"
        variant = "full" if self.config.data.add_forget_to_train else "retain"
        return place_for(trained_model_path(self.config, variant=variant), recipe_of(self.config, self.data.sha256))

    def _start_folder(self) -> Path | None:
        """Folder of the model to start from; None for a new or a hub model."""
        name = self.config.run.model_name
        if Path(name).is_dir():
            return Path(name)
        if not self.config.is_unlearning:
            return None
        path = trained_model_path(self.config, variant="full")
        if not path.is_dir():
            raise CheckpointError(
                f"no original model at {str(path)!r}: unlearning starts from a trained model; train it with "
                "--unlearning_method none --add_forget_to_train, or give --model_name the folder of one"
            )
        return path

    def load_start(self) -> nn.Module:
        """The model that the run starts from."""
        if self.start_folder is None:
            return self.task.new_model(self.config.run.seed)
        return self.task.load_model(self.start_folder)


def run_training(
    config: TrainConfig, progress: bool = True, on_start: Callable[[TrainingRun], None] | None = None
) -> tuple[RunResult, Session]:
    """Run one configuration to its end and keep its model, metrics and records.

    Args:
        config: what to run.
        progress: draw a progress line on a terminal.
        on_start: called with the run before its first step, so that a signal handler can ask it to stop.
    """
    session = Session(config)
    run = session.start()
    if on_start is not None:
        on_start(run)
    title = config.method_name if config.is_unlearning else "training"
    for _ in watch(run, title=title, enabled=progress):
        pass
    return session.finish(run), session
