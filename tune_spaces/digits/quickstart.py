"""Digits in two minutes: HAMU against two baselines, over constraint ratios and learning rates."""

from tune_spaces.space import Space

SPACE = Space(
    name="digits/quickstart",
    summary="forget one digit: hamu-q, hamu-u and two baselines over constraint ratios and learning rates",
    base={
        "dataset_name": "digits",
        "model_name": "resnet20",
        "forget_class": 0,
        "seed": 42,
        "per_device_train_batch_size": 128,
        "num_train_epochs": 7,
    },
    grids=(
        {
            "unlearning_method": ("hamu-q", "hamu-u"),
            "learning_rate": (0.01, 0.02),
            "constraint_ratio": (0.05, 0.1, 0.2, 0.4, 0.8),
            "stop_on_stopping_criterion": (True,),
        },
        {"unlearning_method": ("gdiff", "ft"), "learning_rate": (0.005, 0.01, 0.02)},
    ),
    # Short on purpose: S, the sum of ||g_r|| ||g_f|| over blocks, shrinks as an original converges, and with it every
    # constraint ratio that a step can meet. The retain-only model is trained as long, so that the two can be compared.
    original={"num_train_epochs": 2, "learning_rate": 1e-3},
    with_reference=True,
)
