"""The text task: rows, passes, scores and the frozen original, each against a slower way to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamu.data.texts import TextData, TextRows
from hamu.errors import ConfigError, DataError
from hamu.methods.objectives import kl_to_original
from hamu.models.language import TINY, LoraSettings, train_tokenizer
from hamu.tasks.catalog import modality_of
from hamu.tasks.text import TextTask
from hamu.training.config import TrainConfig
from hamu.training.evaluation import evaluate


def rows(first: int, n: int) -> TextRows:
    """Questions with answers of 1 to 9 words."""
    words = ["red", "green", "blue", "salt", "iron", "moss", "wind", "seven", "eight"]
    return TextRows(
        prompts=tuple(f"What is number {i}?" for i in range(first, first + n)),
        responses=tuple(" ".join(words[: 1 + i % len(words)]) for i in range(first, first + n)),
    )


@pytest.fixture(scope="module")
def data() -> TextData:
    return TextData(name="numbers", retain=rows(0, 23), forget=rows(23, 7), test=rows(30, 5), sha256="0" * 64)


def task_of(data: TextData, **settings: Any) -> TextTask:
    texts = [text for part in (data.retain, data.forget) for text in (*part.prompts, *part.responses)]
    return TextTask(data, tokenizer=train_tokenizer(texts), **settings)


def noisy(task: TextTask, seed: int = 0) -> Any:
    """A model in which no block's gradient is zero, that of a new adapter neither."""
    model = task.new_model(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.05 * torch.randn(param.shape, generator=generator))
    return model.eval()


def test_splits_have_the_rows_that_were_given(data: TextData) -> None:
    task = task_of(data)
    assert {split: task.n_rows(split) for split in ("retain", "forget", "train", "test")} == {
        "retain": 23, "forget": 7, "train": 30, "test": 5,
    }  # fmt: skip
    text = task.tokenizer.decode(task.batch("forget", torch.tensor([2])).ids[0], skip_special_tokens=True)
    assert data.forget.prompts[2] in text and text.endswith(data.forget.responses[2])
    labels = task.tokenizer.decode(task.batch("test", torch.tensor([1])).labels, skip_special_tokens=True)
    assert labels.strip() == data.test.responses[1], "the answer alone is learned"
    with pytest.raises(DataError, match="unknown split 'valid'"):
        task.n_rows("valid")


def test_two_forget_sets_have_one_hash_only_if_their_rows_are_the_same(data: TextData) -> None:
    other = TextData(name="numbers", retain=rows(0, 23), forget=rows(24, 7), test=rows(30, 5), sha256="0" * 64)
    assert task_of(data).forget_set.sha256 == task_of(data).forget_set.sha256 != task_of(other).forget_set.sha256


@pytest.mark.parametrize("size", [1, 4, 9, 30])
def test_passes_hold_every_row_once_and_no_more_than_asked_for(data: TextData, size: int) -> None:
    task = task_of(data)
    positions = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    parts = task.parts("retain", positions, size)
    assert sorted(torch.cat(parts).tolist()) == list(range(23))
    assert all(0 < len(part) <= size for part in parts)
    lengths = [task.batch("retain", part).ids.shape[1] for part in parts]
    assert lengths == sorted(lengths, reverse=True), "rows of similar lengths go together, the longest first"


def test_passes_of_long_and_short_rows_are_little_padding() -> None:
    mixed = TextRows(prompts=("q",) * 64, responses=tuple("word " * (4 if i % 2 else 60) for i in range(64)))
    task = task_of(TextData(name="mixed", retain=mixed, forget=rows(0, 2), test=rows(0, 0), sha256="0" * 64))
    batches = [task.batch("retain", part) for part in task.parts("retain", torch.arange(64), 64)]
    assert sum(batch.mask.sum() for batch in batches) > 0.95 * sum(batch.mask.numel() for batch in batches)


def test_row_scores_are_those_of_the_rows_alone(data: TextData) -> None:
    task = task_of(data)
    model = noisy(task)
    whole = task.row_scores(model, task.batch("retain", torch.arange(23)))
    for row in range(0, 23, 5):
        batch = task.batch("retain", torch.tensor([row]))
        with torch.no_grad():
            logp = torch.log_softmax(task.logits(model, batch).double(), dim=-1)
        own = logp[torch.arange(len(batch.labels)), batch.labels]
        k = max(1, int(0.1 * len(own)))
        # 1e-4: the passes are in float32, and of other sizes.
        assert float(whole.loss[row]) == pytest.approx(-float(own.mean()), rel=1e-4)
        assert float(whole.min_k[row]) == pytest.approx(float(own.sort().values[:k].mean()), rel=1e-4)
        assert float(whole.correct[row]) == pytest.approx(float((logp.argmax(-1) == batch.labels).double().mean()))
        assert float(whole.entropy[row]) == pytest.approx(-float((logp.exp() * logp).sum(-1).mean()), rel=1e-4)


def test_evaluation_weighs_every_row_alike_whatever_the_batch(data: TextData) -> None:
    task = task_of(data)
    model = noisy(task)
    one, other = (evaluate(task, model, batch_size=size, autocast=torch.no_grad()) for size in (3, 64))
    assert one == pytest.approx(other, rel=1e-4)  # float32 passes of other sizes
    loss = task.row_scores(model, task.batch("forget", torch.arange(7))).loss
    assert one["forget_loss"] == pytest.approx(float(loss.mean()), rel=1e-4)
    assert one["forget_probability"] == pytest.approx(float(torch.exp(-loss).mean()), rel=1e-4)


