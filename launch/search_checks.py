"""Refuses a search that the trials of its plan give nothing to go by. Torch-free; neither Ray nor optuna is imported."""

from __future__ import annotations

from collections.abc import Iterable

from hamu.errors import ConfigError
from hamu.training.config import TrainConfig
from hamu.training.records import METRIC_COLUMNS
from launch.plan import Plan
from tune_spaces.goals import parse_conditions
from tune_spaces.optuna_search import SAMPLERS, check_optuna
from tune_spaces.search import SearchSettings

_AT_END = frozenset(name for name in METRIC_COLUMNS if name.startswith("tofu_") or name.endswith("_rouge"))
"""Metrics that are measured once, at the end of a trial, if at all."""


def check_search(plan: Plan) -> None:
    """Refuse a plan whose search, target, ending rule or scheduler goes by what its trials do not measure.

    Raises:
        ConfigError: as said, or the search needs optuna and it is not installed.
    """
    search = plan.search
    if search.name in SAMPLERS:
        check_optuna()
    _check_evaluated(search, plan.configs.values())
    for kind, texts in (("target", search.target), ("keep", search.keep)):
        for condition in parse_conditions(texts, kind):
            _check_measured(condition.metric, f"--{kind} {','.join(texts)!r}", plan)
    score = search.score.removeprefix("-")
    if search.scheduler is not None and score in _AT_END:
        raise ConfigError(
            f"scheduler {search.scheduler!r} with score {search.score!r}: it goes by evaluations on the way, and {score} is "
            "measured at a trial's end alone; use --score balance, or another metric"
        )


def _check_evaluated(search: SearchSettings, configs: Iterable[TrainConfig]) -> None:
    """Whatever learns from results needs them; the grid's order and chance do not."""
    if search.target:
        what = f"--target {','.join(search.target)!r}"
    elif search.until is not None:
        what = f"--until {search.until}"
    elif search.name in SAMPLERS:
        what = f"--search {search.name}"
    else:
        return
    if any(not config.logging.eval_at_ends for config in configs):
        raise ConfigError(
            f"{what} goes by the trials' metrics, and with eval_at_ends False none is measured; use --set eval_at_ends=true, or "
            f"leave out {what.split()[0]}"
        )


def _check_measured(metric: str, what: str, plan: Plan) -> None:
    """A metric that only some settings measure must be measured by all trials."""
    if metric not in _AT_END:
        return
    for trial in plan.trials:
        config = plan.configs[trial.trial_id]
        if not config.is_text:
            raise ConfigError(f"{what}: {metric} is a metric of texts, and the trials are of images; give another metric")
        if lacking := _lacking(metric, config, has_reference=trial.reference is not None):
            raise ConfigError(f"{what}: the trials do not measure {metric}; add {' '.join(lacking)}, or give another metric")


def _lacking(metric: str, config: TrainConfig, *, has_reference: bool) -> list[str]:
    """The flags without which a text metric is not measured."""
    lacking = []
    if metric.startswith("tofu_") and not config.logging.eval_tofu:
        lacking.append("--set eval_tofu=true")
    if (metric.endswith("_rouge") or metric == "tofu_model_utility") and not config.logging.eval_generation_rows:
        lacking.append("--set eval_generation_rows=20")
    if metric.startswith("tofu_forget_quality") and not has_reference and config.logging.retain_reference is None:
        lacking.append("--with-reference")
    return lacking
