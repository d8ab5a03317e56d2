"""The command line: every kind of line parses, published ones included; bad input is one line and exit code 2."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from hamu.cli.environment import SETTINGS_BY_NAME, TEXT_NAMES
from hamu.cli.published import IGNORED
from hamu.cli.train import Cancelled, SignalStop, describe, hardness_line, main, parse
from hamu.methods.names import METHOD_NAMES
from hamu.training.config import KNOWN
from hamu.training.inputs import find_start
from hamu.training.loop import TrainingRun
from hamu.training.session import Session

# Every flag of DESIGN's command line, by its published name.
_NAMES = """
modality unlearning_method gradient_pairing num_workers seed shuffle_seed model_name num_labels img_size output_dir
final_model_output_dir artifact_root dataset_cache_dir dry_run debug split_ratio hard_probability dataset_repeat
shuffle_dataset add_forget_to_train add_duplicate_to_retain k_pct forget_class hamu_constraint constraint_ratio
hamu_radius use_lr_radius continue_on_failed_feasibility stop_on_stopping_criterion full_grad
distribute_constraint_softmax_dp distribute_constraint_grad_norm no_normalize_distributed_constraint use_optimizer
freeze_batchnorm stop_on_loss_thresholds retain_loss_stop_threshold forget_loss_stop_threshold scrub_alpha scrub_gamma
stopping_rule num_train_epochs per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
learning_rate weight_decay lr_scheduler_type max_grad_norm fp16 bf16 gradient_checkpointing no_torch_compile
select_best_model_by_subset_accuracy add_lora lora_name lora_r lora_alpha lora_dropout logging_strategy logging_steps
eval_strategy eval_steps longer_eval_steps eval_on_start eval_on_subsets eval_on_forget save_strategy save_steps
use_wandb wandb_project wandb_entity wandb_run_name wandb_tags wandb_notes ddp_find_unused_parameters
torch_empty_cache_steps
"""
PUBLISHED_FLAGS = _NAMES.split() + [
    f"{source}dataset_{part}"
    for source in ("", "forget_", "duplicate_", "test_")
    for part in ("name", "subset", "split", "prompt_field", "response_field")
]
PUBLISHED_DATA = """--dataset_name uoft-cs/cifar10 --forget_dataset_name uoft-cs/cifar10 --test_dataset_split test
    --dataset_split train --forget_dataset_split train --dataset_prompt_field img --forget_dataset_prompt_field img
    --dataset_response_field label --forget_dataset_response_field label --forget_class 3 --test_dataset_subset=
    --shuffle_dataset --seed 41 --shuffle_seed 41"""
HAMU_FLAGS = """--modality vision --unlearning_method hamu-q --gradient_pairing sequential --hamu_constraint 5e-05
    --use_lr_radius --distribute_constraint_grad_norm --stop_on_stopping_criterion --hard_probability 0.25
    --learning_rate 1e-4 --num_train_epochs 1 --dataset_repeat 25 --per_device_train_batch_size 5000
    --per_device_eval_batch_size 10000 --logging_strategy steps --logging_steps 1 --eval_strategy steps --eval_steps 0.1
    --save_strategy no --freeze_batchnorm --eval_on_subsets --eval_on_start --no_torch_compile --max_grad_norm 1.0"""


@pytest.fixture(autouse=True)
def _no_published_names_in_the_environment(monkeypatch):
    for name in (*SETTINGS_BY_NAME, *TEXT_NAMES):
        monkeypatch.delenv(name, raising=False)


def read(line, **environ):
    return parse(line.split(), environ)


def test_every_published_flag_is_known():
    assert set(PUBLISHED_FLAGS) - set(KNOWN) == set(IGNORED)


def test_training_an_original_parses():
    made = read(
        "--unlearning_method none --add_forget_to_train --select_best_model_by_subset_accuracy "
        "--lr_scheduler_type cosine --weight_decay 1e-4 --target_test_accuracy 0.9 --final_model_output_dir somewhere"
    ).config
    assert not made.is_unlearning
    assert made.data.add_forget_to_train
    assert made.lr == 1e-3
    assert made.training.target_test_accuracy == 0.9


def test_training_a_retain_only_model_parses():
    made = read(f"--unlearning_method none --model_name resnet20 {PUBLISHED_DATA}").config
    assert not made.data.add_forget_to_train
    assert made.run.model_name == "resnet20"
    assert made.data.forget_class == 3


def test_published_hamu_line_parses_and_says_what_means_another_thing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    parsed = read(f"{HAMU_FLAGS} {PUBLISHED_DATA} --model_name {tmp_path}")
    made = parsed.config
    assert (made.method_name, made.constraint, made.lr, made.data.rho) == ("hamu-q", 5e-5, 1e-4, 0.25)
    assert made.constraint_ratio == pytest.approx(0.5)
    assert made.data.forget_class == 3
    assert made.data.dataset_subset is None
    assert made.data.test_dataset_split == "test"
    assert made.training.num_train_epochs == 25
    assert made.data.dataset_repeat == 1
    assert made.logging.eval_strategy == "epoch"  # 0.1 of 25 passes is more than a pass
    said = "\n".join(parsed.warnings)
    for words in (
        "num_train_epochs 1 is read as 25",
        "eval_steps 0.1",
    ):
        assert words in said
    assert parsed.sources["learning_rate"] == "flag"
    assert parsed.sources["num_train_epochs"] == "flag, rewritten"


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_line_of_each_method_parses(method):
    parsed = read(f"--unlearning-method {method} --learning-rate 2e-4 --batch-size 64 --epochs=2")
    assert parsed.config.method_name == method
    assert parsed.warnings == []
    assert parsed.config.training.per_device_train_batch_size == 64
    assert parsed.config.training.num_train_epochs == 2


def test_underscores_hyphens_and_their_mixture_are_one_flag():
    assert {read(f"{flag} 8").config.training.per_device_eval_batch_size for flag in (
        "--per_device_eval_batch_size", "--per-device-eval-batch-size", "--per-device_eval-batch_size",
    )} == {8}  # fmt: skip


@pytest.mark.parametrize("flag", [name for name, (kind, _) in KNOWN.items() if kind is bool])
def test_switches_take_a_value_or_none(flag):
    def value_of(line):
        from hamu.cli.train import _given_flags

        return _given_flags(line.split())[flag]

    assert value_of(f"--{flag}") is value_of(f"--{flag} True") is value_of(f"--{flag}=true") is True
    assert value_of(f"--{flag} False") is False


def test_flags_without_a_meaning_are_accepted_with_a_warning_each():
    parsed = read("--ddp_find_unused_parameters --torch-empty-cache-steps 5")
    assert [line.split(":")[0] for line in parsed.warnings] == ["ddp_find_unused_parameters", "torch_empty_cache_steps"]


def test_environment_names_rank_below_flags_and_sources_are_told():
    names = {
        "METHOD": "hamu-u", "LR": "2e-4", "CONSTRAINT_RATIO": "0.3", "FORGET_CLASS": "5", "HARD_PROBABILITY": "0.5",
        "NUM_GPUS": "1", "GRADIENT_PAIRING": "sequential", "MODEL_NAME": "resnet20", "DATASET_NAME": "digits",
        "USE_WANDB": "0", "ARTIFACT_ROOT": "there", "BATCH_SIZE": "32", "NUM_TRAIN_EPOCHS": "2",
        "FORGET_PCT": "10", "DUPLICATE_SPLIT": "semantic_duplicate", "ADD_DUPLICATE": "0",
    }  # fmt: skip
    parsed = read("--learning_rate 1e-3 --unlearning_method hamu-q", **names)
    made = parsed.config
    assert (made.method_name, made.lr, made.constraint_ratio, made.data.forget_class) == ("hamu-q", 1e-3, 0.3, 5)
    assert (made.data.rho, made.run.artifact_root, made.training.num_train_epochs) == (0.5, "there", 2.0)
    assert made.training.per_device_train_batch_size == 32
    assert not made.logging.use_wandb
    assert parsed.sources["learning_rate"] == "flag"
    assert parsed.sources["constraint_ratio"] == "environment CONSTRAINT_RATIO"
    assert [line.split("=")[0] for line in parsed.warnings] == ["environment FORGET_PCT", "environment DUPLICATE_SPLIT"]
    shown = describe(parsed)
    assert "(environment LR)" not in shown
    assert "(environment CONSTRAINT_RATIO)" in shown
    assert "(default)" in shown


def test_a_share_of_s_is_told_as_such():
    shown = describe(read("--unlearning_method hamu-q --constraint_ratio 0.25 --relative_constraint --lr 0.01"))
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines()}
    assert lines["constraint_ratio"] == "0.25 of S (flag)"
    assert lines["hamu_constraint"].startswith("0.0025 nats times S")
    assert lines["relative_constraint"] == "True (flag)"


def test_the_address_of_a_cluster_is_read_from_the_environment_for_split_runs_alone():
    alone = read("--unlearning_method ft", RAY_ADDRESS="elsewhere:6379")
    assert (alone.config.run.ray_address, alone.warnings) == (None, [])
    split = "--unlearning_method ft --gradient_pairing split-gpu --num_workers 2"
    joined = read(split, RAY_ADDRESS="elsewhere:6379")
    assert joined.config.run.ray_address == "elsewhere:6379"
    assert joined.sources["ray_address"] == "environment RAY_ADDRESS"
    assert read(f"{split} --ray_address auto", RAY_ADDRESS="elsewhere:6379").config.run.ray_address == "auto"


def test_a_constraint_flag_outranks_the_ratio_of_the_environment():
    assert read("--unlearning_method hamu-q --hamu_constraint 1e-5", CONSTRAINT_RATIO="0.3").config.constraint == 1e-5


BAD_LINES = {
    "unknown method": ("--unlearning_method hamuq", "did you mean 'hamu-q'?"),
    "unknown flag": ("--learning_rat 1", "did you mean '--learning_rate'?"),
    "no flag": ("train", "'train' is not a flag"),
    "bad number": ("--seed abc", "abc"),
    "missing value": ("--seed", "expected one argument"),
    "rho above 1": ("--hard_probability 1.5", "in [0, 1], got 1.5"),
    "rho below 0": ("--hard_probability -0.5", "in [0, 1], got -0.5"),
    "constraint": ("--unlearning_method hamu-q --hamu_constraint 1e-3", "larger than radius * max_grad_norm"),
    "odd processes": ("--unlearning_method ft --gradient_pairing split-gpu --num_workers 3", "even number"),
    "missing checkpoint": ("--unlearning_method ft --model_name artifacts/no/such/model", "is not a folder"),
    "missing absolute checkpoint": ("--unlearning_method ft --model_name /no/model", "is not a folder"),
    "no class": ("--forget_class 10", "forget_class 10 does not exist in digits; its classes are 0 to 9"),
    "missing dataset": ("--dataset_name ./no/such/data", "is not a folder"),
    "no such device": ("--device foo", "device must be cpu, cuda or cuda:<n>"),
    "no original": ("--unlearning_method ft --artifact_root no/such/root", "no original model at 'no/such/root/checkpoints"),
    "no threshold": ("--unlearning_method ft --stop_on_loss_thresholds", "needs a threshold"),
    "text": ("--model_name tiny-llama", "give --modality llm"),
    "images": ("--modality llm --dataset_name cifar10", "holds images; for text give authors"),
    "column": ("--modality llm --dataset_name authors --forget_pct 7", "unknown subset of authors 'forget_07'"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_input_is_one_line_and_exit_code_2(name, capsys):
    line, words = BAD_LINES[name]
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["--unlearning_method", "ft", "--model_name", str(tmp_path)]) == 2
    assert "has no config.json or record.json" in capsys.readouterr().err


def test_class_that_a_local_dataset_lacks_is_refused(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        pq.write_table(pa.table({"img": [b"", b""], "label": [0, 1]}), tmp_path / f"{split}-00000-of-00001.parquet")
    assert main(["--dataset_name", str(tmp_path), "--forget_class", "7"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "7" in message


def test_dataset_without_the_named_column_is_refused_naming_those_there(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        pq.write_table(pa.table({"picture": [b""], "label": [0]}), tmp_path / f"{split}-00000-of-00001.parquet")
    assert main(["--dataset_name", str(tmp_path), "--artifact_root", str(tmp_path / "artifacts")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    assert "img" in message
    assert "picture" in message


def test_bad_input_ends_within_five_seconds_without_a_traceback():
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "hamu.cli.train", "--unlearning_method", "hamuq"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert time.monotonic() - started < 5  # the bound; about 1 s here


def test_bad_input_is_found_before_torch_is_imported():
    lines = (
        "--unlearning_method hamuq",
        "--unlearning_method ft --artifact_root no/such/root",
        "--device foo",
        "--final_model_output_dir .",
    )
    code = (
        "import sys; from hamu.cli.train import main\n"
        "for line in sys.argv[1:]:\n"
        "    assert main(line.split()) == 2, line\n"
        "    assert 'torch' not in sys.modules and 'ray' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *lines], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_with_a_built_in_name_shadows_nothing(tmp_path, monkeypatch):
    for name in ("resnet20", "torchvision/resnet18"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("resnet20", "torchvision/resnet18"):
        assert find_start(read(f"--model_name {name}").config) is None


@pytest.fixture(scope="module")
def digits_root(tmp_path_factory):
    """An artifact root with an original of the digits: one step of training."""
    root = tmp_path_factory.mktemp("root")
    line = f"--artifact_root {root} --add_forget_to_train --batch_size 64 --epochs 0.04 --device cpu --save_strategy no"
    assert main(line.split()) == 0
    return root


def test_a_run_prints_start_hardness_and_json_and_resumed_does_nothing(digits_root, capsys):
    # BatchNorm not frozen: the hardness is measured, and leaves the statistics as they were.
    line = (
        f"--artifact_root {digits_root} --unlearning_method hamu-q --constraint_ratio 0.9 --batch_size 64 --epochs 0.04 "
        "--freeze_batchnorm False --device cpu --resume"
    ).split()
    assert main(line) == 0
    out, err = capsys.readouterr()
    full = digits_root / "checkpoints/digits/seed_42/forget_0_0.0/full"
    assert f"starts from                  {full}\n" in out
    assert out.count("hardness: S = ") == 1
    assert "hardness" not in err
    assert "no checkpoint at" in err
    row = json.loads(out.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["stop_reason"] in ("finished", "infeasible")
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert "has ended already" in err
    assert json.loads(out.splitlines()[-1]) == row


def test_measuring_hardness_leaves_the_model_as_it_is(digits_root):
    settings = f"--artifact_root {digits_root} --unlearning_method hamu-q --batch_size 64 --freeze_batchnorm False --device cpu"
    config = read(settings).config
    session = Session(config)
    run = TrainingRun(config, session.task, session.load_start())
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert hardness_line(config, run.measure_hardness()).startswith("hardness: S = ")
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    said = {"gradient_product": 0.5, "max_constraint_ratio": 0.25, "kappa": 0.0}
    assert "at step 0: S = 0.5, largest feasible constraint ratio 0.25" in hardness_line(config, said, is_resumed=True)
    assert hardness_line(config, {}) == ""


@pytest.mark.parametrize(
    ("pairing", "said"), [("", "in one process"), ("--gradient_pairing split-gpu --num_workers 2", "in 2 processes")]
)
def test_a_dry_run_tells_steps_and_memory_and_leaves_nothing(digits_root, capsys, pairing, said):
    before = sorted(digits_root.rglob("*"))
    line = f"--artifact_root {digits_root} --unlearning_method hamu-q --batch_size 64 --device cpu --seed 42 --dry_run {pairing}"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert said in out
    assert re.search(r"memory: about \d+ MiB a process \(\w+ \d+ MiB, ", out)
    assert sorted(digits_root.rglob("*")) == before


def test_help_lists_every_group_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"\n{group}:" in shown for group in ("run", "data", "method", "training", "logging"))
    assert "(default: resnet20)" in shown


class EndableRun:
    """What a signal needs of a run: a place to ask it to stop."""

    reason = None

    def request_stop(self, reason):
        self.reason = reason


def test_a_signal_asks_the_run_to_stop_and_a_second_one_ends_at_once():
    pytest.importorskip("hamu.training.stop")
    with SignalStop() as signals:
        signals.run = run = EndableRun()
        signal.raise_signal(signal.SIGTERM)
        assert run.reason == "cancelled"
        assert signals.number == signal.SIGTERM
        with pytest.raises(Cancelled) as ended:
            signal.raise_signal(signal.SIGINT)
        assert ended.value.code == 128 + signal.SIGINT


def test_a_signal_before_the_run_ends_at_once():
    with SignalStop(), pytest.raises(Cancelled) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
