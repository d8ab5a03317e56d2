"""CIFAR-10, half a class and half random rows: what the steps after the criterion fires cost."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/stopping_criterion",
    script="cifar10 stopping_criterion",
    published=2,
    summary="hamu-q and hamu-u at rho 0.5, ended by the stopping criterion and run on to the end",
    base={
        "dataset_name": "uoft-cs/cifar10",
        "model_name": "resnet20",
        "forget_class": 0,
        "hard_probability": 0.5,
        "seed": 42,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 5000,
        "num_train_epochs": 25,
        "freeze_batchnorm": True,
    },
    grids=(
        {"unlearning_method": ("hamu-q", "hamu-u"), "constraint_ratio": (0.5,), "stop_on_stopping_criterion": (True,)},
        {
            "unlearning_method": ("hamu-q", "hamu-u"),
            "constraint_ratio": (0.5,),
            "stop_on_stopping_criterion": (False,),
            "continue_on_failed_feasibility": (True,),
        },
    ),
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
