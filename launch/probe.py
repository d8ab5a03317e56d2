"""What the first pairs of gradients of a plan's HAMU trials allow, measured in Ray tasks before any trial runs.

probe = probe_plan(plan, todo, provided, data, slots=..., words=..., signals=..., n_pairs=3)
print(probe.text())         # launch/probe_text.py
probe.dropped               # trial id -> why it need not run
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import ray

from hamu.errors import HamuError
from hamu.training.config import TrainConfig
from hamu.training.probe import N_PAIRS
from launch.plan import data_key
from launch.probe_text import group_json, probe_text
from launch.references import MAX_RETRIES, error_words

if TYPE_CHECKING:
    from hamu.tasks.base import Data
    from hamu.training.probe import ProbedPairs
    from launch.machine import Machine, Slots
    from launch.originals import Provided
    from launch.plan import Plan
    from launch.shared import Original
    from launch.signals import Signals
    from launch.words import Words

# What decides a pair of gradients, beside the original, the rows and the learning rate of a fixed radius; and how it is read.
_OF_PAIR = (
    "seed", "shuffle_seed", "shuffle_dataset", "forget_class", "hard_probability", "split_ratio", "dataset_repeat",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_pairing", "num_workers", "model_name", "img_size",
    "add_lora", "lora_name", "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "fp16", "bf16", "gradient_checkpointing",
    "freeze_batchnorm", "max_length", "chat_template",
)  # fmt: skip
_OF_READING = ("full_grad", "max_grad_norm", "hamu_radius", "use_lr_radius")


@dataclass(frozen=True, kw_only=True)
class ProbedTrial:
    """A trial at the pairs of its group. is_stopped: whether it would end there. largest: the largest constraint ratio at which
    it would not (`ProbedPairs.largest_ratio`), inf where nothing stops it. asked: its constraint ratio, S multiplied in."""

    config: TrainConfig
    is_stopped: Sequence[bool]
    largest: Sequence[float]
    asked: float


@dataclass(frozen=True, kw_only=True)
class ProbedGroup:
    """Trials with the same pairs of gradients, read in the same way. original: key of the model that they start from."""

    original: str
    forget_set: str
    pairs: ProbedPairs
    trials: Mapping[str, ProbedTrial]

    @property
    def config(self) -> TrainConfig:
        """Of one of its trials."""
        return next(iter(self.trials.values())).config


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured. dropped: why a trial need not run, by id: its own rule ends it at every pair, its first step's among
    them. failed: why a group could not be measured, by its first trial's id. seconds: what measuring took."""

    groups: Sequence[ProbedGroup] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def text(self) -> str:
        """What a user decides ratios from: S, kappa, the angle and the largest ratios, by pair and by block."""
        return probe_text(self)

    def to_json(self) -> dict[str, Any]:
        """The content of probe.json."""
        return {
            "seconds": self.seconds,
            "dropped": dict(self.dropped),
            "failed": dict(self.failed),
            "groups": [group_json(group) for group in self.groups],
        }


def probe_plan(
    plan: Plan,
    todo: Sequence[str],
    provided: Provided,
    data: Mapping[str, Any],
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    n_pairs: int = N_PAIRS,
) -> Probe:
    """Measure the first pairs of gradients of the HAMU trials, one Ray task for all trials that share them.

    Args:
        plan: of the sweep.
        todo: the trials that are to run.
        provided: what they start from; trials without an original are left out.
        data: Ray's references to the rows, by `data_key`.
        slots, machine: a task takes what a process of a trial does.
        words, signals: of the sweep.
        n_pairs: pairs of each group, the first of them that of the trials' first step.

    Raises:
        Interrupted: a signal came.
    """
    started, wanted = time.monotonic(), set(todo)
    groups: dict[tuple[Any, ...], dict[str, TrainConfig]] = {}
    for trial in plan.trials:
        config = plan.configs[trial.trial_id]
        if trial.trial_id in wanted and config.is_hamu and trial.original in provided.originals:
            groups.setdefault((trial.original, *_group_key(config)), {})[trial.trial_id] = config
    if not groups:
        return Probe()
    remote: Any = cast(Any, ray.remote)(measure)
    n_threads = min(slots.cpus_per_worker, machine.cpus)
    task = remote.options(num_cpus=n_threads, num_gpus=slots.gpus_per_worker, max_retries=MAX_RETRIES)
    tasks = {
        task.remote(configs, data[data_key(_first(configs))], provided.originals[key[0]], key[0], n_threads, n_pairs): configs
        for key, configs in groups.items()
    }
    found: dict[Any, ProbedGroup] = {}
    failed: dict[str, str] = {}
    n_groups = f"{len(groups)} forget set{'s' * (len(groups) > 1)}"
    with words.busy(f"measuring {n_pairs} pairs of gradients of {n_groups}"):
        left = list(tasks)
        while left:
            signals.check()
            ended, left = ray.wait(left, num_returns=1, timeout=0.5)
            for each in ended:
                try:
                    found[each] = ray.get(each)
                except (ray.exceptions.RayError, HamuError) as error:
                    failed[next(iter(tasks[each]))] = error_words(error)
    measured = [found[each] for each in tasks if each in found]
    return Probe(groups=measured, dropped=_dropped(measured), failed=failed, seconds=time.monotonic() - started)


