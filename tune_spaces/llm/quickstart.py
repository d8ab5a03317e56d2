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
            "unlearning_method": ("hamu-q",),
            "learning_rate": (0.2,),
            "constraint_ratio": (0.05, 0.1, 0.15, 0.2),
            "stop_on_stopping_criterion": (True,),
        },
        {
            "unlearning_method": ("hamu-u",),
            "learning_rate": (0.02,),
            "constraint_ratio": (0.1, 0.3),
            "stop_on_stopping_criterion": (True,),
        },
        {"unlearning_method": ("ga",), "learning_rate": (0.001, 0.005)},
        {"unlearning_method": ("gdiff", "kl"), "learning_rate": (0.01, 0.05)},
    ),
    # Stopped when the answers are known but not yet engraved: S is 0.8 here, and 0.2 half as many epochs later.
    original={
        "num_train_epochs": 24,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 64,
        "add_lora": True,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "no",
        "save_strategy": "no",
    },
    with_reference=True,
)
