"""Invented authors in minutes: HAMU against three baselines on a small Llama that knows the authors by heart."""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/quickstart",
    summary="forget four invented authors: hamu-q, hamu-u and three baselines on a small Llama with LoRA",
    base={
        "modality": "llm",
        "dataset_name": "authors",
        "model_name": "tiny-llama",
        "seed": 42,
        "per_device_train_batch_size": 50,
        "num_train_epochs": 5,
    },
    grids=(
        {
            "unlearning_method": ("hamu-q", "hamu-u"),
            "learning_rate": (0.3,),
            "constraint_ratio": (0.1, 0.2, 0.4),
            "stop_on_stopping_criterion": (True,),
        },
        {"unlearning_method": ("ga", "gdiff", "kl"), "learning_rate": (0.1, 0.3)},
    ),
    original={
        "num_train_epochs": 60,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 64,
        "add_lora": True,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "no",
        "save_strategy": "no",
    },
)
