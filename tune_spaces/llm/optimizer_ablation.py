"""Llama-2: HAMU's step taken as it is (plain SGD), or handed to AdamW, which voids its guarantee."""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/optimizer_ablation",
    script="llm optimizer_ablation",
    summary="forget 10 % of WaterDrum-TOFU: hamu-q and hamu-u with SGD and with AdamW",
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
    grids=(
        {
            "unlearning_method": ("hamu-q", "hamu-u"),
            "use_optimizer": (False, True),
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