@pytest.mark.parametrize("lora", [None, LoraSettings()])
def test_the_frozen_model_stays_what_it_was_and_holds_only_what_is_trained(data: TextData, lora: LoraSettings | None) -> None:
    task = task_of(data, lora=lora)
    model = noisy(task)
    batch = task.batch("retain", torch.arange(6))
    frozen = task.frozen(model)
    with torch.no_grad():
        before = task.logits(model, batch)
        assert kl_to_original(before, batch.labels, task.logits(frozen, batch)).abs().max() < 1e-6, "KL of a model to itself"
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1)
        after = task.logits(model, batch)
        assert not torch.allclose(before, after, atol=1e-2)
        assert torch.allclose(task.logits(frozen, batch), before, atol=1e-5)
    n_trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert frozen.n_bytes == 4 * n_trained
    if lora is not None:
        assert n_trained < 0.2 * sum(param.numel() for param in model.parameters())


def test_the_frozen_model_has_no_dropout_and_leaves_the_mode_alone(data: TextData) -> None:
    task = task_of(data, lora=LoraSettings(dropout=0.5))
    model = noisy(task).train()
    batch = task.batch("retain", torch.arange(6))
    frozen = task.frozen(model)
    with torch.no_grad():
        assert torch.equal(task.logits(frozen, batch), task.logits(frozen, batch))
        assert not torch.equal(task.logits(model, batch), task.logits(model, batch))
    assert model.training


@pytest.mark.parametrize("lora", [None, LoraSettings()])
def test_a_saved_model_is_gone_on_with(data: TextData, lora: LoraSettings | None, tmp_path: Path) -> None:
    task = task_of(data, lora=lora)
    model = noisy(task)
    task.save_model(model, tmp_path / "model", {"recipe": "0"})
    again = task.load_model(tmp_path / "model")
    batch = task.batch("test", torch.arange(5))
    with torch.no_grad():
        assert torch.allclose(task.logits(again.eval(), batch), task.logits(model, batch), atol=1e-6)
    names = [{name for name, param in each.named_parameters() if param.requires_grad} for each in (model, again)]
    assert names[0] == names[1]


def test_a_new_adapter_on_a_whole_model_is_warned_about(data: TextData, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task_of(data).save_model(task_of(data).new_model(0), tmp_path / "whole", {})
    task_of(data, lora=LoraSettings()).load_model(tmp_path / "whole")
    assert "a new LoRA adapter on" in caplog.text and "S" in caplog.text
    caplog.clear()
    task = task_of(data, lora=LoraSettings())
    task.save_model(task.new_model(0), tmp_path / "adapter", {})
    task.load_model(tmp_path / "adapter")
    assert caplog.text == "", "an adapter is gone on with"


def test_losses_of_other_texts_are_those_of_rows(data: TextData) -> None:
    task = task_of(data)
    model = noisy(task)
    of_rows = task.row_scores(model, task.batch("forget", torch.arange(7))).loss.numpy()
    found = task.losses(model, data.forget.prompts, data.forget.responses, batch_size=3)
    assert np.allclose(found, of_rows, rtol=1e-4)  # float32 passes of other sizes


def test_a_share_that_is_none_is_refused(data: TextData) -> None:
    with pytest.raises(ConfigError, match="k_pct is 0"):
        task_of(data, k_pct=0.0)


def test_the_task_of_a_configuration_takes_the_tokenizer_of_the_model_it_starts_from(tmp_path: Path) -> None:
    config = TrainConfig.from_flat({"modality": "llm", "forget_pct": 5, "add_lora": True})
    assert config.run.model_name == TINY and config.data.dataset_name == "authors"
    modality = modality_of(config)
    data = modality.load_data(config)
    task = modality.make_task(config, data)
    assert (task.n_rows("retain"), task.n_rows("forget"), task.n_rows("test")) == (380, 20, 40)
    task.save_model(task.new_model(0), tmp_path / "model", {})
    again = modality.make_task(config, data, start=tmp_path / "model")
    assert again.tokenizer.get_vocab() == task.tokenizer.get_vocab()


@pytest.mark.slow
def test_metrics_on_request_are_measured_at_the_end(tmp_path: Path) -> None:
    config = TrainConfig.from_flat(
        {"modality": "llm", "forget_pct": 5, "eval_tofu": True, "eval_generation_rows": 2, "max_length": 96}
    )
    modality = modality_of(config)
    task = modality.make_task(config, modality.load_data(config))
    assert isinstance(task, TextTask)
    model = task.new_model(0)
    found = task.extra_metrics(model)
    for split in ("retain", "forget", "test"):
        assert 0 <= found[f"{split}_rouge"] <= 1
    assert 0 < found["tofu_forget_truth_ratio"] <= 1
    assert 0 <= found["tofu_model_utility"] <= 1
    assert "tofu_forget_quality" not in found, "there is no model to compare with"
    task.save_model(model, tmp_path / "retrained", {})
    compared = config.replace(retain_reference=str(tmp_path / "retrained"))
    again = modality.make_task(compared, task.data)
    assert again.extra_metrics(again.new_model(0))["tofu_forget_quality"] == 1.0, "KS of a model with itself"
