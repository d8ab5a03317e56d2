"""Split pairing: what a step sends, what exchange and combination cost, and what a whole step gains over one process.

    python -m tests.benchmarks.bench_exchange

Ranks are processes of one thread each that talk gloo over the loopback. The naive scheme is the published one: every rank gathers
every rank's every tensor, once for the retain gradients and once for the forget gradients, and combines tensor by tensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hamu.methods.catalog import METHODS
from hamu.methods.combine import StepRules
from hamu.training.engine import PairedEngine
from hamu.training.groups import Group
from hamu.training.memory import keep_freed_memory
from tests.benchmarks.bench_combine import combine_per_tensor
from tests.benchmarks.measure import cifar_task, random_parts
from tests.training.processes import Ranks

LR, RATIO, BATCH = 1e-3, 0.05, 256
RULES = StepRules(constraint=RATIO * LR, on_infeasible="continue")
N_TRAFFIC_STEPS = 20


class Exchange:
    """The same filled gradients, exchanged and combined in two ways; each rank has one role."""

    def __init__(self, name: str) -> None:
        self.group = Group.current("cpu")
        if name == "resnet20":
            task, model = cifar_task()
            parts = [random_parts(task, split, 64) for split in ("retain", "forget")]
        else:
            task, model, parts = mlp()
        self.engine = PairedEngine(task, model, METHODS["hamu-q"], group=self.group)
        self.engine.set_training_mode()
        self.engine.gradients(*parts)
        self.role = self.group.rank % 2
        self.views = self.engine.pair.views(self.role) or []
        self.saved = [view.clone() for view in self.views]
        self.start = [param.detach().clone() for param in self.engine.params]
        self.zeros = [torch.zeros_like(view) for view in self.saved]
        self.optimizer = torch.optim.SGD(self.engine.params, lr=LR, foreach=True)
        self.n_bytes = sum(param.nbytes for param in self.engine.params)
        self.naive_sent_bytes = 0

    @torch.no_grad()
    def restore(self) -> None:
        """Fill the buffers again, which both versions write into."""
        torch._foreach_copy_(self.views, self.saved)
        torch._foreach_copy_([param.data for param in self.engine.params], self.start)

    def ours(self) -> list[str]:
        """Shards to their owners, Grams as scalars, one combination, the combined shards gathered."""
        report = self.engine.decide(lr=LR, rules=RULES, max_grad_norm=1.0)
        self.engine.apply(report.decision, lr=LR)
        return list(report.decision.branches)

    def naive(self) -> list[str]:
        """Every rank gathers every rank's every tensor, in a round for each role."""
        rounds: list[list[Tensor]] = []
        size = self.group.size
        for role in (0, 1):
            means = []
            for own, zero in zip(self.saved, self.zeros, strict=True):
                received = [torch.empty_like(own) for _ in range(size)]
                dist.all_gather(received, own if role == self.role else zero)
                self.naive_sent_bytes += (size - 1) * own.nbytes
                means.append(torch.stack(received[role::2]).mean(dim=0) if size > 2 else received[role])
            rounds.append(means)
        branches = combine_per_tensor(self.engine.params, *rounds, lr=LR, constraint=RATIO * LR)
        self.optimizer.step()
        return branches

    def check(self) -> None:
        """Both versions make the same step."""
        self.restore()
        branches = self.ours()
        update = torch.cat([view.flatten() for view in self.views])  # the combined step lies where the gradients were
        self.restore()
        assert self.naive() == branches, "the two versions must take the same branches"
        naive = torch.cat([-LR * param.grad.flatten() for param in self.engine.params if param.grad is not None])
        error = float((naive - update).norm() / update.norm())
        # 1e-3: float32 norms of six million elements, as the per-tensor version takes them, are good to about 1e-4.
        assert error < 1e-3, f"the two versions must make the same step, relative difference {error}"


def mlp() -> tuple[Any, nn.Module, list[list[Any]]]:
    """A perceptron of 10 M parameters in six tensors, and a batch of each role."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 1792), nn.ReLU(), nn.Linear(1792, 10))
    task = SimpleNamespace(logits=lambda model, batch: model(batch.inputs))
    parts = [[SimpleNamespace(inputs=torch.randn(64, 3072), labels=torch.arange(64) % 10)] for _ in range(2)]
    return task, model, parts


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself, by the kernel's count."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def traffic(name: str) -> dict[str, float]:
    """Bytes that a rank sends a step: counted here, by the kernel for all ranks, and at best."""
    exchange = Exchange(name)
    group = exchange.group
    exchange.check()
    row: dict[str, float] = {"gradient_bytes": exchange.n_bytes, "ranks": group.size}
    row["least_bytes"] = 2 * (group.size - 1) / group.size * exchange.n_bytes
    for label, variant in (("", exchange.ours), ("naive_", exchange.naive)):
        dist.barrier()
        counted, kernel = group.n_sent_bytes + exchange.naive_sent_bytes, loopback_bytes()
        for _ in range(N_TRAFFIC_STEPS):
            exchange.restore()
            variant()
        dist.barrier()
        row[f"{label}sent_bytes"] = (group.n_sent_bytes + exchange.naive_sent_bytes - counted) / N_TRAFFIC_STEPS
        row[f"{label}kernel_bytes"] = (loopback_bytes() - kernel) / N_TRAFFIC_STEPS / group.size
    row["share_of_least"] = row["sent_bytes"] / row["least_bytes"]
    row["naive_share_of_least"] = row["naive_sent_bytes"] / row["least_bytes"]
    return row


def in_turns(
    variants: Mapping[str, Callable[[], object]], *, repeats: int, before: Callable[[], None], in_a_row: int = 1, warm_up: int = 2
) -> dict[str, float]:
    """Median milliseconds of calls that all ranks start together, until the last rank is done; variants take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + warm_up):
        for name, variant in variants.items():
            for call in range(in_a_row):
                before()
                dist.barrier()
                start = time.perf_counter()
                variant()
                if repeat >= warm_up and (call > 0 or in_a_row == 1):
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(slowest(values)) for name, values in times.items()}


