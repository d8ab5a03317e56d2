"""The combine step on ResNet-20's tensors against a straightforward per-tensor version, and against two backward passes.

    python tests/benchmarks/bench_combine.py

The per-tensor version is what one writes first: Python branches for each tensor, and a host read for each number they need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hamu.methods.catalog import METHODS
from hamu.methods.combine import StepRules
from hamu.training.engine import PairedEngine
from tests.benchmarks.measure import cifar_task, interleaved_medians, random_parts

LR, RATIO, BATCH = 1e-3, 0.05, 256


def combine_per_tensor(
    params: Sequence[nn.Parameter], retain: Sequence[Tensor], forget: Sequence[Tensor], *, lr: float, constraint: float
) -> list[str]:
    """HAMU-Q tensor by tensor, grad-norm split, lr radius: clip, share the constraint, branch, update, apply."""
    for grads in (retain, forget):
        norm = torch.stack([grad.norm() for grad in grads]).norm().item()
        factor = min(1.0, 1.0 / (norm + 1e-6))
        for grad in grads:
            grad.mul_(factor)
    products = [r.norm().item() * f.norm().item() for r, f in zip(retain, forget, strict=True)]
    total = sum(products)
    rhs = 0.0
    branches = []
    for param, r, f, product in zip(params, retain, forget, products, strict=True):
        bound = constraint * product / total
        r_norm, f_norm = r.norm().item(), f.norm().item()
        kappa = torch.sum(r * f).item()
        radius = lr * r_norm
        rhs += radius * max(r_norm**2 * f_norm**2 - kappa**2, 0.0) ** 0.5 / r_norm
        if bound > radius * f_norm:
            update, branch = (bound / f_norm**2) * f, "infeasible"
        elif kappa <= -bound * r_norm / radius:
            update, branch = -(radius / r_norm) * r, "direct"
        else:
            off = r - (kappa / f_norm**2) * f
            off_norm = off.norm().item()
            if off_norm <= 1e-6 * r_norm:
                update, branch = (bound / f_norm**2) * f, "colinear"
            else:
                length = max(radius**2 - (bound / f_norm) ** 2, 0.0) ** 0.5
                update, branch = (bound / f_norm**2) * f - (length / off_norm) * off, "rectified"
        if torch.isnan(update).any().item():
            raise FloatingPointError("NaN update")
        param.grad = -update / lr
        branches.append(branch)
    return branches


def measure() -> dict[str, dict[str, float]]:
    """Figures at torch's own number of threads (one a core), which is what a single run uses, and at one thread."""
    return {"default_threads": measure_at(torch.get_num_threads()), "one_thread": measure_at(1)}


def measure_at(n_threads: int, repeats: int = 40) -> dict[str, float]:
    """Medians in ms of one run in which the variants take turns."""
    torch.set_num_threads(n_threads)
    task, model = cifar_task()
    engine = PairedEngine(task, model, METHODS["hamu-q"])
    optimizer = torch.optim.SGD(engine.params, lr=LR, foreach=True)
    parts = [random_parts(task, split, BATCH) for split in ("retain", "forget")]
    engine.set_training_mode()
    engine.gradients(*parts)
    saved = engine.pair.table.clone()
    start = [param.detach().clone() for param in engine.params]

    def restore() -> None:
        engine.pair.table.copy_(saved)  # both versions write into the gradients

    def ours() -> list[str]:
        report = engine.decide(lr=LR, rules=StepRules(constraint=RATIO * LR), max_grad_norm=1.0)
        engine.apply(report.decision, lr=LR)
        return list(report.decision.branches)

    def per_tensor() -> list[str]:
        retain, forget = (engine.layout.views(buffer) for buffer in engine.pair.table)
        branches = combine_per_tensor(engine.params, retain, forget, lr=LR, constraint=RATIO * LR)
        optimizer.step()
        return branches

    weights = []
    for variant in (ours, per_tensor):
        restore()
        with torch.no_grad():
            torch._foreach_copy_([param.data for param in engine.params], start)
        branches = variant()
        weights.append(
            (branches, torch.cat([(param.detach() - old).flatten() for param, old in zip(engine.params, start, strict=True)]))
        )
    assert weights[0][0] == weights[1][0], "the two versions must take the same branches"
    error = float((weights[0][1] - weights[1][1]).norm() / weights[0][1].norm())
    assert error < 1e-4, f"the two versions must make the same step, relative difference {error}"

    times = interleaved_medians({"combine": ours, "per_tensor": per_tensor}, repeats=repeats, before=restore, in_a_row=10)
    passes = interleaved_medians({"passes": lambda: engine.gradients(*parts)}, repeats=5)
    return {
        "combine_ms": times["combine"],
        "per_tensor_ms": times["per_tensor"],
        "speedup": times["per_tensor"] / times["combine"],
        "two_passes_ms": passes["passes"],
        "share_of_two_passes": times["combine"] / passes["passes"],
        "threads": float(n_threads),
        "n": float(repeats),
    }


if __name__ == "__main__":
    for name, row in measure().items():
        print(f"{name:16s}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
