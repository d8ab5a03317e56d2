"""CIFAR-10: HAMU's step taken as it is (plain SGD), or handed to AdamW, which voids its guarantee."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/optimizer_ablation",
    script="cifar10 optimizer_ablation",
    summary="forget one class of CIFAR-10: hamu-u at ratio 0.9 with SGD and with AdamW",
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
            "unlearning_method": ("hamu-u",),
            "use_optimizer": (False, True),
            "constraint_ratio": (0.9,),
            "stop_on_stopping_criterion": (True,),
        },
    ),
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
