"""The models that trials start from: found, or trained once in a Ray task, and shared with the slots as numpy arrays."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray

from hamu.data.hashing import sha256_arrays
from hamu.errors import CheckpointError, HamuError
from launch.machine import Machine, Slots
from launch.plan import Plan, data_key
from launch.results import write_json
from launch.shared import Original
from launch.signals import Signals
from launch.words import Words

if TYPE_CHECKING:
    from hamu.tasks.base import Data
    from hamu.training.config import TrainConfig

SMALL_BYTES = 16 * 2**20
"""Of a dataset whose original is trained on one core."""


def provide_originals(
    plan: Plan,
    todo: Sequence[str],
    data: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    pins: Path,
) -> dict[str, Any]:
    """Train the originals that are missing, side by side, and return references to them.

    `pins` is the sweep's file of their weights' hashes: a resumed sweep must start from the same ones.

    Raises:
        CheckpointError: an original has other weights than the sweep began with.
    """
    first: dict[str, TrainConfig | None] = {}
    key_of_data: dict[str, str] = {}  # its trials' own, who may want more of the same rows than it does
    wanted = set(todo)
    for trial in plan.trials:
        if trial.trial_id in wanted:
            config = plan.configs[trial.trial_id]
            key_of_data.setdefault(trial.original, data_key(config))
            if first.get(trial.original) is None:
                first[trial.original] = config if config.is_hamu else None
    remote_provide: Any = cast(Any, ray.remote)(provide)
    references = {}
    for key, trial_config in first.items():
        config = plan.original(key)
        # Few small images train no faster in threads, and one thread gives the same original on every machine.
        is_small = sizes[key_of_data[key]] < SMALL_BYTES and not config.is_text
        n_threads = 1 if is_small else max(1, machine.cpus // len(first))
        task = remote_provide.options(num_cpus=n_threads, num_gpus=slots.gpus_per_worker)
        references[key] = task.remote(config, data[key_of_data[key]], n_threads=n_threads, first=trial_config)
    for key, reference in references.items():
        started = time.monotonic()
        with words.busy(f"the original {key}: loading, or training it"):
            try:
                while not ray.wait([reference], timeout=0.5)[0]:
                    signals.check()
                original: Original = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, HamuError):
                    raise error.cause from None
                raise
        _pin(pins, key, original)
        words.say(f"{_described(original)} ({time.monotonic() - started:.1f} s)")
    return references


def _pin(pins: Path, key: str, original: Original) -> None:
    """Write down which weights the sweep starts from, or check that they still are the ones."""
    pinned = json.loads(pins.read_text()) if pins.exists() else {}
    digest = sha256_arrays(*(original.arrays[name] for name in sorted(original.arrays)))
    if pinned.setdefault(key, digest) != digest:
        raise CheckpointError(
            f"the original {original.path!r} has other weights ({digest[:8]}) than this sweep began with ({pinned[key][:8]}), so "
            "its trials could not be compared; put the old ones back, or start a sweep of another --name"
        )
    write_json(pins, pinned)


def _described(original: Original) -> str:
    parts = [f"original {original.path}"]
    if not original.result:
        parts[0] += " (taken as it is: no record says how it was trained)"
    for split in ("test", "forget"):
        if original.result.get(f"{split}_accuracy") is not None:
            parts.append(f"{split} accuracy {original.result[f'{split}_accuracy']:.3f}")
    if original.hardness:
        parts.append(f"S {original.hardness['gradient_product']:.3g}")
        parts.append(f"largest feasible constraint ratio {original.hardness['max_constraint_ratio']:.3g}")
    return ", ".join(parts)


def provide(config: TrainConfig, data: Data, *, n_threads: int, first: TrainConfig | None) -> Original:
    """Give the original of a recipe, trained here if it is not there yet, with its weights as numpy arrays.

    Args:
        config: what the original is trained with; if its `model_name` is a folder, the original is the model in there.
        data: the rows.
        n_threads: of torch.
        first: the HAMU trial to measure the hardness for, if any.
    """
    import torch

    from hamu.training.artifacts import read_record
    from hamu.training.checkpoints import changing_state
    from hamu.training.inputs import is_local_path
    from hamu.training.loop import TrainingRun
    from hamu.training.original import choose_device, provide_model, task_for

    torch.set_num_threads(n_threads)
    name = config.run.model_name
    path = Path(name).expanduser() if is_local_path(name) else provide_model(config, data)
    # Without the trials' own settings, so that the arrays are the same whichever trials are left to run.
    own = task_for(config, data, device=choose_device(config), start=path)
    model = own.load_model(path)
    arrays = {key: value.cpu().numpy().copy() for key, value in changing_state(model).items()}
    try:
        result = read_record(path)["result"]
    except (CheckpointError, KeyError):  # a folder of the user's own
        result = {}
    hardness = {}
    if first is not None:
        task = task_for(first, data, device=choose_device(first), start=path)
        hardness = TrainingRun(first, task, task.load_model(path)).measure_hardness()
    return Original(path=str(path), arrays=arrays, result=result, hardness=hardness)
