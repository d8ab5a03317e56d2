"""Retain-only models that a sweep's trials are compared with, trained beside the trials in Ray tasks.

What is known of them lies in references.json: key -> {"path": folder, "result": metrics on retain, forget and test rows}, or
{"error": why there is none}.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from hamu.errors import HamuError
from hamu.models.record import RECORD_NAME
from hamu.storage import mount
from hamu.storage.files import CorruptError, read_json
from hamu.storage.shared_json import changing_json
from launch.nodes import Watch
from launch.signals import Signals
from launch.waiting import Want
from launch.words import Words

if TYPE_CHECKING:
    from hamu.tasks.base import Data, Task
    from hamu.training.config import TrainConfig

MAX_RETRIES = 2
"""How often Ray tries a task again whose process dies."""

TRUTH_RATIOS = "truth_ratios.json"
_DIED = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError)


class References:
    """The retain-only models of a sweep, on their way.

    Args:
        pending: Ray tasks of `provide_reference` that have begun, by key.
        path: references.json; what it holds of other keys stays, as other shares of the sweep write it too.
        words, signals: of the sweep.
        watch: looks at the nodes while this waits.
        wants: what each task needs, by key.
    """

    def __init__(
        self,
        pending: Mapping[str, Any],
        *,
        path: Path,
        words: Words,
        signals: Signals,
        watch: Watch | None = None,
        wants: Mapping[str, Want] | None = None,
    ) -> None:
        self._key_of = {task: key for key, task in pending.items()}
        self._path, self._words, self._signals = path, words, signals
        self._known = {key: entry for key, entry in known_references(path).items() if key not in pending}
        self._started = time.monotonic()
        self._watch, self._wants = watch, dict(wants or {})

    @property
    def n_pending(self) -> int:
        """How many are still on their way, as far as `poll` and `wait` have seen."""
        return len(self._key_of)

    def poll(self) -> dict[str, dict[str, Any]]:
        """Take in what has ended, and return all that is known, as in references.json; never blocks."""
        self._take(timeout_s=0.0)
        return dict(self._known)

    def wait(self) -> dict[str, dict[str, Any]]:
        """Wait for all of them, and return all that is known, as in references.json.

        Raises:
            Interrupted: a signal came.
        """
        if self._key_of:
            of = "the retain-only model" if len(self._key_of) == 1 else f"{len(self._key_of)} retain-only models"
            with self._words.busy(f"waiting for {of}"):
                while self._key_of:
                    self._signals.check()
                    if self._watch is not None:
                        self._watch.poll(wants=[want for key, want in self._wants.items() if key in self._pending()])
                    self._take(timeout_s=0.5)
        return dict(self._known)

    def folders(self) -> dict[str, str]:
        """Folders of those that are ready, by key."""
        paths = {key: str(entry["path"]) for key, entry in self._known.items() if "path" in entry}
        return {key: str(mount.place_of(path, near=self._path)) for key, path in paths.items()}

    def _take(self, *, timeout_s: float) -> None:
        if not self._key_of:
            return
        # One is enough to go on with while it may block; without blocking all that is there.
        wanted = 1 if timeout_s else len(self._key_of)
        ended, _ = ray.wait(list(self._key_of), num_returns=wanted, timeout=timeout_s)
        own: dict[str, dict[str, Any]] = {}
        for task in ended:
            key = self._key_of.pop(task)
            try:
                own[key] = ray.get(task)
            except (ray.exceptions.RayError, HamuError) as error:
                text = error_words(error)
                own[key] = {"error": text}
                self._words.say(f"the retain-only model {key} failed, so its trials are not compared with one: {text}")
            else:
                entry = own[key]
                seconds = time.monotonic() - self._started
                self._words.say(f"retain-only model {entry['path']}{accuracies(entry['result'])} ({seconds:.1f} s)")
        if own:
            self._known = {key: entry for key, entry in add_references(self._path, own).items() if key not in self._pending()}

    def _pending(self) -> set[str]:
        return set(self._key_of.values())


def add_references(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Write what became of some models into a references.json, beside what others write there, and return all that it holds.

    One that failed here does not take the place of one that another process has.
    """
    with changing_json(path, {}) as known:
        for key, entry in entries.items():
            if "error" not in entry or not known.get(key, {}).get("result"):
                known[key] = dict(entry)
        return dict(known)


