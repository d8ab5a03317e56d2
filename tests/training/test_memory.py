"""The memory estimate: exact where it counts, close where it measures, and without a trace on the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from hamu.data.sources import load_image_data
from hamu.methods.gram import BlockLayout
from hamu.tasks.vision import VisionTask, task_for
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.memory import MemoryEstimate, estimate_memory, is_device_error, peak_memory


@pytest.fixture(scope="module")
def task() -> VisionTask:
    config = TrainConfig.from_flat({"method": "hamu-q"})
    return task_for(config, load_image_data(config.data))


def estimate(task: VisionTask, *, model: torch.nn.Module | None = None, **given: object) -> MemoryEstimate:
    method = str(given.pop("method", "hamu-q"))
    run = TrainingRun(TrainConfig.from_flat({"method": method}), task, model or task.new_model(0))
    settings = {"optimizer_name": "sgd", "size": 1, "batch_size": 64}
    return estimate_memory(task, run.engine, **{**settings, **given})  # type: ignore[arg-type]


def test_weights_and_gradients_are_counted_exactly(task: VisionTask) -> None:
    model = task.new_model(0)
    n_params = sum(param.numel() for param in model.parameters())
    found = estimate(task, model=model)
    assert found.weights == sum(value.nbytes for value in model.state_dict().values())
    assert found.gradients == 2 * 4 * n_params
    padded = BlockLayout(list(model.parameters())).zeros(torch.float32).nbytes
    assert found.gradients <= padded <= 1.05 * found.gradients  # rows are padded
    assert estimate(task, optimizer_name="adamw").optimizer == 2 * 4 * n_params
    assert estimate(task, method="kl").original == found.weights
    assert found.total == found.weights + found.gradients + found.activations + found.data


def test_activations_are_those_of_a_real_batch(task: VisionTask) -> None:
    model = task.new_model(0).eval()
    known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = task.batch("forget", torch.arange(64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(task.logits(model, batch), batch.labels)
    loss.backward()
    measured = estimate(task, batch_size=64).activations
    assert abs(measured - sum(kept.values())) <= 0.25 * sum(kept.values())
    assert estimate(task, batch_size=128).activations > 1.9 * measured


def test_several_processes_hold_no_more_than_one_does_and_a_table(task: VisionTask) -> None:
    one, two, four = (estimate(task, size=size).gradients for size in (1, 2, 4))
    assert two == one
    assert four == pytest.approx(1.25 * one, rel=0.01)


def test_measuring_leaves_the_model_and_the_random_state_alone(task: VisionTask) -> None:
    model = task.new_model(0)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    estimate(task, model=model)
    assert model.training
    assert not frozen.training
    assert all(param.grad is None for param in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_it_reads_in_a_line_the_largest_part_first(task: VisionTask) -> None:
    words = estimate(task, batch_size=4096).describe()
    assert words.startswith("about ")
    assert "a process (activations " in words


def test_what_a_device_error_is() -> None:
    assert is_device_error(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_device_error(torch.AcceleratorError("CUDA error"))
    assert not is_device_error(RuntimeError("of another kind"))
    assert peak_memory("cpu") > 10**7


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gdiff"},
        {"method": "kl"},
        {"method": "none", "add_forget_to_train": True},
        {"method": "gdiff", "add_lora": True},
        {"method": "kl", "add_lora": True},
        {"method": "kl", "add_lora": True, "gradient_checkpointing": True},
    ],
    ids=lambda settings: " ".join(map(str, settings)),
)
def test_the_estimate_of_a_language_model_is_what_a_run_holds(settings: dict[str, object], repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.memory_of_run", json.dumps(settings)],
        cwd=repo_root,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured"] > 100 * 2**20, "far more than the libraries' own"
    assert abs(found["estimate"] - found["measured"]) <= 0.25 * found["measured"], found
