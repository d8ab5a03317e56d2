"""Checks of settings that concern more than one group, and the lines said about settings without an effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hamu.errors import ConfigError
from hamu.training.run_settings import DATASET_PARTS

if TYPE_CHECKING:
    from hamu.training.config import TrainConfig

# Parameter tensors of the models built here, so that a fixed radius can be checked before a model is.
KNOWN_BLOCKS = {"resnet20": 65}
_TEXT_SETTINGS = frozenset(("gradient_checkpointing", "forget_pct", "strict", "chat_template", "max_length"))
_HAMU_ONLY = (
    "hamu_constraint", "constraint_ratio", "hamu_radius", "use_lr_radius", "continue_on_failed_feasibility",
    "stop_on_stopping_criterion", "relative_constraint", "stopping_patience", "stopping_softness", "full_grad",
    "distribute_constraint_softmax_dp", "distribute_constraint_uniform", "no_normalize_distributed_constraint",
)  # fmt: skip


def check_together(config: TrainConfig) -> None:
    """Refuse settings that do not go together, so that none that changes a result is ignored.

    Raises:
        ConfigError: one line with the value, the rule and the mend.
    """
    from hamu.training.config import check_constraint

    _check_pairing(config)
    if config.data.dataset_repeat != 1:
        raise ConfigError(
            f"dataset_repeat {config.data.dataset_repeat}: an epoch is one pass here; multiply num_train_epochs by it instead "
            "(the command line of a single run does so)"
        )
    if config.is_text:
        _check_text(config)
    else:
        _check_text_only(config)
    lr_radius_or_whole = config.radius is None or config.method.full_grad
    blocks = 1 if lr_radius_or_whole else KNOWN_BLOCKS.get(config.run.model_name)
    if blocks is not None:
        check_constraint(config, blocks)
    if config.is_unlearning and config.training.select_best_model_by_subset_accuracy:
        raise ConfigError(
            "select_best_model_by_subset_accuracy chooses among models in training; leave it out when unlearning, "
            f"or use unlearning_method none, not {config.method_name!r}"
        )
    if config.logging.eval_strategy == "no":
        for name, is_set in (
            ("target_test_accuracy", config.training.target_test_accuracy is not None),
            ("stop_on_loss_thresholds", config.method.stop_on_loss_thresholds),
        ):
            if is_set:
                raise ConfigError(f"{name} looks at evaluations, but eval_strategy is 'no'; use eval_strategy epoch or steps")
    _check_ends(config)
    if config.is_unlearning and config.data.add_forget_to_train:
        raise ConfigError(f"add_forget_to_train is for training an original; leave it out with method {config.method_name!r}")


def _check_ends(config: TrainConfig) -> None:
    """Refuse a run without any evaluation together with what needs one."""
    if config.logging.eval_at_ends:
        return
    if config.logging.eval_strategy != "no":
        raise ConfigError(
            f"eval_at_ends False is a run without evaluations, but eval_strategy is {config.logging.eval_strategy!r}; give "
            "eval_strategy no too"
        )
    for name, is_set in (
        ("eval_generation_rows", config.logging.eval_generation_rows > 0),
        ("eval_tofu", config.logging.eval_tofu),
        ("select_best_model_by_subset_accuracy", config.training.select_best_model_by_subset_accuracy),
    ):
        if is_set:
            raise ConfigError(f"{name} looks at evaluations, but eval_at_ends is False; leave one of them out")


def _check_pairing(config: TrainConfig) -> None:
    n = config.run.num_workers
    if not config.is_split:
        if n > 1:
            split = ", or pairing 'split-gpu'" if n % 2 == 0 and (config.freeze_batchnorm or config.is_text) else ""
            raise ConfigError(f"pairing 'sequential' runs in one process, got num_workers {n}; use num_workers 1{split}")
        return
    alone = "gradient_pairing sequential with num_workers 1"
    if n % 2:
        fewer = f"{n - 1} or " if n > 1 else ""
        raise ConfigError(
            f"pairing 'split-gpu' needs an even number of processes, got {n}; use num_workers {fewer}{n + 1}, or {alone}"
        )
    device, backend = config.run.device or "", config.run.backend
    if ":" in device or (device == "cpu" and backend == "nccl"):
        raise ConfigError(
            f"device {device!r} does not go with pairing 'split-gpu'{' over nccl' * (device == 'cpu')}: each process gets a GPU "
            "of its own, or a core over gloo; use device cuda or cpu, or leave it out"
        )
    if not config.freeze_batchnorm and not config.is_text:
        freeze = "freeze_batchnorm True, or " if config.is_unlearning else ""
        raise ConfigError(
            "pairing 'split-gpu' needs frozen BatchNorm, got freeze_batchnorm False: running statistics would differ between "
            f"processes; use {freeze}{alone}"
        )


def _check_text(config: TrainConfig) -> None:
    """What texts cannot have."""
    name, dataset = config.run.model_name, config.data.dataset_name
    if name == "resnet20" or name.startswith("torchvision/"):
        raise ConfigError(f"model_name {name!r} is for images; for text give tiny-llama, a hub name or a folder")
    if dataset in ("digits", "cifar10", "cifar100"):
        raise ConfigError(
            f"dataset_name {dataset!r} holds images; for text give authors, tofu, waterdrum_tofu, a hub name, a folder or a file"
        )


def _check_text_only(config: TrainConfig) -> None:
    """What images cannot have, and what would change the result if it were ignored."""
    data, training = config.data, config.training
    if config.run.model_name == "tiny-llama" or data.dataset_name in ("authors", "tofu", "waterdrum_tofu"):
        text = data.dataset_name if config.run.model_name != "tiny-llama" else "tiny-llama"
        raise ConfigError(f"{text!r} is for text, and the modality is 'vision'; give --modality llm")
    for part in DATASET_PARTS:
        given, base = getattr(data, f"forget_dataset_{part}"), getattr(data, f"dataset_{part}")
        if given is not None and given != base:
            raise ConfigError(
                f"forget_dataset_{part} {given!r} differs from dataset_{part} {base!r}: the forget rows of images are "
                "drawn from the training rows by forget_class and hard_probability; leave it out, or use hamu.unlearn"
            )
    if data.add_duplicate_to_retain:
        raise ConfigError("add_duplicate_to_retain is for text; leave it out for images")
    if training.add_lora:
        raise ConfigError("add_lora is for text models; leave it out for images, or give --modality llm")
    if config.logging.eval_tofu or config.logging.eval_generation_rows:
        raise ConfigError("eval_tofu and eval_generation_rows are for text; leave them out for images, or give --modality llm")


def warnings_of(config: TrainConfig) -> list[str]:
    """One line for each setting that is given and has no effect, or an effect that voids a guarantee."""
    from hamu.training.config import VISION_ONLY

    said: list[str] = []
    flat = config.to_flat()
    defaults = type(config).from_flat({"modality": config.run.modality}).to_flat()
    given = {name for name, value in flat.items() if value != defaults[name]}
    if not config.is_hamu:
        without = [name for name in _HAMU_ONLY if name in given]
        if without:
            said.append(f"{', '.join(without)}: no effect, method {config.method_name!r} has no constraint")
    elif config.method.use_optimizer:
        said.append("use_optimizer: AdamW changes HAMU's step, so its radius and constraint are not guaranteed")
    pace = [name for name in ("stopping_patience", "stopping_softness") if name in given]
    if pace and config.is_hamu and not config.method.stop_on_stopping_criterion:
        said.append(f"{', '.join(pace)}: no effect without stop_on_stopping_criterion")
    if config.is_hamu and config.method.use_lr_radius and config.method.hamu_radius is not None:
        said.append(f"hamu_radius {config.method.hamu_radius:g}: no effect with use_lr_radius; leave one of them out")
    if not (config.is_text or config.is_unlearning) and config.data.add_forget_to_train and config.data.hard_probability:
        said.append(f"hard_probability {config.data.hard_probability:g}: no effect, an original is trained with 0 for every rho")
    if not config.is_unlearning and config.method.use_optimizer:
        said.append("use_optimizer: no effect, training always uses AdamW")
    if config.optimizer_name == "sgd" and config.training.weight_decay:
        said.append(f"weight_decay {config.training.weight_decay:g}: no effect on plain SGD; it is for AdamW")
    idle = [name for name in ("backend", "ddp_timeout", "ray_address") if name in given and not config.is_split]
    if idle:
        said.append(f"{', '.join(idle)}: no effect, pairing {config.run.gradient_pairing!r} runs in one process without Ray")
    if config.method_name != "scrub" and given & {"scrub_alpha", "scrub_gamma"}:
        said.append(f"scrub_alpha, scrub_gamma: no effect, the method is {config.method_name!r}")
    if config.method_name != "gru" and "gru_beta" in given:
        said.append(f"gru_beta: no effect, the method is {config.method_name!r}")
    thresholds = {"retain_loss_stop_threshold", "forget_loss_stop_threshold"}
    if given & thresholds and not config.method.stop_on_loss_thresholds:
        said.append("loss thresholds: no effect without stop_on_loss_thresholds")
    if config.is_text:
        said += [f"{name}: for images, no effect on text" for name in sorted(given & VISION_ONLY)]
        lora = sorted(name for name in given if name.startswith("lora_"))
        if lora and not config.training.add_lora:
            said.append(f"{', '.join(lora)}: no effect without add_lora")
    else:
        said += [f"{name}: for text, no effect on images" for name in sorted(given) if _is_idle_text(name)]
    said += _logging_warnings(config, given)
    return said


def _is_idle_text(name: str) -> bool:
    return name.startswith(("duplicate_dataset_", "lora_")) or name in _TEXT_SETTINGS


def _logging_warnings(config: TrainConfig, given: set[str]) -> list[str]:
    said = []
    for kind in ("logging", "eval", "save"):
        strategy = getattr(config.logging, f"{kind}_strategy")
        if f"{kind}_steps" in given and strategy != "steps":
            said.append(f"{kind}_steps: no effect with {kind}_strategy {strategy!r}; use {kind}_strategy steps")
    if "longer_eval_steps" in given:
        said.append("longer_eval_steps: no effect, every evaluation covers all rows; eval_steps sets how often")
    if given & {"eval_on_start", "eval_on_subsets", "eval_on_forget"}:
        said.append("eval_on_*: no effect, retain, forget and test rows are always evaluated, before the start too")
    if config.logging.use_wandb:
        said.append("use_wandb: arrives later; records are in Parquet files under the output folder")
    return said
