"""A sequential HAMU step on one device, without Ray: what only a GPU can show.

    python -m tests.benchmarks.bench_gpu            needs a CUDA device; prints a table, and JSON as the last line
    python -m tests.benchmarks.bench_gpu --device cpu --batches 32 --repeats 2       tries the script itself

ResNet-20 at 32x32 and batches of 256 and 5000 a role, fp32 and bf16, eager and compiled: milliseconds a step, the share of the
combination (Grams, weights, update), host syncs a step, peak memory, and how far bf16 losses are from fp32 ones after 20 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from hamu.methods.catalog import METHODS
from hamu.methods.combine import StepRules
from hamu.tasks.base import Batch
from hamu.training.engine import PairedEngine
from tests.benchmarks.measure import cifar_task, hardware

LR, RATIO, PARITY_STEPS = 1e-3, 0.05, 20


class Stepper:
    """One engine and its two batches on a device."""

    def __init__(self, device: torch.device, batch: int, *, bf16: bool, compiled: bool) -> None:
        self.task, model = cifar_task(2 * batch)
        self.parts = [self._batch(split, batch, device) for split in ("retain", "forget")]
        self.engine = PairedEngine(
            self.task,
            model.to(device),
            METHODS["hamu-q"],
            autocast=torch.bfloat16 if bf16 else None,
            compile_model=compiled,
        )
        self.engine.set_training_mode()

    def _batch(self, split: str, n_rows: int, device: torch.device) -> Batch:
        batch = self.task.batch(split, torch.arange(n_rows) % self.task.n_rows(split))
        return Batch(batch.inputs.to(device), batch.labels.to(device), batch.n_rows)

    def passes(self) -> None:
        """Both forward and backward passes."""
        self.engine.gradients([self.parts[0]], [self.parts[1]])

    def combine(self) -> float:
        """Grams, weights, update; returns the retain loss."""
        report = self.engine.decide(lr=LR, rules=StepRules(constraint=RATIO * LR), max_grad_norm=1.0)
        self.engine.apply(report.decision, lr=LR)
        return report.retain_loss

    def step(self) -> float:
        """One whole step."""
        self.passes()
        return self.combine()


def median_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a call, the device's work included."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def syncs_of(call: Callable[[], object], device: torch.device) -> int | None:
    """How often a call makes the host wait for the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def measure(device: torch.device, batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row a batch size and variant."""
    rows = []
    for batch in batches:
        losses = {}
        for bf16 in (False, True):
            for compiled in (False, True):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                stepper = Stepper(device, batch, bf16=bf16, compiled=compiled)
                start = time.perf_counter()
                for _ in range(PARITY_STEPS):
                    loss = stepper.step()
                losses[bf16, compiled] = loss
                rows.append({
                    "batch": batch, "dtype": "bf16" if bf16 else "fp32", "mode": "compiled" if compiled else "eager",
                    "first_steps_s": time.perf_counter() - start,
                    "step_ms": median_ms(stepper.step, device, repeats),
                    "combine_ms": median_ms(stepper.combine, device, repeats),
                    "host_syncs": syncs_of(stepper.step, device),
                    "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
                    "retain_loss": loss,
                    "loss_against_fp32": abs(loss - losses[False, False]) / abs(losses[False, False]),
                })  # fmt: skip
                rows[-1]["combine_share"] = rows[-1]["combine_ms"] / rows[-1]["step_ms"]
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Measure on the device asked for and print; exit code 2 where there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 5000])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; give --device cpu to try the script")
        return 2
    torch.manual_seed(0)
    rows = measure(device, args.batches, args.repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else hardware()
    print(f"{name}; torch {torch.__version__}; medians of {args.repeats}")
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    print(json.dumps({"device": name, "torch": torch.__version__, "repeats": args.repeats, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
