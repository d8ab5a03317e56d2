"""A sequential HAMU step of ResNet-20 at batch 256, 32x32, one thread: eager, channels-last, compiled and bf16 side by side.

    python tests/benchmarks/bench_step.py

A step is loading both batches, two forward and backward passes, Grams, weights and the update. Start-up is the first step (with
compilation where there is some); the other columns are medians of interleaved steps.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from hamu.methods.catalog import METHODS
from hamu.methods.combine import StepRules
from hamu.tasks.vision import VisionTask
from hamu.training.engine import PairedEngine
from hamu.training.memory import keep_freed_memory
from tests.benchmarks.measure import cifar_task, interleaved_medians

LR, RATIO, BATCH = 1e-3, 0.05, 256


class Variant:
    """One way to compute the same step."""

    def __init__(self, *, channels_last: bool, bf16: bool = False, compiled: bool = False) -> None:
        self.task: VisionTask
        self.task, model = cifar_task(channels_last=channels_last)
        self.engine = PairedEngine(
            self.task,
            model,
            METHODS["hamu-q"],
            autocast=torch.bfloat16 if bf16 else None,
            compile_model=compiled,
        )
        self.engine.set_training_mode()
        start = time.perf_counter()
        self.first_loss = self.step()
        self.startup_s = time.perf_counter() - start

    def load(self) -> list[Any]:
        """Both batches of a step."""
        return [self.task.batch(split, torch.arange(BATCH)) for split in ("retain", "forget")]

    def step(self) -> float:
        """One whole step; returns its retain loss."""
        retain, forget = self.load()
        self.engine.gradients([retain], [forget])
        report = self.engine.decide(lr=LR, rules=StepRules(constraint=RATIO * LR), max_grad_norm=1.0)
        self.engine.apply(report.decision, lr=LR)
        return report.retain_loss


def measure(repeats: int = 7) -> dict[str, dict[str, float]]:
    """Per variant: start-up seconds, milliseconds a step, and the ratio to contiguous eager fp32 of the same run."""
    torch.set_num_threads(1)
    keep_freed_memory()
    variants = {
        "eager": Variant(channels_last=False),
        "channels_last": Variant(channels_last=True),
        "compiled": Variant(channels_last=True, compiled=True),
        "bf16": Variant(channels_last=True, bf16=True),
        "bf16_compiled": Variant(channels_last=True, bf16=True, compiled=True),
    }
    reference = variants["eager"].first_loss
    for name, variant in variants.items():
        tolerance = 2e-2 if "bf16" in name else 1e-4  # bf16 keeps 8 bits; fp32 kernels sum in another order
        assert abs(variant.first_loss - reference) <= tolerance * abs(reference), f"{name} computes another loss"
    times = interleaved_medians({name: variant.step for name, variant in variants.items()}, repeats=repeats, warm_up=1)
    loading = interleaved_medians({"load": variants["channels_last"].load}, repeats=repeats)["load"]
    rows = {
        name: {"startup_s": variants[name].startup_s, "step_ms": value, "speedup": times["eager"] / value}
        for name, value in times.items()
    }
    rows["channels_last"]["loading_share"] = loading / times["channels_last"]
    rows["bf16"]["loading_share"] = loading / times["bf16"]
    return rows


if __name__ == "__main__":
    for name, row in measure().items():
        print(f"{name:16s}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
