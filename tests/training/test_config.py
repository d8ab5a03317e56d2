"""The configuration: defaults that depend on the phase, checks with one-line messages, and steps between events."""

import json
import subprocess
import sys

import pytest

from hamu.errors import ConfigError
from hamu.methods.names import METHOD_NAMES
from hamu.training.config import KNOWN, TrainConfig, check_constraint, steps_between


def config(**flat):
    return TrainConfig.from_flat(flat)


def refused(**flat):
    with pytest.raises(ConfigError) as caught:
        config(**flat)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_importing_the_configuration_does_not_import_torch():
    code = "import sys, hamu.training.config, hamu.training.inputs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_learning_rate_defaults_differ_between_training_and_unlearning():
    assert config().lr == 1e-3
    assert config(method="hamu-q").lr == 1e-4
    assert config(method="hamu-q", lr=3e-4).lr == 3e-4


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_unlearning_defaults_to_frozen_batchnorm_and_plain_sgd(method):
    made = config(method=method)
    assert made.is_unlearning
    assert made.freeze_batchnorm
    assert made.optimizer_name == "sgd"
    assert made.is_hamu == method.startswith("hamu")
    assert (made.constraint_ratio is None) != made.is_hamu


def test_training_defaults_to_adamw_and_running_batchnorm():
    made = config(add_forget_to_train=True)
    assert (made.optimizer_name, made.freeze_batchnorm, made.constraint, made.constraint_ratio) == (
        "adamw",
        False,
        0.0,
        None,
    )


def test_constraint_is_the_ratio_times_the_learning_rate():
    assert config(method="hamu-q").constraint == pytest.approx(0.5e-4)
    assert config(method="hamu-q", constraint_ratio=0.1, lr=2e-4).constraint == pytest.approx(2e-5)
    assert config(method="hamu-q", hamu_constraint=2e-5).constraint_ratio == pytest.approx(0.2)
    assert config(method="hamu-q", hamu_constraint=0.0).constraint == 0.0  # zero is a constraint, not "unset"


def test_constraint_and_ratio_together_are_refused():
    assert "give one" in refused(method="hamu-q", constraint_ratio=0.1, hamu_constraint=1e-5)


def test_replacing_one_form_of_the_constraint_drops_the_other():
    assert config(method="hamu-q", hamu_constraint=1e-5).replace(constraint_ratio=0.3).constraint_ratio == 0.3


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"distribute_constraint_grad_norm": True}, "grad_norm"),
        ({"distribute_constraint_softmax_dp": True}, "softmax_dp"),
        ({"distribute_constraint_uniform": True}, "uniform"),
        ({}, "grad_norm"),
    ],
)
def test_split_of_the_constraint_follows_its_flag(flat, expected):
    assert config(method="hamu-q", **flat).split == expected


def test_two_splits_are_refused():
    assert "give one" in refused(distribute_constraint_grad_norm=True, distribute_constraint_softmax_dp=True)


