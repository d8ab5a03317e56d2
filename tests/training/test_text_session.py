"""A single run on texts: trained, unlearned, resumed, measured; and what is refused before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hamu.cli.train import main
from hamu.errors import CheckpointError, ConfigError, DataError
from hamu.models.language import load_language_model
from hamu.tasks.catalog import modality_of
from hamu.tasks.text import FrozenModel
from hamu.training.artifacts import read_record
from hamu.training.checkpoints import changing_state, load_checkpoint
from hamu.training.config import TrainConfig
from hamu.training.inputs import check_inputs
from hamu.training.loop import TrainingRun
from hamu.training.memory import estimate_memory
from hamu.training.session import run_training
from hamu.training.stop import StopReason

WORDS = ["red", "green", "blue", "salt", "iron", "moss", "wind", "seven"]


def write_rows(path: Path, first: int, n: int) -> Path:
    rows = [{"question": f"What is {i}?", "answer": " ".join(WORDS[: 1 + i % 8])} for i in range(first, first + n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on a few texts; two steps an epoch."""
    return {
        "modality": "llm",
        "dataset_name": str(write_rows(tmp_path / "retain.jsonl", 0, 12)),
        "forget_dataset_name": str(write_rows(tmp_path / "forget.jsonl", 12, 4)),
        "test_dataset_name": str(write_rows(tmp_path / "test.jsonl", 16, 3)),
        "artifact_root": str(tmp_path / "root"),
        "batch_size": 8,
        "epochs": 2,
        "device": "cpu",
    }


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def trained(texts: dict[str, Any], **settings: Any) -> Path:
    config = TrainConfig.from_flat({**texts, "add_forget_to_train": True, "lr": 0.01, **settings})
    return run_training(config, progress=False)[1].model_folder


def test_an_adapter_is_trained_and_gone_on_with_and_its_base_stays_what_it_was(texts: dict[str, Any]) -> None:
    original = trained(texts, add_lora=True)
    assert original.relative_to(texts["artifact_root"]).parts[:2] == ("checkpoints", "retain")
    assert original.name == "full" and (original / "adapter_model.safetensors").is_file()
    row, session = run_training(TrainConfig.from_flat({**texts, "method": "gdiff", "lr": 0.05}), progress=False)
    assert session.start_folder == original
    assert row["forget_loss"] > row["original_forget_loss"]
    before, after = (load_language_model(folder).state_dict() for folder in (original, session.model_folder))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all("lora_" in name for name in moved)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(session.model_folder / "base"), str(session.model_folder)
    )
    assert isinstance(plain, PeftModel), "the library's own loader takes the folder"


@pytest.mark.slow
def test_a_whole_model_is_trained_and_unlearned(texts: dict[str, Any]) -> None:
    original = trained(texts)
    row, session = run_training(TrainConfig.from_flat({**texts, "method": "kl", "lr": 0.05}), progress=False)
    assert AutoModelForCausalLM.from_pretrained(session.model_folder).config.model_type == "llama"
    assert row["forget_loss"] > row["original_forget_loss"] and original.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_holds_what_is_trained_and_gives_the_uninterrupted_numbers(
    texts: dict[str, Any], tmp_path: Path, lora: bool
) -> None:
    trained(texts, add_lora=lora)
    config = TrainConfig.from_flat({**texts, "method": "kl", "lr": 0.05, "epochs": 4, "save_strategy": "steps", "save_steps": 1})
    modality = modality_of(config)
    start = Path(texts["artifact_root"]) / "checkpoints" / "retain" / "seed_42" / "forget" / "full"
    task = modality.make_task(config, modality.load_data(config), start=start)

    def run_of(path: Path | None) -> TrainingRun:
        return TrainingRun(config, task, task.load_model(start), checkpoint_path=path)

    whole, parts = run_of(None), run_of(tmp_path / "checkpoint.pt")
    for _ in whole:
        pass
    for report in parts:
        if report["step"] == 3:
            parts.request_stop(StopReason.CANCELLED)
    saved = load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert saved.keys() == changing_state(parts.model).keys()
    assert all("lora_" in name for name in saved) == lora
    resumed = run_of(tmp_path / "checkpoint.pt")
    for _ in resumed:
        pass
    assert resumed.step == whole.step == 8
    state = changing_state(whole.model)
    assert all(torch.equal(value, state[name]) for name, value in changing_state(resumed.model).items()), "the KL's original too"


@pytest.mark.slow
def test_the_original_of_kl_is_no_second_model(texts: dict[str, Any]) -> None:
    trained(texts, add_lora=True)
    start = Path(texts["artifact_root"]) / "checkpoints" / "retain" / "seed_42" / "forget" / "full"
    config = TrainConfig.from_flat({**texts, "method": "kl", "lr": 0.05})
    modality = modality_of(config)
    task = modality.make_task(config, modality.load_data(config), start=start)
    run = TrainingRun(config, task, task.load_model(start))
    assert isinstance(run.engine.original, FrozenModel)
    found = estimate_memory(task, run.engine, optimizer_name="sgd", size=1, batch_size=8)
    n_adapter = sum(param.nbytes for param in run.engine.params)
    assert found.original == n_adapter < 0.2 * found.weights
    assert found.gradients == 2 * n_adapter


