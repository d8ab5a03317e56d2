"""Llama-2: what the steps after the criterion fires cost: the margin of every step is recorded, and none ends the run.

The same two trials ended by the criterion are in llm/constraint_sweep.
"""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/stopping_criterion",
    script="llm stopping_criterion",
    summary="forget 10 % of WaterDrum-TOFU: hamu-q and hamu-u run on to the end past the stopping criterion",
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
            "constraint_ratio": (0.5,),
            "stop_on_stopping_criterion": (False,),
            "continue_on_failed_feasibility": (True,),
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