def slowest(values: list[float]) -> list[float]:
    """The largest of each number over all ranks."""
    return Group.current("cpu").gather_numbers(torch.tensor(values, dtype=torch.float64)).max(dim=0).values.tolist()


def exchange_times(name: str, repeats: int) -> dict[str, float]:
    """Milliseconds of exchange and combination in both ways."""
    exchange = Exchange(name)
    exchange.check()
    times = in_turns(
        {"ours": exchange.ours, "naive": exchange.naive}, repeats=repeats, before=exchange.restore, in_a_row=5, warm_up=1
    )
    return {
        "exchange_ms": times["ours"],
        "naive_ms": times["naive"],
        "share_of_naive": times["ours"] / times["naive"],
        "parameters": float(sum(param.numel() for param in exchange.engine.params)),
        "n": float(repeats * 4),
    }


class Step:
    """A whole step on rows of CIFAR-10's shape: loading, passes, exchange, update."""

    def __init__(self, group: Group | None) -> None:
        keep_freed_memory()  # as a run does
        self.task, model = cifar_task()
        self.engine = PairedEngine(self.task, model, METHODS["hamu-q"], group=group)
        self.engine.set_training_mode()
        self.passes_ms: list[float] = []
        self.rest_ms: list[float] = []

    def __call__(self) -> float:
        """One step; returns its retain loss."""
        start = time.perf_counter()
        parts = [
            random_parts(self.task, split, BATCH) if self.engine.pair.share(role)[0] is not None else []
            for role, split in enumerate(("retain", "forget"))
        ]
        self.engine.gradients(*parts)
        passed = time.perf_counter()
        report = self.engine.decide(lr=LR, rules=RULES, max_grad_norm=1.0)
        self.engine.apply(report.decision, lr=LR)
        self.passes_ms.append((passed - start) * 1e3)
        self.rest_ms.append((time.perf_counter() - passed) * 1e3)
        return report.retain_loss


def step_times(repeats: int) -> dict[str, float]:
    """Milliseconds of a step of one process, while the other one idles, and of one of two processes, in turns."""
    group = Group.current("cpu")
    split, sequential = Step(group), Step(None)
    losses: dict[str, float] = {}

    def alone() -> None:
        if group.is_first:
            losses["sequential"] = sequential()

    def together() -> None:
        losses["split"] = split()

    times = in_turns({"sequential": alone, "split": together}, repeats=repeats, before=lambda: None, warm_up=1)
    if group.is_first:
        # 1e-3: float32 weights that took as many steps in another order of sums.
        assert abs(losses["split"] - losses["sequential"]) <= 1e-3 * abs(losses["sequential"]), losses
    passes, rest = slowest(split.passes_ms[1:]), slowest(split.rest_ms[1:])
    fastest_rest = [-value for value in slowest([-value for value in split.rest_ms[1:]])]
    return {
        "sequential_ms": times["sequential"],
        "split_ms": times["split"],
        "speedup": times["sequential"] / times["split"],
        "split_passes_ms": statistics.median(passes),
        # The rank that comes last waits for nobody: its time is that of the exchange.
        "split_exchange_ms": statistics.median(fastest_rest),
        "split_waiting_ms": statistics.median(slow - fast for slow, fast in zip(rest, fastest_rest, strict=True)),
        "sequential_passes_ms": statistics.median(sequential.passes_ms[1:]) if group.is_first else 0.0,
        "n": float(repeats),
    }


def measure(repeats: int = 40, step_repeats: int = 9) -> dict[str, Any]:
    """Traffic by number of ranks, times of the exchange by model, times of a whole step."""
    pool = Ranks(8)
    try:
        return {
            "step": pool.run(step_times, step_repeats, n=2, timeout_s=600)[0],
            "exchange": {
                "resnet20": pool.run(exchange_times, "resnet20", repeats, n=2, timeout_s=300)[0],
                "mlp_10m": pool.run(exchange_times, "mlp_10m", max(3, repeats // 8), n=2, timeout_s=300)[0],
            },
            "traffic": {str(n): pool.run(traffic, "resnet20", n=n, timeout_s=300)[0] for n in (2, 4, 8)},
        }
    finally:
        pool.close()


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print three tables."""
    columns = ("KB a step", "of the least", "kernel KB", "naive KB", "of the least", "kernel KB")
    print(f"{'ranks':>5s} " + " ".join(f"{column:>12s}" for column in columns))
    for n, row in figures["traffic"].items():
        cells = [row[name] / 1e3 for name in ("sent_bytes", "kernel_bytes", "naive_sent_bytes", "naive_kernel_bytes")]
        print(
            f"{n:>5s} {cells[0]:12.0f} {row['share_of_least']:12.3f} {cells[1]:12.0f} "
            f"{cells[2]:12.0f} {row['naive_share_of_least']:12.2f} {cells[3]:12.0f}"
        )
    print(f"\n{'exchange, combine':18s} {'parameters':>10s} {'ms':>8s} {'naive ms':>9s} {'share':>7s}")
    for name, row in figures["exchange"].items():
        print(
            f"{name:18s} {row['parameters']:10.0f} {row['exchange_ms']:8.2f} {row['naive_ms']:9.2f} {row['share_of_naive']:7.3f}"
        )
    print("\n2-rank step: ", "  ".join(f"{key} {value:.4g}" for key, value in figures["step"].items()))


if __name__ == "__main__":
    print_figures(measure())
