"""What the benchmarks share: the model and rows they run on, and timing in which variants take turns."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hamu.data.sources import ImageData
from hamu.data.splits import draw_forget_set
from hamu.tasks.vision import VisionTask


def cifar_task(n_rows: int = 2560, *, channels_last: bool = True) -> tuple[VisionTask, nn.Module]:
    """ResNet-20 and random rows of CIFAR-10's shape: times do not depend on what is in a picture."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n_rows, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(n_rows, dtype=np.int64) % 10
    data = ImageData(
        name="random",
        train_images=images,
        train_labels=labels,
        test_images=images[:512],
        test_labels=labels[:512],
        n_classes=10,
        class_names=tuple(map(str, range(10))),
        scale=1 / 255,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        sha256="0" * 64,
        provenance={},
    )
    task = VisionTask(
        data, draw_forget_set(labels, forget_class=0, rho=0.5, seed=0), model_name="resnet20", channels_last=channels_last
    )
    return task, task.new_model(0)


def random_parts(task: VisionTask, split: str, n_rows: int) -> list[Any]:
    """One batch of the first rows of a split, cycling."""
    return [task.batch(split, torch.arange(n_rows) % task.n_rows(split))]


def interleaved_medians(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    before: Callable[[], None] | None = None,
    warm_up: int = 2,
    in_a_row: int = 1,
) -> dict[str, float]:
    """Median milliseconds of each variant; variants take turns, so a noisy neighbour meets all of them alike.

    `in_a_row` calls make a turn; the first of several is not counted (it finds the caches full of the other variant's data).
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + warm_up):
        for name, variant in variants.items():
            for call in range(in_a_row):
                if before is not None:
                    before()
                start = time.perf_counter()
                variant()
                if repeat >= warm_up and (call > 0 or in_a_row == 1):
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def has_bf16() -> bool:
    """Whether the processor has bf16 units."""
    info = Path("/proc/cpuinfo")
    return info.exists() and ("amx_bf16" in info.read_text() or "avx512_bf16" in info.read_text())


def has_amx() -> bool:
    """Whether it multiplies bf16 matrices in units of their own, which is where bf16 gains most."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_bf16" in info.read_text()


def hardware() -> str:
    """Processor, cores and torch of this machine."""
    info = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = f"{names[0]} x {len(names)} cores" if names else model
    return f"{model}, {'with' if has_bf16() else 'no'} bf16 units; torch {torch.__version__}"
