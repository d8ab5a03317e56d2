"""What processes send each other: what arrives, how much is sent, and that all act on the same thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hamu.methods.catalog import METHODS
from hamu.methods.combine import StepRules
from hamu.models.resnet import ResNet20, resnet20_config
from hamu.tasks.own import OwnTask
from hamu.training.config import TrainConfig
from hamu.training.engine import PairedEngine
from hamu.training.groups import Group, SplitPair, roles_of
from hamu.training.loop import TrainingRun
from hamu.training.pairs import Wish
from hamu.training.stop import StopReason
from tests.training.processes import Ranks

pytestmark = pytest.mark.slow


def messages() -> list[Any]:
    group = Group.current("cpu")
    own, others = group.rank, group.others
    numbers = group.gather_numbers(torch.tensor([own, 10.0 * own], dtype=torch.float64))
    empty = group.gather_numbers(torch.zeros(0))
    sent = group.n_sent_bytes
    rows = group.gather_rows(torch.full((own, 2), float(own)), range(group.size))
    texts = group.gather_texts("ä" * 1500 if own == 0 else f"rank {own}")
    twice = [torch.zeros(1) for _ in range(2 * len(others))]
    group.swap(
        [message for rank in others for message in ((torch.tensor([1.0 + own]), rank), (torch.tensor([10.0 + own]), rank))],
        [(tensor, others[place // 2]) for place, tensor in enumerate(twice)],
    )
    return [
        numbers.tolist(),
        list(empty.shape),
        sent,
        [part.tolist() for part in rows],
        [text[:7] for text in texts],
        len(texts[0]),
        [float(tensor) for tensor in twice],
        group.any(own == group.size - 1),
        group.any(False),
        group.first(7.5 - own),
    ]


@pytest.mark.parametrize("n", [2, 3])
def test_every_rank_gets_what_the_others_sent(ranks: Ranks, n: int) -> None:
    for own, got in enumerate(ranks.run(messages, n=n)):
        numbers, empty, sent, rows, texts, length, twice, flag, no_flag, first = got
        assert numbers == [[rank, 10.0 * rank] for rank in range(n)]
        assert empty == [n, 0] and sent == 16 * (n - 1), "nothing is sent for an empty tensor"
        assert rows == [[[rank, rank]] * rank for rank in range(n)], "rank 0 has no rows"
        assert texts == ["ä" * 7] + [f"rank {rank}" for rank in range(1, n)]
        assert length == 1000, "2000 bytes"
        assert twice == [base + rank for rank in range(n) if rank != own for base in (1.0, 10.0)], "in the order sent"
        assert flag and not no_flag and first == 7.5


def compare_bits(name: str) -> bool:
    group = Group.current("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 7), nn.BatchNorm1d(7))
    model.register_buffer("mask", torch.ones(9, dtype=torch.bool))
    model.register_buffer("zero", torch.zeros(3))
    model.bfloat16() if name == "bf16" else model.double() if name == "float64" else None
    state = model.state_dict()
    if group.rank == 1:
        if name in ("0.weight", "1.running_var"):
            state[name].view(torch.int32).view(-1)[5] ^= 1
        elif name in ("bf16", "float64"):
            bits = state["0.weight"].view(torch.int16 if name == "bf16" else torch.int64)
            bits.view(-1)[-1] ^= 1
        elif name == "mask":
            state[name][8] = False
        elif name == "1.num_batches_tracked":
            state[name] += 1 << 40
        elif name == "zero":
            state[name][1] = -0.0
        elif name == "order":
            weight = state["0.weight"].view(-1)
            weight[:2] = weight[:2].flip(0)
    return group.have_same_bits(list(state.values()))


def all_bits(names: list[str]) -> dict[str, bool]:
    return {name: compare_bits(name) for name in names}


def test_one_flipped_bit_is_told_whatever_tensor_it_is_in(ranks: Ranks) -> None:
    names = ["0.weight", "1.running_var", "1.num_batches_tracked", "mask", "zero", "order", "bf16", "float64"]
    for told in ranks.run(all_bits, ["same", *names]):
        assert told == {"same": True, **dict.fromkeys(names, False)}


def averaged_table(dtype: torch.dtype, counts: list[int]) -> tuple[Tensor, Tensor, list[float]]:
    """This rank's shard of a pair that is random numbers on every rank, what it should be in float64, and both losses."""
    group = Group.current("cpu")
    roles = roles_of(group.size, is_paired=True)
    params = [torch.zeros(700, dtype=dtype), torch.zeros(3, 5, dtype=dtype)]
    pair = SplitPair(params, group, roles)
    every = [torch.randn(715, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(group.size)]
    for view, part in zip(pair.views(roles[group.rank]) or [], every[group.rank].split([700, 15]), strict=True):
        view.copy_(part.view_as(view))
    losses = torch.full((2,), 1.0 + group.rank, dtype=torch.float64)
    pair.exchange(losses, [counts[group.rank]] * 2, Wish())
    expected = torch.zeros(2, pair.layout.n_elements, dtype=torch.float64)
    for role in (0, 1):
        total = sum(count for count, other in zip(counts, roles, strict=True) if other == role)
        for rank in range(role, group.size, 2):
            for view, part in zip(pair.layout.views(expected[role]), every[rank].split([700, 15]), strict=True):
                view.add_(part.double().view_as(view), alpha=counts[rank] / total)
    reading = pair.read(precise=True)
    shard = expected.view(2, group.size, -1)[:, group.rank]
    return pair.table, shard, [reading.retain_loss, reading.forget_loss]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bf16"])
def test_each_label_counts_once_and_half_precision_is_summed_in_float32(ranks: Ranks, dtype: torch.dtype) -> None:
    for n, counts, losses in ((2, [5, 3], [1.0, 2.0]), (4, [3, 4, 1, 0], [(3 * 1 + 1 * 3) / 4, 2.0])):
        for table, expected, read in ranks.run(averaged_table, dtype, counts, n=n):
            assert table.dtype == (torch.float32 if dtype is torch.bfloat16 else dtype)
            # A rounding or two of the table's own dtype; bf16 would miss by 4e-3.
            torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-14 if dtype is torch.float64 else 1e-6)
            assert read == pytest.approx(losses, rel=1e-12)


