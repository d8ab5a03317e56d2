"""Llama-2: what a method costs: seconds of training and peak memory of each process (`steps_s`, `peak_bytes_per_rank`)."""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/timing_all",
    script="llm timing_all",
    summary="one epoch of each of the nine methods on WaterDrum-TOFU without evaluation: time and memory",
    base={
        "modality": "llm",
        "dataset_name": "waterdrum_tofu",
        "forget_pct": 10,
        "model_name": "meta-llama/Llama-2-7b-chat-hf",
        "seed": 42,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 50,
        "num_train_epochs": 1,
        "bf16": True,
        "gradient_checkpointing": True,
        "eval_strategy": "no",
        "eval_at_ends": False,
        "save_strategy": "no",
    },
    grids=(
        # Every method takes the same steps: none stops at its criterion.
        {"unlearning_method": ("hamu-q", "hamu-u"), "constraint_ratio": (0.5,), "continue_on_failed_feasibility": (True,)},
        {"unlearning_method": ("ft", "ga", "gdiff", "kl", "scrub", "gru", "pcgrad")},
    ),
    original={
        "num_train_epochs": 10,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 64,
        "add_lora": True,
        "bf16": True,
        "gradient_checkpointing": True,
        "eval_strategy": "no",
    },
)
