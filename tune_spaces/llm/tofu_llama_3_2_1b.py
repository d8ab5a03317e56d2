"""TOFU on Llama-3.2-1B-Instruct: forget 1, 5 and 10 % with baselines at published settings, and HAMU beside them. Not run.

Published figures of one run each without tuning (open-unlearning, docs/repro.md: 2 x L40S, effective batch 32, 10 epochs, AdamW,
learning rate 1e-5), as forget quality / model utility / forget truth ratio, to compare orders of magnitude with:

                forget01        forget05             forget10
    finetuned   .01/.60/.47     1.3e-13/.60/.47      1.7e-21/.60/.48
    retain      1/.60/.65       1/.60/.64            1/.59/.63
    ga          .27/.33/.59     1.9e-119/0/~0        1e-239/0/~0
    gdiff       .77/.43/.57     1.9e-119/.53/~0      1e-239/.49/~0

Forget quality needs a retain-only model of the same forget set, so one sweep for each: `--set forget_pct=5 --set
retain_reference=<its folder>`; model utility needs `--set eval_generation_rows=400`.
"""

from tune_spaces.space import Space

SPACE = Space(
    name="llm/tofu_llama_3_2_1b",
    summary="forget 1, 5 and 10 % of TOFU with Llama-3.2-1B: hamu-q, hamu-u, and ga, gdiff, kl at published settings",
    base={
        "modality": "llm",
        "dataset_name": "tofu",
        "model_name": "meta-llama/Llama-3.2-1B-Instruct",
        "seed": 42,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 10,
        "bf16": True,
        "gradient_checkpointing": True,
        "eval_tofu": True,
    },
    grids=(
        {
            "unlearning_method": ("hamu-q", "hamu-u"),
            "forget_pct": (1, 5, 10),
            "learning_rate": (1e-4,),
            "constraint_ratio": (0.25, 0.5),
            "stop_on_stopping_criterion": (True,),
        },
        {
            "unlearning_method": ("ga", "gdiff", "kl"),
            "forget_pct": (1, 5, 10),
            "learning_rate": (1e-5,),
            "use_optimizer": (True,),
            "weight_decay": (0.01,),
        },
    ),
    original={
        "num_train_epochs": 10,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 32,
        "bf16": True,
        "gradient_checkpointing": True,
        "eval_strategy": "no",
    },
)
