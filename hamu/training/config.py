"""The whole configuration of a run: five groups of settings, their cross-checks, and what follows from them.

    config = TrainConfig.from_flat({"method": "hamu-q", "constraint_ratio": 0.1, "lr": 1e-4, "epochs": 1})

Torch-free: a command line or a sweep is checked before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from hamu.errors import ConfigError
from hamu.methods.names import HAMU_METHODS
from hamu.training.fields import merge_known, settings_of
from hamu.training.fit_settings import LogConfig, OptimConfig, steps_between
from hamu.training.method_settings import DEFAULT_CONSTRAINT_RATIO, NO_METHOD, MethodConfig
from hamu.training.run_settings import DataConfig, RunConfig

__all__ = [
    "ALIASES", "GROUPS", "KNOWN", "DataConfig", "LogConfig", "MethodConfig", "OptimConfig", "RunConfig", "TrainConfig",
    "check_constraint", "steps_between",
]  # fmt: skip

GROUPS: dict[str, type] = {
    "run": RunConfig,
    "data": DataConfig,
    "method": MethodConfig,
    "training": OptimConfig,
    "logging": LogConfig,
}
KNOWN: dict[str, tuple[type, bool]] = {
    name: kind for cls in GROUPS.values() for name, kind in settings_of(cls).items() if not name.startswith("_")
}
ALIASES = {
    "method": "unlearning_method",
    "rho": "hard_probability",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}
TRAINING_LR, UNLEARNING_LR = 1e-3, 1e-4
# Settings that came later: at their defaults they are left out of a recipe, which names folders of earlier runs.
_LATER = {
    "model_revision": None, "dataset_revision": None, "relative_constraint": False, "stopping_patience": 1,
    "stopping_softness": 0.0, "eval_at_ends": True,
}  # fmt: skip
_ROUNDING = 1e-9  # a ratio of exactly 1 must not fail by the rounding of ratio * lr

# What ends a training run too, among the settings of the method.
_LOSS_THRESHOLDS = ("stop_on_loss_thresholds", "retain_loss_stop_threshold", "forget_loss_stop_threshold")
# What a kind of data takes in place of the fields' defaults, which are those of images.
MODALITY_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision": {},
    "llm": {
        "model_name": "tiny-llama",
        "dataset_name": "authors",
        "per_device_train_batch_size": 50,
        "per_device_eval_batch_size": 64,
    },
}
# What only the one or the other kind of data has; of the other it changes no result.
VISION_ONLY = frozenset(("num_labels", "img_size", "forget_class", "hard_probability", "split_ratio"))
_TEXT_ONLY = frozenset(("strict", "chat_template", "max_length", "forget_pct", "lora_targets"))
# Recipes name folders, so those of images keep what they have held since before texts had a meaning here.
_LORA_OF_IMAGES = {"lora_name": "added", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
# What does not change a result: places, pace of recording, and flags without a meaning for the numbers.
_NOT_RECIPE = frozenset((
    "output_dir", "final_model_output_dir", "artifact_root", "resume", "dry_run", "fetch", "debug", "device",
    "backend", "ddp_timeout", "ray_address",
    "dataset_cache_dir", "no_torch_compile", "per_device_eval_batch_size", "gradient_checkpointing", "logging_strategy",
    "logging_steps", "longer_eval_steps", "eval_on_start", "eval_on_subsets", "eval_on_forget", "save_strategy",
    "save_steps", "use_wandb", "eval_generation_rows", "eval_tofu", "retain_reference",
    "wandb_project", "wandb_entity", "wandb_run_name", "wandb_tags", "wandb_notes",
))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: training (`unlearning_method` none) or unlearning. Built, it is known to be consistent.

    Raises:
        ConfigError: a setting is out of range, or two of them do not go together.
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    training: OptimConfig = field(default_factory=OptimConfig)
    logging: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        from hamu.training.config_checks import check_together

        check_together(self)

    @classmethod
    def from_flat(cls, given: Mapping[str, Any]) -> Self:
        """Build from a flat mapping of setting -> value; aliases: method, rho, lr, epochs, batch_size.

        Raises:
            ConfigError: a key is unknown (the nearest is named), a value unreadable, or a check fails.
        """
        flat = merge_known(given, KNOWN, ALIASES)
        flat = {**MODALITY_DEFAULTS.get(flat.get("modality", ""), {}), **flat}
        parts = {}
        for group, group_cls in GROUPS.items():
            parts[group] = group_cls(**{name: flat[name] for name in settings_of(group_cls) if name in flat})
        return cls(**parts)

    def to_flat(self) -> dict[str, Any]:
        """Every setting by its flag name, as given (unresolved None included); JSON-able; `from_flat` reads it back."""
        return {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(self, group)).items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed; a new constraint (or ratio) takes the place of the other form."""
        flat = merge_known(changes, KNOWN, ALIASES)
        base = self.to_flat()
        for name, other in (("constraint_ratio", "hamu_constraint"), ("hamu_constraint", "constraint_ratio")):
            if flat.get(name) is not None and other not in flat:
                base[other] = None
        return type(self).from_flat({**base, **flat})

    def recipe_hash(self) -> str:
        """Eight hex digits that two configurations share if they compute the same numbers."""
        left_out = _NOT_RECIPE | (VISION_ONLY if self.is_text else _TEXT_ONLY)
        flat = {name: value for name, value in self.to_flat().items() if name not in left_out}
        flat |= {} if self.is_text else _LORA_OF_IMAGES
        for name in [name for name, default in _LATER.items() if flat[name] == default]:
            del flat[name]
        if not self.is_unlearning:
            kept = _LOSS_THRESHOLDS if self.method.stop_on_loss_thresholds else ()
            for name in settings_of(MethodConfig):
                if name not in kept:
                    flat.pop(name, None)
        flat.update(learning_rate=self.lr, shuffle_seed=self.shuffle_seed, freeze_batchnorm=self.freeze_batchnorm)
        if self.is_unlearning:
            flat.update(hamu_constraint=self.constraint, constraint_ratio=None)
            flat.update(hamu_radius=self.radius, split=self.split)
            for name in [key for key in flat if key.startswith("distribute_") or key == "use_lr_radius"]:
                del flat[name]
        return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def method_name(self) -> str:
        """Name of the unlearning method; "none" when training."""
        return self.method.unlearning_method

    @property
    def is_text(self) -> bool:
        """Whether the rows are texts; else images."""
        return self.run.modality == "llm"

    @property
    def is_unlearning(self) -> bool:
        """Whether this run unlearns; else it trains."""
        return self.method_name != NO_METHOD

    @property
    def is_split(self) -> bool:
        """Whether several processes share each step (pairing split-gpu); else one does it all."""
        return self.run.gradient_pairing == "split-gpu"

    @property
    def rows_per_step(self) -> int:
        """Rows of each role a step, as `rows_per_step_of` the run's own number of processes."""
        return self.rows_per_step_of(self.run.num_workers)

    def rows_per_step_of(self, n_processes: int) -> int:
        """Rows of each role a step in so many processes: a pair takes the rows of one; in plain training each process does."""
        n_shares = max(1, n_processes // 2) if self.is_unlearning else n_processes
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps * n_shares

    @property
    def is_hamu(self) -> bool:
        """Whether the method is HAMU-Q or HAMU-U, the ones with a constraint and a radius."""
        return self.method_name in HAMU_METHODS

    @property
    def lr(self) -> float:
        """Learning rate; default 1e-3 when training, 1e-4 when unlearning."""
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        return UNLEARNING_LR if self.is_unlearning else TRAINING_LR

    @property
    def shuffle_seed(self) -> int:
        """Seed of the order of rows; default: `seed`."""
        return self.run.seed if self.run.shuffle_seed is None else self.run.shuffle_seed

    @property
    def constraint(self) -> float:
        """Required first-order loss change a step, in nats (>= 0); 0 for a method without one.

        With `relative_constraint` it is per unit of S, which only a run can measure: `constraint_of`.
        """
        if not self.is_hamu:
            return 0.0
        if self.method.hamu_constraint is not None:
            return self.method.hamu_constraint
        ratio = self.method.constraint_ratio
        return (DEFAULT_CONSTRAINT_RATIO if ratio is None else ratio) * self.lr

    @property
    def constraint_ratio(self) -> float | None:
        """constraint / lr as given (default 0.5), with `relative_constraint` a share of S; None for a method without one."""
        if not self.is_hamu:
            return None
        if self.method.hamu_constraint is not None:
            return self.method.hamu_constraint / self.lr
        ratio = self.method.constraint_ratio
        return DEFAULT_CONSTRAINT_RATIO if ratio is None else ratio

    def constraint_of(self, product: float | None) -> float:
        """The constraint in nats, at S = `product`; an S that is not known (None), or not finite, asks for nothing."""
        if not self.method.relative_constraint:
            return self.constraint
        return self.constraint * product if product is not None and math.isfinite(product) else 0.0

    def ratio_words(self, product: float | None) -> str:
        """The constraint ratio in words: as given, and for a share of S = `product` what it resolves to."""
        if not self.method.relative_constraint:
            return f"{self.constraint_ratio:.4g}"
        resolved = "" if product is None else f" = {self.constraint_of(product) / self.lr:.4g}"
        return f"{self.constraint_ratio:.4g} of S{resolved}"

    @property
    def radius(self) -> float | None:
        """Fixed radius of a block's weight change (L2); None: the lr radius, lr * ||g|| of the block."""
        return self.method.radius

    @property
    def split(self) -> str:
        """How the constraint is split over blocks: "grad_norm" (default), "softmax_dp" or "uniform"."""
        return self.method.split

    @property
    def on_infeasible(self) -> str:
        """What an infeasible constraint does: "stop" (default) or "continue"."""
        return self.method.on_infeasible

    @property
    def freeze_batchnorm(self) -> bool:
        """Whether BatchNorm statistics are fixed; default: when unlearning, not when training."""
        return self.is_unlearning if self.method.freeze_batchnorm is None else self.method.freeze_batchnorm

    @property
    def optimizer_name(self) -> str:
        """ "adamw" when training or with `use_optimizer`, else "sgd"."""
        return "sgd" if self.is_unlearning and not self.method.use_optimizer else "adamw"

    @property
    def dataset_cache_dir(self) -> str:
        """Folder of the dataset cache; default `<artifact_root>/dataset_cache`."""
        return self.data.dataset_cache_dir or f"{self.run.artifact_root}/dataset_cache"

    def warnings(self) -> list[str]:
        """One line for each setting given that has no effect, or one that the user should not expect."""
        from hamu.training.config_checks import warnings_of

        return warnings_of(self)


def check_constraint(config: TrainConfig, n_blocks: int) -> None:
    """Refuse a constraint that no clipped gradients could meet: Q > limit, in nats.

    Limit: lr * M^2 (lr radius), radius * M (fixed, whole model), radius * sqrt(n_blocks) * M (fixed, per block), with
    M = `max_grad_norm`. Source: Cauchy-Schwarz over blocks. A share of S above 1 is refused with the lr radius: no step at the
    gradients where S is measured changes a loss by more than lr * S (which is at most lr * M^2).

    Args:
        config: any configuration; only HAMU has a constraint.
        n_blocks: parameter tensors of the model, >= 1; without a meaning for the lr radius and whole-model mode.

    Raises:
        ConfigError: the constraint is larger than the limit.
    """
    if not config.is_hamu:
        return
    if config.method.relative_constraint:
        ratio = config.constraint / config.lr
        if config.radius is None and ratio > 1 + _ROUNDING:
            raise ConfigError(
                f"constraint_ratio {ratio:g} of S (relative_constraint) is more than any step could meet where S is measured; "
                "use a constraint_ratio of at most 1, or leave relative_constraint out"
            )
        return
    norm, constraint = config.training.max_grad_norm, config.constraint
    if config.radius is None:
        limit = config.lr * norm**2
        shown = f"learning_rate {config.lr:g} * {norm:g}"
    else:
        blocks = 1 if config.method.full_grad else n_blocks
        limit = config.radius * blocks**0.5 * norm
        shown = f"{config.radius:g}" + (f" * sqrt({blocks} blocks)" if blocks > 1 else "")
    if constraint > limit * (1 + _ROUNDING):
        raise ConfigError(
            f"constraint {constraint:g} (constraint_ratio {constraint / config.lr:g}) is larger than radius * max_grad_norm = "
            f"{limit:g} (radius {shown}, max_grad_norm {norm:g}), so no gradients could meet it; use a constraint_ratio of at "
            f"most {limit / config.lr:g} (hamu_constraint {limit:g})"
        )