@pytest.mark.slow
def test_the_command_line_trains_and_unlearns(texts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    original = ["--add_forget_to_train", "--add_lora", "--learning_rate=0.01"]
    assert main([*flags(texts), *original]) == 0
    assert main([*flags(texts), *original, "--artifact_root=other", "--dry_run"]) == 0
    assert "memory: about" in capsys.readouterr().out
    assert main([*flags(texts), "--unlearning_method=hamu-q", "--learning_rate=0.1", "--constraint_ratio=0.01"]) == 0
    out = capsys.readouterr().out
    assert "forget rows" in out and "hardness: S =" in out
    assert json.loads(out.splitlines()[-1])["forget_accuracy"] >= 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset_prompt_field": "query"}, "has no column 'query'"),
        ({"forget_dataset_name": None}, "to be forgotten is not said"),
        ({"forget_dataset_name": "no.jsonl"}, "no.jsonl"),
        ({"chat_template": True}, "chat"),
        ({"max_length": 8}, "max_length"),
        ({"model_name": "tiny-lama"}, "tiny-llama"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(
    texts: dict[str, Any], changed: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {name: value for name, value in {**texts, **changed}.items() if value is not None}
    assert main([*flags(given), "--add_forget_to_train"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and words in error[0]
    assert not (tmp_path / "root" / "checkpoints").exists()


@pytest.mark.slow
def test_rows_without_an_answer_are_counted_and_skipped_or_refused(
    texts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "retain.jsonl").open("a") as file:
        file.write(json.dumps({"question": "What?", "answer": "  "}) + "\n")
    assert main([*flags(texts), "--add_forget_to_train", "--strict"]) == 2
    assert "--strict" in capsys.readouterr().err
    assert main([*flags(texts), "--add_forget_to_train", "--num_train_epochs=0.5"]) == 0
    assert "rows without an answer are skipped: 1 of retain" in capsys.readouterr().err


def test_a_reference_that_is_no_retain_only_model_is_refused_before_the_start(tmp_path: Path) -> None:
    config = TrainConfig.from_flat({"modality": "llm", "eval_tofu": True, "retain_reference": str(tmp_path)})
    with pytest.raises(CheckpointError, match="retain_reference"):
        check_inputs(config)


@pytest.mark.slow
def test_a_model_that_was_trained_before_is_measured_on_request(tmp_path: Path) -> None:
    settings = {
        "modality": "llm", "forget_pct": 5, "artifact_root": str(tmp_path), "epochs": 0.3, "lr": 0.003, "device": "cpu",
        "max_length": 96,
    }  # fmt: skip
    before, session = run_training(TrainConfig.from_flat(settings), progress=False)
    weights = (session.model_folder / "model.safetensors").read_bytes()
    after, again = run_training(TrainConfig.from_flat({**settings, "eval_tofu": True}), progress=False)
    assert again.model_folder == session.model_folder and after["steps"] == before["steps"]
    assert (session.model_folder / "model.safetensors").read_bytes() == weights
    assert read_record(session.model_folder)["result"]["tofu_forget_truth_ratio"] == after["tofu_forget_truth_ratio"] > 0
    compared = {**settings, "add_forget_to_train": True, "eval_tofu": True, "retain_reference": str(session.model_folder)}
    row, _ = run_training(TrainConfig.from_flat(compared), progress=False)
    assert 0 <= row["tofu_forget_quality"] <= 1
    more, _ = run_training(TrainConfig.from_flat({**settings, "eval_tofu": True, "eval_generation_rows": 1}), progress=False)
    assert "retain_rouge" in more and "tofu_forget_truth_ratio" in more


def test_a_place_that_cannot_be_made_is_refused_before_any_work(texts: dict[str, Any]) -> None:
    config = TrainConfig.from_flat({**texts, "final_model_output_dir": texts["dataset_name"] + "/model"})
    with pytest.raises(CheckpointError, match="is a file, so the folder cannot be made"):
        check_inputs(config)


def test_other_test_rows_are_no_other_data(texts: dict[str, Any]) -> None:
    one, other = (modality_of(c).load_data(c) for c in map(TrainConfig.from_flat, (texts, {**texts, "test_dataset_name": None})))
    assert one.sha256 == other.sha256


@pytest.mark.slow
def test_a_reference_of_other_questions_is_refused_before_the_first_step(tmp_path: Path) -> None:
    settings = {"modality": "llm", "artifact_root": str(tmp_path), "epochs": 0.2, "device": "cpu", "eval_tofu": True}
    reference = run_training(TrainConfig.from_flat({**settings, "forget_pct": 5}), progress=False)[1].model_folder
    other = {**settings, "forget_pct": 10, "retain_reference": str(reference)}
    with pytest.raises(DataError, match="other questions"):
        run_training(TrainConfig.from_flat(other), progress=False)


@pytest.mark.slow
def test_other_lora_settings_than_those_of_the_adapter_that_is_gone_on_with_are_refused(texts: dict[str, Any]) -> None:
    trained(texts, add_lora=True)
    config = TrainConfig.from_flat({**texts, "method": "ft", "add_lora": True, "lora_r": 4})
    with pytest.raises(ConfigError, match="lora_r 4 does not go with the adapter"):
        run_training(config, progress=False)


def test_a_longer_row_than_the_model_takes_is_refused(texts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="takes 1024 tokens"):
        run_training(TrainConfig.from_flat({**texts, "max_length": 2048}), progress=False)


def test_a_prompt_field_of_none_makes_plain_texts(texts: dict[str, Any]) -> None:
    config = TrainConfig.from_flat({**texts, "dataset_prompt_field": "none", "dataset_response_field": "question"})
    data = modality_of(config).load_data(config)
    assert set(data.retain.prompts) == {""} and data.retain.responses[0] == "What is 0?"