class NoTask:
    """Stands where gradients are given, not computed."""

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        raise NotImplementedError


def sent_in_a_step(dtype: torch.dtype) -> tuple[int, int, int, bool]:
    """Bytes counted, bytes of the gradient, bytes that the loopback sent meanwhile, and whether all hold the same weights."""
    torch.manual_seed(0)
    group, model = Group.current("cpu"), ResNet20(resnet20_config(n_classes=10)).to(dtype)
    engine = PairedEngine(NoTask(), model, METHODS["hamu-q"], group=group)
    generator = torch.Generator().manual_seed(group.rank)
    for view in (engine.pair.views(0) or []) + (engine.pair.views(1) or []):
        view.copy_(torch.randn(view.shape, generator=generator))
    engine._n_labels[group.rank % 2] = 4
    counted, kernel = group.n_sent_bytes, loopback_bytes()
    rules = StepRules(constraint=1e-4, on_infeasible="continue")
    report = engine.decide(lr=1e-2, rules=rules, max_grad_norm=1.0)
    engine.apply(report.decision, lr=1e-2)
    group.any(False)  # all messages have arrived
    counted, kernel = group.n_sent_bytes - counted, loopback_bytes() - kernel
    n_bytes = sum(param.nbytes for param in model.parameters())
    return counted, n_bytes, kernel, group.have_same_bits(list(model.parameters()))


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself, by the kernel's count."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("n", [2, 4])
def test_a_step_sends_a_tenth_more_than_one_all_reduce_at_most(ranks: Ranks, n: int, dtype: torch.dtype) -> None:
    for counted, n_bytes, kernel, is_same in ranks.run(sent_in_a_step, dtype, n=n):
        least = 2 * (n - 1) / n * n_bytes
        assert least <= counted <= 1.1 * least
        # Every rank's messages go over the loopback, which others may use too; 0.9: ranks read it at different times.
        assert kernel >= 0.9 * counted
        assert is_same


