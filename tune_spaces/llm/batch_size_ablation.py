"""Llama-2: what noisier gradients of small batches do to a constraint on every step."""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/batch_size_ablation",
    script="llm batch_size_ablation",
    summary="forget 10 % of WaterDrum-TOFU: hamu-q at five batch sizes",
    base={
        "modality": "llm",
        "dataset_name": "waterdrum_tofu",
        "forget_pct": 10,
        "model_name": "meta-llama/Llama-2-7b-chat-hf",
        "seed": 42,
        "learning_rate": 1e-4,
        "num_train_epochs": 10,
        "bf16": True,
        "gradient_checkpointing": True,
    },
    grids=(
        {
            "unlearning_method": ("hamu-q",),
            "per_device_train_batch_size": (16, 32, 50, 64, 128),
            "constraint_ratio": (0.5,),
            "stop_on_stopping_criterion": (True,),
        },
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