def test_radius_is_the_lr_radius_unless_fixed():
    assert config(method="hamu-q").radius is None
    assert config(method="hamu-q", hamu_radius=1e-3).radius == 1e-3
    both = config(method="hamu-q", hamu_radius=1e-3, use_lr_radius=True)
    assert both.radius is None
    assert any("hamu_radius" in line for line in both.warnings())
    assert "hamu_radius" in refused(method="hamu-q", use_lr_radius=False)


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"method": "hamuq"}, "unknown method 'hamuq'; did you mean 'hamu-q'?"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'?"),
        ({"rho": -0.1}, "must be in [0, 1], got -0.1"),
        ({"rho": 1.1}, "must be in [0, 1], got 1.1"),
        ({"rho": float("nan")}, "must be in [0, 1], got nan"),
        ({"lr": 0}, "learning_rate must be > 0"),
        ({"epochs": "soon"}, "num_train_epochs takes a number, got 'soon'"),
        ({"seed": 1.5}, "seed takes a whole number, got 1.5"),
        ({"full_grad": "maybe"}, "full_grad takes true or false"),
        ({"seed": None}, "seed takes a whole number, got None"),
        ({"rho": 0.5, "hard_probability": 0.5}, "given twice"),
        ({"modality": "llm", "model_name": "resnet20"}, "is for images; for text give tiny-llama"),
        ({"modality": "llm", "dataset_name": "digits"}, "holds images; for text give authors"),
        ({"model_name": "tiny-llama"}, "is for text, and the modality is 'vision'; give --modality llm"),
        ({"dataset_name": "tofu"}, "is for text, and the modality is 'vision'; give --modality llm"),
        ({"eval_tofu": True}, "are for text"),
        ({"modality": "llm", "retain_reference": "folder"}, "give --eval_tofu"),
        ({"modality": "llm", "lora_dropout": 1.0}, "lora_dropout must be in [0, 0.99]"),
        ({"modality": "llm", "max_length": 2}, "max_length must be >= 8"),
        ({"modality": "llm", "forget_pct": 0}, "forget_pct must be in [1, 99]"),
        ({"stopping_rule": "agregate"}, "did you mean 'aggregate'?"),
        (
            {"gradient_pairing": "split-gpu", "method": "hamu-q", "num_workers": 3},
            "even number of processes, got 3; use num_workers 2 or 4",
        ),
        ({"gradient_pairing": "split-gpu", "method": "hamu-q"}, "even number of processes, got 1; use num_workers 2"),
        ({"gradient_pairing": "split-gpu", "num_workers": 2}, "use gradient_pairing sequential with num_workers 1"),
        (
            {"gradient_pairing": "split-gpu", "num_workers": 2, "method": "ft", "freeze_batchnorm": False},
            "use freeze_batchnorm True, or gradient_pairing sequential",
        ),
        ({"num_workers": 2, "method": "ft"}, "got num_workers 2; use num_workers 1, or pairing 'split-gpu'"),
        ({"backend": "mpi"}, "unknown backend 'mpi'"),
        ({"ddp_timeout": 0}, "ddp_timeout must be > 0"),
        ({"ray_address": "10.0.0.1"}, "ray_address must be auto or host:port, got '10.0.0.1'"),
        ({"artifact_root": "s3://bucket/hamu"}, "is a URL, and a single run writes into a folder"),
        ({"fp16": True, "bf16": True}, "give one"),
        ({"forget_dataset_name": "other"}, "forget_dataset_name 'other' differs"),
        ({"add_lora": True}, "add_lora is for text"),
        ({"add_duplicate_to_retain": True}, "add_duplicate_to_retain is for text"),
        ({"dataset_repeat": 2}, "multiply num_train_epochs"),
        ({"method": "ft", "add_forget_to_train": True}, "add_forget_to_train is for training"),
        ({"method": "ft", "select_best_model_by_subset_accuracy": True}, "select_best_model_by_subset_accuracy"),
        ({"save_strategy": "steps"}, "needs save_steps"),
        ({"target_test_accuracy": 0.9, "eval_strategy": "no"}, "use eval_strategy epoch"),
        ({"eval_steps": 1.5}, "whole number of steps or a fraction"),
    ],
)
def test_bad_settings_are_refused_in_one_line(flat, words):
    assert words in refused(**flat)


def test_processes_that_split_cannot_take_are_not_told_to_split():
    for flat in ({"num_workers": 3, "method": "ft"}, {"num_workers": 2}):
        assert "split-gpu" not in refused(**flat)


def test_how_processes_talk_is_no_part_of_the_recipe_but_how_many_is():
    split = {"method": "hamu-q", "gradient_pairing": "split-gpu", "num_workers": 2}
    recipe = config(**split).recipe_hash()
    assert config(**split, backend="gloo", ddp_timeout=5.0, ray_address="auto").recipe_hash() == recipe
    assert config(**{**split, "num_workers": 4}).recipe_hash() != recipe
    assert config(method="hamu-q").recipe_hash() == "664329ef"  # names folders of earlier runs


def test_settings_of_several_processes_are_told_to_be_idle_in_one():
    said = config(method="ft", backend="gloo", ddp_timeout=5.0, ray_address="auto").warnings()
    assert said == ["backend, ddp_timeout, ray_address: no effect, pairing 'sequential' runs in one process without Ray"]


def test_constraint_above_the_lr_radius_is_refused_and_one_at_it_is_not():
    message = refused(method="hamu-q", constraint_ratio=1.01)
    assert "constraint 0.000101 (constraint_ratio 1.01) is larger than radius * max_grad_norm = 0.0001" in message
    assert "constraint_ratio 1" in message
    for lr in (1e-4, 3e-4, 7e-5):  # ratio 1 exactly, whatever the rounding of ratio * lr
        config(method="hamu-u", constraint_ratio=1.0, lr=lr)
    config(method="hamu-q", constraint_ratio=3.9, max_grad_norm=2.0)  # limit lr * M^2
    config(method="ft", constraint_ratio=5.0)  # no constraint, nothing to refuse


def test_fixed_radius_allows_sqrt_of_blocks_times_the_whole_model_limit():
    whole = {"method": "hamu-q", "hamu_radius": 1e-3, "full_grad": True}
    config(**whole, hamu_constraint=1e-3)
    assert "larger than" in refused(**whole, hamu_constraint=1.1e-3)
    assert "65 blocks" in refused(method="hamu-q", hamu_radius=1e-3, hamu_constraint=8.1e-3)  # sqrt(65) = 8.06
    own = config(method="hamu-q", hamu_radius=1e-3, hamu_constraint=2.1e-3, model_name="own/model")
    check_constraint(own, 5)
    with pytest.raises(ConfigError, match="4 blocks"):
        check_constraint(own, 4)


def test_flat_form_is_json_and_reads_back_equal():
    made = config(method="hamu-u", rho=0.25, lr="1e-4", wandb_tags=["a", "b"], freeze_batchnorm=True)
    assert TrainConfig.from_flat(json.loads(json.dumps(made.to_flat()))) == made
    assert set(made.to_flat()) == set(KNOWN)


