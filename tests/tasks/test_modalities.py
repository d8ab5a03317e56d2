"""What every kind of data must offer: an entry in MODALITIES is tested here without new test code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hamu.tasks.base import SPLITS
from hamu.tasks.catalog import MODALITIES, is_built_in, modality_of
from hamu.training.config import KNOWN, MODALITY_DEFAULTS, TrainConfig
from hamu.training.evaluation import evaluate
from hamu.training.loop import TrainingRun
from hamu.training.run_settings import MODALITIES as NAMES


def test_every_name_has_an_entry_and_defaults() -> None:
    assert set(NAMES) == set(MODALITIES) == set(MODALITY_DEFAULTS)


@pytest.mark.parametrize("name", MODALITIES)
def test_its_defaults_are_built_in_and_its_settings_are_known(name: str) -> None:
    config = TrainConfig.from_flat({"modality": name})
    modality = modality_of(config)
    assert is_built_in(config.run.model_name, modality.models)
    assert is_built_in(config.data.dataset_name, modality.datasets)
    assert set(modality.data_settings) <= set(KNOWN)
    modality.check_rows(config)
    assert modality.task_name(config) == config.data.dataset_name
    assert modality.group(config, "full") and "/" not in modality.group(config, "full") + modality.suffix(config)
    assert [row[0] for row in modality.hub_rows(config)][:1] == [config.data.dataset_name]


@pytest.mark.parametrize("name", MODALITIES)
def test_its_task_offers_what_a_run_asks_for(name: str, tmp_path: Path) -> None:
    config = TrainConfig.from_flat({"modality": name, "method": "kl", "lr": 0.01, "batch_size": 4})
    modality = modality_of(config)
    data = modality.load_data(config)
    modality.check_forget_set(config, data)
    assert len(data.sha256) == 64 and data.n_bytes > 0 and data.name
    task = modality.make_task(config, data, device="cpu")
    assert task.n_rows("train") == task.n_rows("retain") + task.n_rows("forget")
    for split in SPLITS:
        positions = torch.arange(6)
        assert sorted(torch.cat(task.parts(split, positions, 4)).tolist()) == positions.tolist()
        batch = task.batch(split, positions)
        assert batch.n_rows == 6 and len(batch.labels) >= 6
        assert 0 < task.n_probes(split, 4) <= 4
    model = task.new_model(0)
    assert task.logits(model, batch).shape == (len(batch.labels), task.n_classes)
    assert task.logits(task.frozen(model), batch).requires_grad is False
    assert task.row_scores(model.eval(), batch).loss.shape == (6,)
    task.save_model(model, tmp_path / "model", {"recipe": "0"})
    again = task.load_model(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.allclose(task.logits(again, batch), task.logits(model, batch), atol=1e-5)  # float32, another layout perhaps
    run = TrainingRun(config, task, model)
    run.engine.set_training_mode()
    before = evaluate(task, model, batch_size=256, autocast=torch.no_grad())["retain_loss"]
    run._take_step()
    assert run.step == 1 and evaluate(task, model, batch_size=256, autocast=torch.no_grad())["retain_loss"] != before
