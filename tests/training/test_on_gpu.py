"""What only a GPU can show of a step. On a machine without one these tests are skipped, and nothing is claimed."""

from __future__ import annotations

import warnings

import pytest
import torch

from hamu.methods.catalog import METHODS
from hamu.methods.combine import StepRules
from hamu.training.engine import PairedEngine, StepReport
from tests.benchmarks.bench_gpu import Stepper

pytestmark = pytest.mark.gpu
RULES = StepRules(constraint=1e-5)


def one_step(stepper: Stepper) -> StepReport:
    stepper.passes()
    report = stepper.engine.decide(lr=1e-3, rules=RULES, max_grad_norm=1.0)
    stepper.engine.apply(report.decision, lr=1e-3)
    return report


def test_a_step_makes_the_host_wait_once() -> None:
    stepper = Stepper(torch.device("cuda"), 64, bf16=False, compiled=False)
    one_step(stepper)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            one_step(stepper)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in said) == 1


@pytest.mark.parametrize("method", list(METHODS))
def test_a_gpu_makes_the_steps_of_a_cpu(method: str) -> None:
    losses = {}
    for name in ("cpu", "cuda"):
        stepper = Stepper(torch.device(name), 32, bf16=False, compiled=False)
        original = stepper.task.new_model(0).to(name).eval().requires_grad_(False)
        stepper.engine = PairedEngine(stepper.task, stepper.engine.model, METHODS[method], original=original)
        stepper.engine.set_training_mode()
        losses[name] = [(report.retain_loss, report.forget_loss) for report in (one_step(stepper) for _ in range(5))]
    # fp32 convolutions sum in another order on each device, TF32 off by default for matmuls
    torch.testing.assert_close(torch.tensor(losses["cuda"]), torch.tensor(losses["cpu"]), rtol=1e-3, atol=1e-4)
