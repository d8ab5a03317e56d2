"""Llama-2: the seven methods that HAMU is compared with."""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/additional_baselines",
    script="llm additional_baselines",
    summary="forget 10 % of WaterDrum-TOFU: seven baselines",
    base={
        "modality": "llm",
        "dataset_name": "waterdrum_tofu",
        "forget_pct": 10,
        "model_name": "meta-llama/Llama-2-7b-chat-hf",
        "seed": 42,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 50,
        "num_train_epochs": 10,
        "bf16": True,
        "gradient_checkpointing": True,
    },
    grids=({"unlearning_method": ("gru", "pcgrad", "ft", "ga", "gdiff", "kl", "scrub")},),
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
