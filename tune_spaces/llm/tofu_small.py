"""Real TOFU, forget05, on the small Llama in half an hour of 2 cores: every method at a few learning rates.

With the files at hand: --set dataset_name=/path/to/tofu (forget05.json, retain95.json, holdout05.json).
"""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/tofu_small",
    summary="forget 5 % of TOFU with a small Llama: all nine methods at a few learning rates",
    base={
        "modality": "llm",
        "dataset_name": "tofu",
        "forget_pct": 5,
        "model_name": "tiny-llama",
        "seed": 42,
        "per_device_train_batch_size": 50,
        "num_train_epochs": 0.4,
        "eval_strategy": "no",
        "save_strategy": "no",
    },
    grids=(
        {
            "unlearning_method": ("hamu-q",),
            "learning_rate": (0.2, 0.4),
            "constraint_ratio": (0.2, 0.5),
            "stop_on_stopping_criterion": (True,),
        },
        {
            "unlearning_method": ("hamu-u",),
            "learning_rate": (0.01, 0.03),
            "constraint_ratio": (0.2,),
            "stop_on_stopping_criterion": (True,),
        },
        {"unlearning_method": ("ft",), "learning_rate": (0.3,)},
        {"unlearning_method": ("ga", "gru"), "learning_rate": (0.02, 0.05)},
        {"unlearning_method": ("gdiff", "kl", "scrub", "pcgrad"), "learning_rate": (0.1, 0.3)},
    ),
    original={
        "num_train_epochs": 14,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 64,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "no",
        "save_strategy": "no",
    },
)
