"""Llama-2: forgetting answers of which the retained rows hold the same in other words."""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/semantic_similarity_sweep",
    script="llm semantic_similarity_sweep",
    summary="forget 10 % of WaterDrum-TOFU with and without semantic duplicates among the retained rows, seven methods",
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
            "add_duplicate_to_retain": (False, True),
            "unlearning_method": ("hamu-q", "hamu-u"),
            "constraint_ratio": (0.5,),
            "stop_on_stopping_criterion": (True,),
        },
        {"add_duplicate_to_retain": (False, True), "unlearning_method": ("ft", "ga", "gdiff", "kl", "scrub")},
    ),
    # An original for each: it has learned the duplicates too, or not.
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
