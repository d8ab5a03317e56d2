"""The models that a sweep needs, found or trained once in Ray tasks: the originals that trials start from, as numpy arrays
for the slots, and beside the trials the retain-only models that they are compared with (launch/references.py)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray

from hamu.data.hashing import sha256_arrays
from hamu.errors import CheckpointError, HamuError
from hamu.storage import mount
from hamu.storage.shared_json import changing_json
from hamu.training.artifacts import (
    PUBLISHED,
    RECORD_NAME,
    canonical,
    holds_model,
    place_for,
    recipe_of,
    stop_reason_at,
    trained_model_path,
)
from hamu.training.inputs import is_local_path
from launch.machine import Machine, Slots
from launch.nodes import Watch
from launch.plan import Plan, data_key
from launch.references import MAX_RETRIES, References, accuracies, error_words, is_ready, known_references, provide_reference
from launch.results import SweepFolder
from launch.shared import Original
from launch.signals import Signals
from launch.waiting import Want
from launch.words import Words

if TYPE_CHECKING:
    from hamu.tasks.base import Data, Task
    from hamu.training.config import TrainConfig

# What the memory of a trial depends on, beside its batch size, its optimizer, its rows and whether BatchNorm is frozen: the model
# and its adapter, how long a row is, what the method keeps (the original, an average gradient), what the passes keep, and
# the batches of evaluations.
_OF_MEMORY = (
    "modality", "model_name", "model_revision", "num_labels", "img_size", "max_length", "chat_template", "unlearning_method",
    "gru_beta", "fp16", "bf16", "gradient_checkpointing", "add_lora", "lora_r", "lora_targets", "lora_dropout",
    "per_device_eval_batch_size",
)  # fmt: skip

SMALL_BYTES = 16 * 2**20
"""Of a dataset whose original is trained on one core."""


@dataclass(frozen=True, kw_only=True)
class Provided:
    """What trials start from, and are compared with.

    originals: Ray's references to `Original`, by key. failed: why there is none, one line, by key. references: the retain-only
    models, which may be on their way still. memory_bytes: the most that any trial should need of its own, by estimate; None
    where it was not asked for.
    """

    originals: Mapping[str, Any]
    failed: Mapping[str, str]
    references: References
    memory_bytes: int | None = None


def provide_models(
    plan: Plan,
    todo: Sequence[str],
    data: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    folder: SweepFolder,
    wants_memory: bool = False,
    watch: Watch | None = None,
) -> Provided:
    """Train what is missing, side by side, and wait for the originals; for retain-only models only where trials read them.

    An original that fails takes its own trials down, not the sweep.

    Args:
        plan: of the sweep.
        todo: the trials to run.
        data: Ray's references to the rows, by `data_key`.
        sizes: bytes of the same.
        slots, machine: what a task may use.
        words, signals: of the sweep.
        folder: of the sweep; keeps the hashes of the originals' weights, since a resumed sweep must start from the same ones.
        wants_memory: estimate what a trial needs, too.
        watch: looks at the nodes while this waits.

    Raises:
        HamuError: none of the originals can be had, for reasons that are the user's to mend.
        Interrupted: a signal came.
    """
    wanted = set(todo)
    trials = [trial for trial in plan.trials if trial.trial_id in wanted]
    of_original: dict[str, list[TrainConfig]] = {}
    for trial in trials:
        of_original.setdefault(trial.original, []).append(plan.configs[trial.trial_id])
    remote: Any = cast(Any, ray.remote)(provide)
    tasks, is_there = {}, {}
    wants: dict[str, Want] = {}
    for key, configs in of_original.items():
        config, rows = plan.original(key), data_key(configs[0])
        is_there[key] = is_trained(config, data[rows])
        n_threads = _threads(config, sizes[rows], machine, len(of_original))
        task = remote.options(num_cpus=n_threads, num_gpus=slots.gpus_per_worker, max_retries=MAX_RETRIES)
        wants[key] = Want(who=f"the original {key}", count=1, cpus=n_threads, gpus=slots.gpus_per_worker)
        tasks[key] = task.remote(
            config,
            data[rows],
            n_threads=n_threads,
            first=next((each for each in configs if each.is_hamu), None),
            estimated=_one_of_each_kind(configs) if wants_memory else (),
        )
    references = _begin_references(
        plan, data, sizes, slots=slots, machine=machine, words=words, signals=signals, path=folder.references_path, watch=watch
    )
    failed: dict[str, str] = {}
    originals: dict[str, Any] = {}
    errors: list[BaseException] = []
    memory: list[int] = []
    for key, task in tasks.items():
        started = time.monotonic()
        with words.busy(f"{'loading' if is_there[key] else 'training'} the original {key}"):
            while not ray.wait([task], timeout=0.5)[0]:
                signals.check()
                if watch is not None:
                    watch.poll(wants=[wants[key]])
        try:
            original: Original = ray.get(task)
            _pin(folder.originals, key, original)
            # On several nodes the driver's node keeps them: the one that made them may be lost.
            originals[key] = ray.put(original) if len(machine.nodes) > 1 else task
        except (ray.exceptions.RayError, HamuError) as error:
            errors.append(error)
            n_trials = len(of_original[key])
            of = "its one trial" if n_trials == 1 else f"its {n_trials} trials"
            failed[key] = f"the original {key} failed, so {of} cannot start: {error_words(error)}"
            words.say(failed[key])
            continue
        words.say(f"{_described(original)} ({time.monotonic() - started:.1f} s)")
        if original.memory_bytes is not None:
            memory.append(original.memory_bytes)
    causes = [getattr(error, "cause", None) or error for error in errors]
    if len(failed) == len(tasks) and causes and all(isinstance(cause, HamuError) for cause in causes):
        raise causes[0] from None
    if any(
        trial.reference and plan.configs[trial.trial_id].logging.eval_tofu for trial in plan.trials if trial.trial_id in wanted
    ):
        references.wait()  # forget quality compares with it at a trial's end
    return Provided(
        originals=originals,
        failed=failed,
        references=references,
        memory_bytes=max(memory) if memory else None,
    )


def is_trained(config: TrainConfig, data: Any) -> bool:
    """Whether the model that a training configuration describes is there already. data: Ray's reference to its rows."""
    if is_local_path(config.run.model_name):
        return True
    config = canonical(config)
    published = trained_model_path(config, variant="full" if config.data.add_forget_to_train else "retain")
    if not published.exists():
        return False
    if holds_model(published) and not (published / RECORD_NAME).exists():
        return True  # taken as the published checkpoint that it looks like
    recipe = recipe_of(config, ray.get(data).sha256)
    try:
        return stop_reason_at(place_for(published, recipe), recipe) in PUBLISHED
    except CheckpointError:
        return False


