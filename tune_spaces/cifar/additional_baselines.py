"""CIFAR-10: the seven methods that HAMU is compared with."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/additional_baselines",
    script="cifar10 additional_baselines",
    summary="forget one class of CIFAR-10: seven baselines",
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
    grids=({"unlearning_method": ("gru", "pcgrad", "ft", "ga", "gdiff", "kl", "scrub")},),
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
