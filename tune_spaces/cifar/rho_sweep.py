"""CIFAR-10, from a whole class (rho 0) to random rows (rho 1): how the hardness of a forget set tells the methods apart."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/rho_sweep",
    script="cifar10 rho_sweep",
    summary="forget sets of CIFAR-10 from one class (rho 0) to random rows (rho 1), seven methods",
    base={
        "dataset_name": "uoft-cs/cifar10",
        "model_name": "resnet20",
        "forget_class": 0,
        "seed": 42,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 5000,
        "num_train_epochs": 25,
        "freeze_batchnorm": True,
    },
    grids=(
        {
            "hard_probability": (0.0, 0.25, 0.5, 0.75, 1.0),
            "unlearning_method": ("hamu-q", "hamu-u"),
            "constraint_ratio": (0.5,),
            "stop_on_stopping_criterion": (True,),
        },
        {"hard_probability": (0.0, 0.25, 0.5, 0.75, 1.0), "unlearning_method": ("ft", "ga", "gdiff", "kl", "scrub")},
    ),
    # One original for all, forget_<class>_0.0/full: it does not depend on rho.
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
