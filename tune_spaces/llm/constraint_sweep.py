"""WaterDrum-TOFU, a tenth of it: how much forgetting a step may demand of Llama-2 before the retained answers pay for it."""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/constraint_sweep",
    script="llm constraint_sweep",
    summary="forget 10 % of WaterDrum-TOFU with Llama-2-7b and LoRA: hamu-q and hamu-u over constraint ratios 0 to 0.9",
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
            "constraint_ratio": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
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