def small_run(group: Group, *, folder: str | None = None, **settings: Any) -> TrainingRun:
    """Ten steps of HAMU-Q on noise."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 12, generator=generator)
    labels = torch.arange(60) % 3
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.manual_seed(1)
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    task = OwnTask((inputs[:40], labels[:40]), (inputs[40:], labels[40:]), model=model)
    flat = {"method": "hamu-q", "lr": 0.05, "constraint_ratio": 0.05, "batch_size": 4, "epochs": 1, **settings}
    config = TrainConfig.from_flat({"continue_on_failed_feasibility": True, "eval_strategy": "no", "save_strategy": "no", **flat})
    return TrainingRun(config, task, model, group=group, checkpoint_path=Path(folder) / "c.pt" if folder else None)


def stopped_by(asking: int, at: int, reason: StopReason) -> tuple[int, str, bool]:
    group = Group.current("cpu")
    run = small_run(group)
    for row in run:
        if group.rank == asking and row["step"] == at:
            run.request_stop(reason)
    assert run.result is not None
    return run.result.steps, run.result.stop_reason, group.have_same_bits(list(run.model.parameters()))


@pytest.mark.parametrize(("n", "asking"), [(2, 1), (2, 0), (4, 3)])
def test_a_request_of_any_rank_ends_all_at_the_same_step(ranks: Ranks, n: int, asking: int) -> None:
    ends = ranks.run(stopped_by, asking, 4, StopReason.TARGET, n=n)
    assert ends == [(4, StopReason.TARGET, True)] * n


def paused_by(asking: int) -> list[int]:
    group = Group.current("cpu")
    run = small_run(group)
    due = []
    for row in run:
        if row["kind"] != "step":
            continue
        if run.is_pause_due:
            due.append(row["step"])
            run.pause_at(None)
        if row["step"] in (3, 7) and group.rank == asking:
            run.pause_at(0.0)
    return due


def test_the_first_rank_alone_decides_when_all_pause(ranks: Ranks) -> None:
    assert ranks.run(paused_by, 0) == [[4, 8]] * 2
    assert ranks.run(paused_by, 1) == [[]] * 2


def broken_on(rank: int, value: float) -> tuple[int, str, bool, bool]:
    """A gradient that is not finite at the fifth step, on one rank."""
    group = Group.current("cpu")
    run = small_run(group)
    gradients, weights = run.engine.gradients, []

    def inject(*parts: Any) -> None:
        gradients(*parts)
        weights.append([param.detach().clone() for param in run.engine.params])
        if run.step == 4 and group.rank == rank:
            for role in (0, 1):
                for view in run.engine.pair.views(role) or []:
                    view.view(-1)[0] = value

    run.engine.gradients = inject  # type: ignore[method-assign]
    list(run)
    assert run.result is not None
    is_kept = all(torch.equal(new, old) for new, old in zip(run.engine.params, weights[4], strict=True))
    return run.result.steps, run.result.stop_reason, is_kept, group.have_same_bits(list(run.model.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("n", "rank"), [(2, 0), (2, 1), (4, 2)])
def test_a_gradient_that_is_not_finite_on_one_rank_ends_all_before_the_step(
    ranks: Ranks, n: int, rank: int, value: float
) -> None:
    assert ranks.run(broken_on, rank, value, n=n) == [(4, StopReason.NON_FINITE, True, True)] * n


def notice_a_difference() -> str:
    group = Group.current("cpu")
    run = small_run(group)
    try:
        for row in run:
            if row["step"] == 6 and group.rank == 1:
                with torch.no_grad():
                    run.engine.params[0].view(-1)[0] += 1e-3
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_ranks_whose_weights_differ_all_raise_at_the_end(ranks: Ranks) -> None:
    for told in ranks.run(notice_a_difference):
        assert "hold different weights after step 10" in told


def test_one_process_sends_nothing() -> None:
    group = Group.alone()
    assert group.is_first and group.any(True) and not group.any(False) and group.first(3.0) == 3.0
    assert group.gather_texts("x") == ["x"] and group.have_same_bits([torch.ones(2)]) and group.n_sent_bytes == 0
