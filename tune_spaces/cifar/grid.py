"""CIFAR-10: HAMU over seeds, hardness, learning rates and constraint ratios."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/grid",
    script="cifar10 grid",
    summary="hamu-q and hamu-u on CIFAR-10: three seeds, three rhos, two learning rates, ten constraint ratios",
    base={
        "dataset_name": "uoft-cs/cifar10",
        "model_name": "resnet20",
        "forget_class": 0,
        "per_device_train_batch_size": 5000,
        "num_train_epochs": 50,
        "freeze_batchnorm": True,
    },
    grids=(
        {
            "seed": (41, 42, 43),
            "hard_probability": (0.0, 0.5, 1.0),
            "learning_rate": (1e-5, 1e-4),
            "constraint_ratio": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            "unlearning_method": ("hamu-q", "hamu-u"),
            "stop_on_stopping_criterion": (True,),
        },
    ),
    # One original a seed.
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
