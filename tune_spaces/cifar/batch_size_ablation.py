"""CIFAR-10: what noisier gradients of small batches do to a constraint on every step."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/batch_size_ablation",
    script="cifar10 batch_size_ablation",
    summary="forget one class of CIFAR-10: hamu-q at five batch sizes",
    base={
        "dataset_name": "uoft-cs/cifar10",
        "model_name": "resnet20",
        "forget_class": 0,
        "hard_probability": 0.0,
        "seed": 42,
        "learning_rate": 1e-4,
        "num_train_epochs": 25,
        "freeze_batchnorm": True,
    },
    grids=(
        {
            "unlearning_method": ("hamu-q",),
            "per_device_train_batch_size": (128, 256, 512, 1024, 2048),
            "constraint_ratio": (0.5,),
            "stop_on_stopping_criterion": (True,),
        },
    ),
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
