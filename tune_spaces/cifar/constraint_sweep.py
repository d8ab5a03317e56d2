"""CIFAR-10, one class: how much forgetting a step may demand before the retained rows pay for it."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/constraint_sweep",
    script="cifar10 constraint_sweep",
    summary="forget one class of CIFAR-10: hamu-q and hamu-u over constraint ratios 0 to 0.9",
    base={
        "dataset_name": "uoft-cs/cifar10",
        "model_name": "resnet20",
        "forget_class": 0,
        "hard_probability": 0.0,
        "seed": 42,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 5000,
        "num_train_epochs": 25,
        "freeze_batchnorm": True,
    },
    grids=(
        {
            "unlearning_method": ("hamu-q", "hamu-u"),
            "constraint_ratio": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            "stop_on_stopping_criterion": (True,),
        },
    ),
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