def _begin_references(
    plan: Plan,
    data: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    path: Path,
    watch: Watch | None,
) -> References:
    """Begin the retain-only models that are not known yet, of every trial of the plan: ended ones are compared with them too."""
    of_reference: dict[str, list[TrainConfig]] = {}
    for trial in plan.trials:
        if trial.reference is not None:
            of_reference.setdefault(trial.reference, []).append(plan.configs[trial.trial_id])
    known = known_references(path)
    remote: Any = cast(Any, ray.remote)(provide_reference)
    pending = {}
    wants: dict[str, Want] = {}
    n_new = 0
    for key, configs in of_reference.items():
        # Of trials with other texts besides, one that reads the most says which rows are given.
        reader = next((config for config in configs if config.logging.eval_tofu), configs[0])
        if is_ready(known.get(key, {}), with_truth_ratios=reader.logging.eval_tofu, near=path):
            continue
        config, rows = plan.reference(key), data_key(reader)
        if reader.logging.eval_tofu:
            config = config.replace(eval_tofu=True)
        n_new += not is_trained(config, data[rows])
        n_threads = _threads(config, sizes[rows], machine, len(of_reference))
        task = remote.options(num_cpus=n_threads, num_gpus=slots.gpus_per_worker, max_retries=MAX_RETRIES)
        wants[key] = Want(who=f"the retain-only model {key}", count=1, cpus=n_threads, gpus=slots.gpus_per_worker)
        pending[key] = task.remote(config, data[rows], n_threads=n_threads)
    if pending:
        words.say(f"retain-only models to compare with: {len(pending)}, of which {n_new} to train, beside what follows")
    return References(pending, path=path, words=words, signals=signals, watch=watch, wants=wants)