def measure(
    configs: Mapping[str, TrainConfig], data: Data, original: Original, key: str, n_threads: int, n_pairs: int
) -> ProbedGroup:
    """Measure the pairs that some trials share, and what each trial would do at them; takes no step.

    Args:
        configs: of the trials, by id.
        data: their rows.
        original: what they start from, and its `key`.
        n_threads: of torch, as the trials have.
        n_pairs: at most; fewer where the trials have fewer steps.
    """
    from pathlib import Path

    import torch

    from hamu.tasks.catalog import modality_of
    from hamu.training.loop import TrainingRun
    from hamu.training.original import choose_device, task_for
    from hamu.training.probe import probe_run

    torch.set_num_threads(n_threads)
    config, path = _first(configs), Path(original.path)
    task = task_for(config, data, device=choose_device(config), start=path)
    pairs = probe_run(TrainingRun(config, task, task.load_model(path)), n_pairs)
    trials = {}
    for trial_id, each in configs.items():
        share = pairs.product_of(each) if each.method.relative_constraint else 1.0
        trials[trial_id] = ProbedTrial(
            config=each,
            is_stopped=pairs.fires(each),
            largest=pairs.largest_ratio(each),
            asked=(each.constraint_ratio or 0.0) * share,
        )
    return ProbedGroup(original=key, forget_set=modality_of(config).group(config, "retain"), pairs=pairs, trials=trials)


def saved_text(probe: Probe, rows: Sequence[Mapping[str, Any]]) -> str:
    """What dropping trials has saved, in one line: what measuring took, and what they would have cost by the trials that ran.

    A trial that ends at its first step costs its set-up in a slot that is warm, one evaluation, and a step. rows: of the sweep's
    trials. Empty where none was dropped.
    """
    n = len(probe.dropped)
    if not n:
        return ""
    said = f"{n} trial{'s' * (n > 1)} dropped before {'they' if n > 1 else 'it'} ran; measuring took {probe.seconds:.1f} s"
    known = [row for row in rows if row.get("started_at") is not None]
    first_of_slot = {row.get("slot"): row for row in sorted(known, key=lambda row: -row["started_at"])}
    cold = {row["trial_id"] for row in first_of_slot.values()}
    costs = [cost for row in known if (cost := _cost_of_first_step(row, is_cold=row["trial_id"] in cold)) is not None]
    if not costs:
        return f"{said}; no trial ran that would tell what was saved"
    each = statistics.median(costs)
    return (
        f"{said}, the trials would have taken about {n * each:.1f} s of a slot ({each:.2f} s each: set-up, an evaluation and a "
        f"step, the median of {len(costs)} that ran)"
    )


def _cost_of_first_step(row: Mapping[str, Any], *, is_cold: bool) -> float | None:
    """Seconds that a trial would have taken had it ended at its first step; None where its row does not tell.

    is_cold: its set-up was that of its process too, which does not count.
    """
    setup, train = row.get("setup_s"), row.get("train_s")
    if row.get("status") not in ("finished", "pruned") or setup is None or train is None:
        return None
    in_steps, steps = row.get("steps_s") or 0.0, row.get("steps") or 0
    n_evaluations = 1 if steps == 0 else max(2.0, 1 + (row.get("epochs") or 0))  # before, and after each epoch or at the end
    return float((0.0 if is_cold else setup) + max(0.0, train - in_steps) / n_evaluations + in_steps / max(1, steps))


def _dropped(groups: Sequence[ProbedGroup]) -> dict[str, str]:
    dropped = {}
    for group in groups:
        for trial_id, trial in group.trials.items():
            if trial.is_stopped and all(trial.is_stopped):
                dropped[trial_id] = _why(trial)
    return dropped


def _why(trial: ProbedTrial) -> str:
    """Why a trial is dropped: what it asks for, and what its own rules allow at each pair."""
    config = trial.config
    share = f" = {config.constraint_ratio:.4g} of S" if config.method.relative_constraint else ""
    asked = f"constraint ratio {trial.asked:.4g}{share} was asked for"
    n = len(trial.largest)
    if trial.asked > max(trial.largest):
        at = f"its first step would allow up to {trial.largest[0]:.4g}"
        others = ", ".join(f"{bound:.4g}" for bound in trial.largest[1:])
        after = "the pair of gradients after it" if n == 2 else f"the {n - 1} pairs of gradients after it"
        more = f", {after} {others}" if others else ""
        return f"it would have ended at step 0: {asked}, {at}{more}"
    rule = config.method.stopping_rule
    return f"it would have ended at step 0: {asked}, and its stopping_rule {rule} fires at all {n} pairs of gradients"


def _group_key(config: TrainConfig) -> tuple[Any, ...]:
    flat = config.to_flat()
    reading = tuple(str(flat[name]) for name in _OF_READING)
    # The bound of a fixed radius is a ratio to the learning rate, and to the gradient of one role.
    of_radius = () if config.radius is None else (config.lr, config.method_name)
    return (data_key(config), config.training.precision, *(str(flat[name]) for name in _OF_PAIR), *reading, *of_radius)


def _first(configs: Mapping[str, TrainConfig]) -> TrainConfig:
    return next(iter(configs.values()))
