"""CIFAR-10: one constraint for the whole model, or a share of it for every tensor."""

from tune_spaces.space import Space

SPACE = Space(
    name="cifar/full_grad_ablation",
    script="cifar10 full_grad_ablation",
    published=1,
    summary="forget one class of CIFAR-10: hamu-q and hamu-u, per tensor and with the whole model as one block",
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
            "full_grad": (False, True),
            "constraint_ratio": (0.5,),
            "stop_on_stopping_criterion": (True,),
        },
    ),
    original={"num_train_epochs": 25, "learning_rate": 1e-3, "select_best_model_by_subset_accuracy": True},
)
