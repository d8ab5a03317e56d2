"""Estimate and measure the memory of a run on texts in a process of its own; prints both in bytes as JSON.

    MALLOC_MMAP_THRESHOLD_=65536 python -m tests.training.memory_of_run '{"method": "kl", "add_lora": true}'

With that setting of glibc every large tensor is a mapping of its own, given back when it is freed, so that the resident set is
what is held. Otherwise it is the heap too, which a run leaves in pieces.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from hamu.tasks.catalog import modality_of
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.memory import estimate_memory, peak_memory, reset_peak_memory

N_STEPS = 3


def run_of(**settings: Any) -> TrainingRun:
    config = TrainConfig.from_flat({"modality": "llm", "lr": 1e-4, "batch_size": 100, **settings})
    task = modality_of(config).make_task(config, modality_of(config).load_data(config))
    return TrainingRun(config, task, task.new_model(0))


def main() -> None:
    """Measure first, in a fresh heap, and estimate then."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    libraries = run_of(**settings, max_length=64)  # what they allocate once is not the run's
    libraries.config = libraries.config.replace(batch_size=2)
    libraries._take_step()
    del libraries
    gc.collect()
    reset_peak_memory("cpu")
    before = resident()
    run = run_of(**settings)
    run.engine.set_training_mode()
    for _ in range(N_STEPS):
        run._take_step()
    measured = peak_memory("cpu") - before
    size = run.config.training.per_device_train_batch_size
    estimate = estimate_memory(run.task, run.engine, optimizer_name=run.config.optimizer_name, size=1, batch_size=size)
    print(json.dumps({"measured": measured, "estimate": estimate.total, "parts": estimate.describe()}))


def resident() -> int:
    """Bytes of the resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