def _threads(config: TrainConfig, n_bytes: int, machine: Machine, n_models: int) -> int:
    """Cores of a training task."""
    # Few small images train no faster in threads, and one thread gives the same model on every machine.
    is_small = n_bytes < SMALL_BYTES and not config.is_text
    return 1 if is_small else max(1, min(machine.most_cpus, machine.cpus // n_models))


def _one_of_each_kind(configs: Iterable[TrainConfig]) -> tuple[TrainConfig, ...]:
    """Of the trials that take memory alike but for the size of their batches, the one with the largest."""
    kinds: dict[tuple[Any, ...], TrainConfig] = {}
    for config in configs:
        flat = config.to_flat()
        kind = (config.optimizer_name, config.freeze_batchnorm, *(flat[name] for name in _OF_MEMORY))
        known = kinds.get(kind)
        if known is None or config.training.per_device_train_batch_size > known.training.per_device_train_batch_size:
            kinds[kind] = config
    return tuple(kinds.values())


def _pin(pins: Path, key: str, original: Original) -> None:
    """Write down which weights the sweep starts from, or check that they still are the ones; its shares do so side by side."""
    digest = sha256_arrays(*(original.arrays[name] for name in sorted(original.arrays)))
    with changing_json(pins, {}) as pinned:
        if pinned.setdefault(key, digest) != digest:
            raise CheckpointError(
                f"the original {_place(original)!r} has other weights ({digest[:8]}) than this sweep began with "
                f"({pinned[key][:8]}), so its trials could not be compared; put the old ones back, or start a sweep of another "
                "--name"
            )


def _place(original: Original) -> str:
    return mount.shown(Path(original.path))


def _described(original: Original) -> str:
    parts = [f"original {_place(original)}"]
    if not original.result:
        parts[0] += " (taken as it is: no record says how it was trained)"
    parts[0] += accuracies(original.result)
    if original.hardness:
        parts.append(f"S {original.hardness['gradient_product']:.3g}")
        parts.append(f"largest feasible constraint ratio {original.hardness['max_constraint_ratio']:.3g}")
    return ", ".join(parts)


def provide(
    config: TrainConfig, data: Data, *, n_threads: int, first: TrainConfig | None, estimated: Sequence[TrainConfig] = ()
) -> Original:
    """Give the original of a recipe, trained here if it is not there yet, with its weights as numpy arrays.

    Args:
        config: what the original is trained with; if its `model_name` is a folder, the original is the model in there.
        data: the rows.
        n_threads: of torch.
        first: the HAMU trial to measure the hardness for, if any.
        estimated: trials whose memory is estimated; the most of any is given.
    """
    import torch

    from hamu.training.artifacts import read_record
    from hamu.training.checkpoints import changing_state
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
    estimates = [_memory_of(each, task_for(each, data, device=choose_device(each), start=path), path) for each in estimated]
    return Original(
        path=str(path), arrays=arrays, result=result, hardness=hardness, memory_bytes=max(estimates) if estimates else None
    )


def _memory_of(config: TrainConfig, task: Task, path: Path) -> int:
    from hamu.training.loop import TrainingRun
    from hamu.training.memory import estimate_memory

    run = TrainingRun(config, task, task.load_model(path))
    batch_size = config.training.per_device_train_batch_size
    return estimate_memory(task, run.engine, optimizer_name=config.optimizer_name, size=1, batch_size=batch_size).total


__all__ = ["Provided", "References", "provide", "provide_models", "provide_reference"]