def known_references(path: Path) -> dict[str, dict[str, Any]]:
    """What a references.json holds; nothing where there is none that can be read."""
    mount.fetch(path)
    try:
        found = read_json(path)
    except (OSError, CorruptError):
        return {}
    return found if isinstance(found, dict) else {}


def is_ready(entry: Mapping[str, Any], *, with_truth_ratios: bool, near: Path) -> bool:
    """Whether an entry of references.json names a model that is there, with all that trials read of it.

    near: a path of the sweep's artifact root.
    """
    if not entry.get("result"):
        return False
    folder = mount.place_of(str(entry.get("path") or ""), near=near)
    mount.fetch(folder, only={RECORD_NAME, TRUTH_RATIOS}.__contains__)
    return folder.is_dir() and (not with_truth_ratios or (folder / TRUTH_RATIOS).is_file())


def accuracies(result: Mapping[str, Any], splits: Iterable[str] = ("test", "forget")) -> str:
    """The accuracies of a model, to be said behind its name."""
    said = [f", {split} accuracy {value:.3f}" for split in splits if (value := result.get(f"{split}_accuracy")) is not None]
    return "".join(said)


def error_words(error: BaseException) -> str:
    """Why a Ray task failed, in one line: its own error, or what became of its process each time that it was tried."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "the machine ran out of memory each time, so that Ray ended its process; run fewer at once, with --max-concurrent"
    if isinstance(error, _DIED):
        return f"its process died (killed, or out of memory), {MAX_RETRIES + 1} times"
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())[:1000]
    return text if isinstance(cause, HamuError) else f"{type(cause).__name__}: {text}"


def provide_reference(config: TrainConfig, data: Data, *, n_threads: int) -> dict[str, Any]:
    """Give the retain-only model of a recipe, trained here if it is not there yet: its folder and its metrics.

    Args:
        config: what it is trained with; with `eval_tofu` its folder gets the truth ratios that forget quality is made of.
        data: the rows.
        n_threads: of torch.

    Returns:
        An entry of references.json.
    """
    import torch

    from hamu.training.artifacts import read_record
    from hamu.training.original import choose_device, provide_model, task_for

    torch.set_num_threads(n_threads)
    path = provide_model(config, data)
    result: dict[str, Any] = {}
    if (path / RECORD_NAME).is_file():  # else a published checkpoint
        found = read_record(path).get("result")
        result = dict(found) if isinstance(found, dict) else {}
    lacks_ratios = False
    lacks_metrics = result.get("forget_loss") is None or result.get("retain_loss") is None
    if lacks_metrics or config.logging.eval_tofu:
        task = task_for(config, data, device=choose_device(config), start=path)
        lacks_ratios = config.logging.eval_tofu and not _has_truth_ratios(task, path)
        if lacks_metrics or lacks_ratios:
            result |= _measured(task, config, path, writes_ratios=lacks_ratios)
    # What it was before it was trained is nothing to compare with, and of the same name as the original's metrics in a row.
    if lacks_ratios:
        mount.publish(path / TRUTH_RATIOS)
    return {
        "path": mount.shown(path),
        "result": {name: value for name, value in result.items() if not name.startswith("original_")},
    }


def _measured(task: Task, config: TrainConfig, path: Path, *, writes_ratios: bool) -> dict[str, float]:
    """Evaluate a model that was there already and was not measured for what is asked for now."""
    from hamu.tasks.tofu import write_truth_ratios
    from hamu.training.engine import PRECISIONS
    from hamu.training.evaluation import evaluate

    model = task.load_model(path)
    dtype = PRECISIONS[config.training.precision]
    import torch

    autocast: Any = contextlib.nullcontext() if dtype is None else torch.autocast(torch.device(task.device).type, dtype=dtype)
    metrics = evaluate(task, model, batch_size=config.training.per_device_eval_batch_size, autocast=autocast)
    with autocast:
        metrics |= task.extra_metrics(model.eval()) if task.has_extra_metrics else {}
    ratios: Any = getattr(task, "truth_ratios", None)
    if writes_ratios and ratios is not None:
        perturbed: Any = getattr(task, "data", None)
        write_truth_ratios(path, ratios, perturbed.perturbed["forget"])
    return metrics


def _has_truth_ratios(task: Any, path: Path) -> bool:
    """Whether a folder has the truth ratios of just these forget questions."""
    from hamu.tasks.tofu import read_truth_ratios

    try:
        read_truth_ratios(path, task.data.perturbed["forget"])
    except HamuError:
        return False
    return True