def test_text_values_are_read_as_their_type():
    made = config(method="hamu-q", epochs="2", seed="7", full_grad="true", eval_steps="none", batch_size="1e2")
    assert (made.training.num_train_epochs, made.run.seed, made.method.full_grad) == (2.0, 7, True)
    assert made.logging.eval_steps is None
    assert made.training.per_device_train_batch_size == 100


def test_recipe_hash_is_of_what_changes_numbers():
    base = config(method="hamu-q")
    assert len(base.recipe_hash()) == 8
    assert base.recipe_hash() == base.replace(artifact_root="elsewhere", logging_steps=5, lr=1e-4).recipe_hash()
    assert base.recipe_hash() == base.replace(hamu_constraint=base.constraint, use_lr_radius=True).recipe_hash()
    for change in (
        {"seed": 1},
        {"rho": 0.5},
        {"constraint_ratio": 0.4},
        {"epochs": 4},
        {"distribute_constraint_uniform": True},
        {"relative_constraint": True},
        {"stopping_patience": 2},
        {"stopping_softness": 0.1},
        {"eval_at_ends": False, "eval_strategy": "no"},
    ):
        assert base.recipe_hash() != base.replace(**change).recipe_hash()
    assert config().recipe_hash() == config(constraint_ratio=0.3).recipe_hash()  # training has no constraint


def test_recipe_of_training_has_what_acts_in_training_and_no_more():
    base = config()
    stopping = {"stop_on_loss_thresholds": True, "forget_loss_stop_threshold": 1.0}
    recipes = [
        base,
        config(**stopping),
        config(**{**stopping, "forget_loss_stop_threshold": 2.0}),
        config(**stopping, retain_loss_stop_threshold=1.0),
        config(freeze_batchnorm=True),
    ]
    assert len({made.recipe_hash() for made in recipes}) == len(recipes)
    assert config(forget_loss_stop_threshold=1.0, scrub_alpha=0.5).recipe_hash() == base.recipe_hash()  # without an effect


@pytest.mark.parametrize("device", ["foo", "cuda:x", "cpu:0", "cuda:-1", ""])
def test_a_device_that_is_none_is_refused(device):
    assert "device must be cpu, cuda or cuda:<n>" in refused(device=device)
    assert config(device="cuda:1").run.device == "cuda:1"


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    names = (
        "model_name", "dataset_name", "test_dataset_name", "dataset_cache_dir", "artifact_root", "output_dir",
        "final_model_output_dir",
    )  # fmt: skip
    flat = config(**dict.fromkeys(names, "~/there")).to_flat()
    assert {flat[name] for name in names} == {"/home/someone/there"}


def test_steps_between_reads_fractions_of_an_epoch():
    assert [steps_between(value, 12) for value in (0.25, 0.5, 0.01, 1, 1.0, 7)] == [3, 6, 1, 1, 1, 7]
    for bad in (0, -1, 2.5, float("inf")):
        with pytest.raises(ConfigError):
            steps_between(bad, 12)


def test_events_follow_strategy_and_steps():
    made = config(eval_strategy="steps", eval_steps=0.5, logging_strategy="epoch", save_strategy="no")
    assert [made.logging.every(kind, 12) for kind in ("eval", "logging", "save")] == [6, 12, None]
    assert config(eval_strategy="steps", logging_steps=3).logging.every("eval", 12) == 3


@pytest.mark.parametrize(
    ("flat", "word"),
    [
        ({"method": "hamu-q", "use_optimizer": True}, "not guaranteed"),
        ({"method": "ft", "constraint_ratio": 0.1}, "has no constraint"),
        ({"method": "ft", "weight_decay": 0.1}, "plain SGD"),
        ({"method": "ft", "scrub_alpha": 0.1}, "scrub_alpha"),
        ({"lora_r": 4}, "lora_r: for text"),
        ({"forget_pct": 5}, "forget_pct: for text"),
        ({"modality": "llm", "forget_class": 3}, "forget_class: for images, no effect on text"),
        ({"modality": "llm", "lora_r": 4}, "lora_r: no effect without add_lora"),
        ({"eval_steps": 5}, "use eval_strategy steps"),
        ({"eval_on_start": True}, "always evaluated"),
        ({"use_wandb": True}, "arrives later"),
        ({"add_forget_to_train": True, "rho": 0.5}, "an original is trained with 0 for every rho"),
        ({"retain_loss_stop_threshold": 1.0}, "stop_on_loss_thresholds"),
    ],
)
def test_settings_without_effect_are_said_in_one_line(flat, word):
    lines = config(**flat).warnings()
    assert len(lines) == 1
    assert word in lines[0]
    assert "\n" not in lines[0]


def test_defaults_warn_of_nothing():
    assert config().warnings() == []
    assert config(method="hamu-q").warnings() == []
