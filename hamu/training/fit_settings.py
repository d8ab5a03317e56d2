"""Settings of optimisation and of evaluation; the fields are the flags of `python -m hamu.cli.train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hamu.errors import ConfigError
from hamu.training.fields import check_choice, check_range, setting

LR_SCHEDULES = ("constant", "linear", "cosine")
STRATEGIES = ("no", "steps", "epoch")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How long, how fast and how precisely a model is trained or unlearned."""

    _argument_group_name: ClassVar[str] = "training"

    num_train_epochs: float = setting(3.0, "epochs of ceil(retain rows / batch) steps; a fraction is allowed")
    per_device_train_batch_size: int = setting(128, "rows of each role a step and process")
    per_device_eval_batch_size: int = setting(512, "rows a forward pass of an evaluation")
    gradient_accumulation_steps: int = setting(1, "batches averaged into one step")
    learning_rate: float | None = setting(None, "default 1e-3 when training, 1e-4 when unlearning")
    weight_decay: float = setting(0.0, "decay of AdamW; plain SGD (unlearning) has none")
    lr_scheduler_type: str = setting("constant", f"{', '.join(LR_SCHEDULES)}; radius and constraint follow it too")
    max_grad_norm: float = setting(1.0, "each of the two gradients is clipped to this L2 norm first")
    fp16: bool = setting(False, "float16 autocast (GPU)")
    bf16: bool = setting(False, "bfloat16 autocast of the forward pass")
    gradient_checkpointing: bool = setting(False, "text: recompute activations in the backward pass, to save memory")
    no_torch_compile: bool = setting(False, "do not compile the model (never compiled on a CPU)")
    select_best_model_by_subset_accuracy: bool = setting(
        False, "training: keep the best evaluated model, by retain (and, for the original, forget) accuracy"
    )
    target_test_accuracy: float | None = setting(None, "end at the first evaluation with this test accuracy, in (0, 1]")
    add_lora: bool = setting(
        False, "text: train a LoRA adapter on the frozen model; unlearning goes on with the adapter that its model has"
    )
    lora_name: str = setting("default", "text: name of the adapter")
    lora_r: int = setting(8, "text: its rank")
    lora_alpha: float = setting(16.0, "text: its scale, times 1 / rank")
    lora_dropout: float = setting(0.0, "text: its dropout, in [0, 1)")
    lora_targets: str = setting("all-linear", "text: modules that get it, by name with commas; all-linear: every projection")

    def __post_init__(self) -> None:
        check_range("num_train_epochs", self.num_train_epochs, above=0)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_range(name, getattr(self, name), low=1)
        check_range("lora_r", self.lora_r, low=1)
        check_range("learning_rate", self.learning_rate, above=0)
        check_range("weight_decay", self.weight_decay, low=0)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, LR_SCHEDULES)
        check_range("max_grad_norm", self.max_grad_norm, above=0, mend="a large number clips nothing")
        check_range("target_test_accuracy", self.target_test_accuracy, above=0, high=1)
        check_range("lora_alpha", self.lora_alpha, above=0)
        check_range("lora_dropout", self.lora_dropout, low=0, high=0.99)
        if self.fp16 and self.bf16:
            raise ConfigError("fp16 and bf16 are both given; autocast has one type: give one")

    @property
    def precision(self) -> str:
        """Type of the forward passes: "fp32", "bf16" or "fp16"; Grams, weights and updates are fp32 or better."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """When steps are recorded, models evaluated and checkpoints written.

    A `*_steps` below 1 is a fraction of an epoch, a whole number from 1 up a number of steps (`steps_between`).
    """

    _argument_group_name: ClassVar[str] = "logging"

    logging_strategy: str = setting("steps", "when a step is recorded: no, steps or epoch")
    logging_steps: float = setting(1.0, "every so many steps; below 1: that fraction of an epoch")
    eval_strategy: str = setting("epoch", "when the model is evaluated, besides start and end: no, steps or epoch")
    eval_steps: float | None = setting(None, "every so many steps; below 1: that fraction of an epoch")
    eval_at_ends: bool = setting(
        True, "evaluate before the first step and at the end; False, for timing: no evaluation at all (eval_strategy no)"
    )
    longer_eval_steps: int | None = setting(None, "no meaning here: every evaluation is complete")
    eval_on_start: bool = setting(False, "no meaning here: an evaluation before the start is always made")
    eval_on_subsets: bool = setting(False, "no meaning here: retain, forget and test rows are always evaluated")
    eval_on_forget: bool = setting(False, "no meaning here: forget rows are always evaluated")
    eval_generation_rows: int = setting(
        0, "text: rows of each split whose answers are generated at the end, for ROUGE-L recall; 0: none"
    )
    eval_tofu: bool = setting(
        False, "text: TOFU's truth ratio, forget quality and model utility at the end (its perturbed files)"
    )
    retain_reference: str | None = setting(
        None, "text: folder of the retain-only model that forget quality compares with (evaluated with eval_tofu)"
    )
    save_strategy: str = setting("epoch", "when a checkpoint to resume from is written: no, steps or epoch")
    save_steps: float | None = setting(None, "every so many steps; below 1: that fraction of an epoch")
    use_wandb: bool = setting(False, "Weights & Biases (off unless asked for; arrives later)")
    wandb_project: str = setting("hamu", "its project")
    wandb_entity: str | None = setting(None, "its entity")
    wandb_run_name: str | None = setting(None, "its run name")
    wandb_tags: list[str] | None = setting(None, "its tags")
    wandb_notes: str | None = setting(None, "its notes")

    def __post_init__(self) -> None:
        for name in ("logging", "eval", "save"):
            check_choice(f"{name}_strategy", getattr(self, f"{name}_strategy"), STRATEGIES)
            if (every := getattr(self, f"{name}_steps")) is not None:
                steps_between(every, 1, name=f"{name}_steps")
        check_range("eval_generation_rows", self.eval_generation_rows, low=0)
        if self.retain_reference is not None and not self.eval_tofu:
            raise ConfigError(
                f"retain_reference {self.retain_reference!r} is for forget quality; give --eval_tofu, which measures it"
            )
        if self.save_strategy == "steps" and self.save_steps is None:
            raise ConfigError("save_strategy 'steps' needs save_steps; give it, or use save_strategy epoch")

    def every(self, kind: str, steps_per_epoch: int) -> int | None:
        """Steps between two events of `kind` ("logging", "eval" or "save"), or None for never.

        `eval_strategy steps` without `eval_steps` takes `logging_steps`.
        """
        strategy = getattr(self, f"{kind}_strategy")
        if strategy == "no":
            return None
        if strategy == "epoch":
            return max(1, steps_per_epoch)
        value = getattr(self, f"{kind}_steps")
        return steps_between(self.logging_steps if value is None else value, steps_per_epoch, name=f"{kind}_steps")


def steps_between(value: float, steps_per_epoch: int, *, name: str = "steps") -> int:
    """Steps between two events: `value` itself from 1 up, `value * steps_per_epoch` rounded (at least 1) below 1.

    >>> steps_between(0.25, 12), steps_between(5, 12), steps_between(0.01, 12)
    (3, 5, 1)

    Raises:
        ConfigError: the value is not above 0, or above 1 and not whole.
    """
    check_range(name, value, above=0, mend="below 1 it is a fraction of an epoch, else a number of steps")
    if value < 1:
        return max(1, round(value * steps_per_epoch))
    if not float(value).is_integer():
        raise ConfigError(f"{name} must be a whole number of steps or a fraction of an epoch below 1, got {value!r}")
    return int(value)
