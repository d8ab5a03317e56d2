"""The size of a sweep: `full` as its space says, `small` on embedded data, so that any space runs on 2 cores in minutes.

`small` keeps the experiment and changes its size, setting by setting, so that what was an axis still is one:

    images: digits on ResNet-20              texts: the invented authors on a small Llama with LoRA
    learning rate   times 200                times 100 to 2,000 by method (a small Llama's own: as it is)
      AdamW         as it is                 times 5
    batch           128 where it was 5,000,  as it is
                    with its square root
    epochs          times 0.06, at least 1   times 0.2, at least 1 (a small Llama's own: times 5)
    ratio           times 0.6, of S          times 0.6, of S

A ratio is a share of S, which the run measures at its first batches, since S of a small model can be of any size. It asks for
less than in print: gradients of small batches point nearly the same way where forget and retain rows are alike, and change from
step to step. The original is that of the quickstart. What has no meaning on a small model on a core is left out: types and
recomputation that save memory, lengths, revisions, other sources of rows. A space on embedded data stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hamu.methods.names import HAMU_METHODS

Settings = Mapping[str, Any]
Scaled = tuple[list[dict[str, Any]], dict[str, Any]]

FULL = "full"
_EMBEDDED = ("digits", "authors")
_DROPPED = frozenset((
    "bf16", "fp16", "gradient_checkpointing", "gradient_accumulation_steps", "no_torch_compile", "max_length", "chat_template",
    "img_size", "num_labels", "model_revision", "dataset_revision", "retain_reference", "add_lora", "lora_name", "lora_r",
    "lora_alpha", "lora_dropout", "lora_targets",
))  # fmt: skip
_SOURCES = tuple(f"{part}dataset_" for part in ("", "forget_", "duplicate_", "test_"))

RATIO_FACTOR = 0.6
IMAGE_LR, IMAGE_ADAMW_LR = 200.0, 1.0
IMAGE_BATCH, PUBLISHED_BATCH = 128, 5000
IMAGE_EPOCHS = 0.06
TEXT_LR = {
    "hamu-q": 2000.0, "ft": 2000.0, "hamu-u": 400.0, "ga": 100.0, "gru": 200.0,
    "gdiff": 1000.0, "kl": 1000.0, "scrub": 1000.0, "pcgrad": 1000.0,
}  # fmt: skip
"""By method: those that ascend alone break a small Llama at a fraction of the rate at which the others begin to move it."""
TEXT_ADAMW_LR = 5.0
TEXT_EPOCHS, TINY_EPOCHS = 0.2, 5.0

_IMAGE_ORIGINAL = {"num_train_epochs": 2, "learning_rate": 1e-3}
_TEXT_ORIGINAL = {
    "num_train_epochs": 24, "learning_rate": 1e-2, "per_device_train_batch_size": 64, "add_lora": True,
    "lr_scheduler_type": "cosine", "eval_strategy": "no", "save_strategy": "no",
}  # fmt: skip


def is_embedded(trials: Sequence[Settings]) -> bool:
    """Whether all trials are on data that needs no download, and so small already."""
    return all(trial.get("dataset_name", _EMBEDDED[0]) in _EMBEDDED for trial in trials)


def small(trials: Sequence[Settings]) -> Scaled:
    """The trials, in order, and the training of their original, on embedded data."""
    if any(trial.get("modality") == "llm" for trial in trials):
        return [_small_text(trial) for trial in trials], dict(_TEXT_ORIGINAL)
    return [_small_image(trial) for trial in trials], dict(_IMAGE_ORIGINAL)


def _small_image(trial: Settings) -> dict[str, Any]:
    scaled = _small_of_both(trial) | {"dataset_name": "digits", "model_name": "resnet20"}
    batch, epochs = trial.get("per_device_train_batch_size"), trial.get("num_train_epochs")
    if batch is not None:
        scaled["per_device_train_batch_size"] = round(IMAGE_BATCH * (batch / PUBLISHED_BATCH) ** 0.5)
    if epochs is not None:
        scaled["num_train_epochs"] = _times(max(1.0, epochs * IMAGE_EPOCHS))
    if "learning_rate" in trial:
        scaled["learning_rate"] = _times(trial["learning_rate"], IMAGE_ADAMW_LR if trial.get("use_optimizer") else IMAGE_LR)
    return scaled


def _small_text(trial: Settings) -> dict[str, Any]:
    is_tiny = trial.get("model_name") == "tiny-llama"
    scaled = _small_of_both(trial) | {"dataset_name": "authors", "model_name": "tiny-llama"}
    if "forget_pct" in trial:
        scaled["forget_pct"] = 10 if trial["forget_pct"] >= 10 else 5  # authors has no smaller share
    if "num_train_epochs" in trial:
        scaled["num_train_epochs"] = _times(max(1.0, trial["num_train_epochs"] * (TINY_EPOCHS if is_tiny else TEXT_EPOCHS)))
    if "learning_rate" in trial and not is_tiny:
        factor = TEXT_ADAMW_LR if trial.get("use_optimizer") else TEXT_LR.get(trial.get("unlearning_method", ""), 1.0)
        scaled["learning_rate"] = _times(trial["learning_rate"], factor)
    return scaled


def _small_of_both(trial: Settings) -> dict[str, Any]:
    scaled = {key: value for key, value in trial.items() if key not in _DROPPED and not key.startswith(_SOURCES)}
    if trial.get("unlearning_method") in HAMU_METHODS and trial.get("hamu_constraint") is None:
        if "constraint_ratio" in trial:
            scaled["constraint_ratio"] = _times(trial["constraint_ratio"], RATIO_FACTOR)
        scaled["relative_constraint"] = True
    return scaled


def _times(value: float, factor: float = 1.0) -> float:
    """The product as one would write it."""
    return float(f"{value * factor:.6g}")


SCALES: dict[str, Callable[[Sequence[Settings]], Scaled] | None] = {FULL: None, "small": small}
"""What becomes of a sweep's trials; None: nothing."""
