"""CIFAR-10: what a method costs: seconds of training and peak memory of each process (`steps_s`, `peak_bytes_per_rank`)."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/timing_all",
    script="cifar10 timing_all",
    summary="one epoch of each of the nine methods on CIFAR-10 without evaluation: time and memory",
    base={
        "dataset_name": "uoft-cs/cifar10",
        "model_name": "resnet20",
        "forget_class": 0,
        "hard_probability": 0.0,
        "seed": 42,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 5000,
        "num_train_epochs": 1,
        "freeze_batchnorm": True,
        "eval_strategy": "no",
        "eval_at_ends": False,
        "save_strategy": "no",
    },
    grids=(
        # Every method takes the same steps: none stops at its criterion.
        {"unlearning_method": ("hamu-q", "hamu-u"), "constraint_ratio": (0.5,), "continue_on_failed_feasibility": (True,)},
        {"unlearning_method": ("ft", "ga", "gdiff", "kl", "scrub", "gru", "pcgrad")},
    ),
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
