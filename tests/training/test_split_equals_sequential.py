"""Split pairing takes the steps of sequential pairing: 2 ranks as one process, 4 ranks as one that accumulates two batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hamu.methods.catalog import METHODS
from hamu.models.resnet import ResNet20, resnet20_config
from hamu.tasks.own import OwnTask
from hamu.training.config import TrainConfig
from hamu.training.evaluation import evaluate
from hamu.training.groups import Group
from hamu.training.loop import TrainingRun
from hamu.training.stop import StopReason
from tests.training.processes import Ranks

N_STEPS = 20
N_RETAIN, N_FORGET, N_TEST, BATCH = 65, 21, 10, 8
"""65 rows are eight batches of 8 and one row, or four of 16 and one row: of two pairs one has no row at the end of an epoch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run, the same on any number of ranks but for `accumulation`."""

    settings: dict[str, Any]
    dtype: torch.dtype = torch.float64
    accumulation: int = 1
    batch_size: int = BATCH
    is_resnet: bool = False
    has_dropout: bool = False
    folder: str | None = None
    die_at: int | None = None
    cancel_at: int | None = None  # by the last rank


@dataclass(frozen=True, kw_only=True)
class End:
    """What a rank has to show at the end of a run."""

    weights: Tensor
    start: Tensor
    state: dict[str, Tensor]
    rows: list[dict[str, Any]]
    steps: int
    reason: str
    after: dict[str, float]
    alone: dict[str, float] = field(default_factory=dict)
    """The metrics that one process finds for the model at the end."""
    n_last_rows: int

    def losses(self) -> list[float]:
        """Both losses of all steps."""
        names = ("retain_batch_loss", "forget_batch_loss")
        return [row[name] for row in self.rows if row["kind"] == "step" for name in names if name in row]


def small_model(dtype: torch.dtype, *, has_dropout: bool) -> nn.Module:
    """Every kind of block, in milliseconds a step; the larger linear layer has rows in the shards of several ranks."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    features[1].running_mean.uniform_(-0.1, 0.1)
    features[1].running_var.uniform_(0.5, 1.5)
    head = nn.Sequential(nn.Linear(96, 40), nn.Tanh(), nn.Dropout(0.3 if has_dropout else 0.0), nn.Linear(40, 4))
    return nn.Sequential(*features, *head).to(dtype)


def end_of(case: Case) -> End:
    """Run a case on this rank, to its end or to the step at which it dies."""
    group = Group.current("cpu") if dist.is_initialized() else Group.alone()
    generator = torch.Generator().manual_seed(0)
    n_rows, channels = N_RETAIN + N_FORGET + N_TEST, 3 if case.is_resnet else 1
    labels = torch.arange(n_rows) % 4
    images = torch.randn(n_rows, channels, 8, 8, generator=generator) + 0.3 * labels[:, None, None, None]
    rows = [*zip(*(part.split([N_RETAIN, N_FORGET, N_TEST]) for part in (images.to(case.dtype), labels)), strict=True)]
    torch.manual_seed(0)
    if case.is_resnet:
        model: nn.Module = ResNet20(resnet20_config(n_classes=4)).to(case.dtype)
    else:
        model = small_model(case.dtype, has_dropout=case.has_dropout)
    task = OwnTask(*rows, model=model)
    flat = {
        "lr": 0.05,
        "batch_size": case.batch_size,
        "gradient_accumulation_steps": case.accumulation,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "no",
        "save_strategy": "no",
        "constraint_ratio": 0.1 if case.settings["method"].startswith("hamu") else None,
        "continue_on_failed_feasibility": True,
        **case.settings,
    }
    path = Path(case.folder) / "checkpoint.pt" if case.folder else None
    run = TrainingRun(TrainConfig.from_flat(flat), task, model, group=group, checkpoint_path=path)
    run.total_steps = N_STEPS
    start, reports = flat_weights(model), []
    for row in run:
        reports.append(row)
        if row["step"] == case.die_at:
            break
        if row["step"] == case.cancel_at and group.rank == group.size - 1:
            run.request_stop(StopReason.CANCELLED)
    result = run.result
    assert group.have_same_bits(list(model.state_dict().values()))
    return End(
        weights=flat_weights(model),
        start=start,
        state=model.state_dict(),
        rows=reports,
        steps=run.step,
        reason=result.stop_reason if result else "died",
        after=result.after if result else {},
        alone=evaluate(task, model, batch_size=8, autocast=run.engine.autocast()) if result else {},
        n_last_rows=len(run.plan.retain(run.plan.steps_per_epoch - 1)),
    )


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().double().flatten() for param in model.parameters()])


def both(ranks: Ranks, case: Case, n: int) -> tuple[End, End]:
    """The end of a run in one process and on n ranks, all of which end alike."""
    one_pair = Case(**vars(case) | {"accumulation": case.accumulation * (n if case.settings["method"] == "none" else n // 2)})
    (sequential,) = ranks.run(end_of, one_pair, n=1)
    first, *others = ranks.run(end_of, case, n=n)
    for other in others:
        assert all(equal_bits(other.state[name], value) for name, value in first.state.items())
        assert (other.steps, other.reason, other.after) == (first.steps, first.reason, first.after)
        assert without_times(other.rows) == without_times(first.rows), "all see the same reports"
    assert first.after == first.alone, "the metrics of one process, to the bit"
    return sequential, first


def equal_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(part.contiguous().view(-1).view(torch.uint8) for part in (one, other)))


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ("wall_s", "train_s")} for row in rows]


def assert_same_steps(sequential: End, split: End, *, n_last_rows: int = 1) -> None:
    """Float64: the same weights, and they moved; the last step of an epoch had so few rows."""
    assert split.steps == sequential.steps == N_STEPS and split.n_last_rows == sequential.n_last_rows == n_last_rows
    assert float((split.weights - split.start).abs().max()) > 1e-4
    assert float((split.weights - sequential.weights).abs().max()) <= 1e-10 * float(sequential.weights.abs().max())


CASES = {
    **{name: {"method": name} for name in METHODS},
    "gru gru_beta": {"method": "gru", "gru_beta": 0.5},
    "gdiff use_optimizer": {"method": "gdiff", "use_optimizer": True, "lr": 1e-3},
    "hamu-u full_grad cosine": {"method": "hamu-u", "full_grad": True, "lr_scheduler_type": "cosine"},
    "hamu-q softmax": {"method": "hamu-q", "distribute_constraint_softmax_dp": True, "hamu_radius": 0.01},
    "training": {"method": "none", "freeze_batchnorm": True, "lr": 1e-3},
}


def every_case(*fast: tuple[str, int]) -> pytest.MarkDecorator:
    """All cases on 2 and on 4 ranks; all but a few only in `make test-all`."""
    return pytest.mark.parametrize(
        ("settings", "n"),
        [
            pytest.param(settings, n, id=f"{name}-{n}", marks=() if (name, n) in fast else pytest.mark.slow)
            for name, settings in CASES.items()
            for n in (2, 4)
        ],
    )


@every_case(("hamu-q", 2), ("hamu-q", 4), ("gru gru_beta", 4))
def test_twenty_steps_in_float64_give_the_same_weights(ranks: Ranks, settings: dict[str, Any], n: int) -> None:
    # Training on n ranks takes n batches a step: a smaller batch keeps one row for the last step.
    size = BATCH // 2 if settings["method"] == "none" else BATCH
    assert_same_steps(*both(ranks, Case(settings=settings, batch_size=size), n))


@every_case(("hamu-q", 2))
def test_twenty_steps_in_float32_see_the_same_losses(ranks: Ranks, settings: dict[str, Any], n: int) -> None:
    sequential, split = both(ranks, Case(settings=settings, dtype=torch.float32), n)
    assert split.steps == N_STEPS and len(split.losses()) >= N_STEPS
    # 1e-7: a KL divergence near zero is a difference of float32 numbers near one.
    assert split.losses() == pytest.approx(sequential.losses(), rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "is_resnet"), [(2, False), (4, False), (2, True)])
def test_accumulation_on_each_rank_is_accumulation_in_one_process(ranks: Ranks, n: int, is_resnet: bool) -> None:
    # The five rows at the end are a batch of three and one of two, on one rank or on two.
    case = Case(settings={"method": "hamu-q"}, accumulation=2, batch_size=3, is_resnet=is_resnet)
    assert_same_steps(*both(ranks, case, n), n_last_rows=5)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_bf16_parameters_take_nearly_the_same_steps_as_in_one_process(ranks: Ranks, n: int) -> None:
    sequential, split = both(ranks, Case(settings={"method": "hamu-q"}, dtype=torch.bfloat16), n)
    assert split.steps == N_STEPS and torch.isfinite(split.weights).all()
    assert float((split.weights - split.start).abs().max()) > 1e-3
    assert split.losses() == pytest.approx(sequential.losses(), rel=2e-2)  # bf16 keeps 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_autocast_passes_take_nearly_the_steps_of_float32_in_one_process(ranks: Ranks, precision: str) -> None:
    """Nothing is clipped, so a loss scale that was not taken out of the gradients would make steps 1000 times longer."""
    settings = {"method": "gdiff", "max_grad_norm": 1e6}
    (exact,) = ranks.run(end_of, Case(settings=settings, dtype=torch.float32), n=1)
    sequential, split = both(ranks, Case(settings={**settings, precision: True}, dtype=torch.float32), 2)
    assert split.steps == N_STEPS and float((split.weights - split.start).abs().max()) > 1e-3
    for other in (sequential, exact):
        assert split.losses() == pytest.approx(other.losses(), rel=2e-2)  # bf16 keeps 8 bits


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_criterion_and_an_infeasible_step_end_all_ranks_at_the_same_step(ranks: Ranks, n: int) -> None:
    stops = {
        StopReason.CRITERION: {"constraint_ratio": 0.3, "stop_on_stopping_criterion": True},
        StopReason.INFEASIBLE: {"constraint_ratio": 0.3, "continue_on_failed_feasibility": False},
    }
    for reason, settings in stops.items():
        case = Case(settings={"method": "hamu-q", "lr": 0.2, **settings}, batch_size=2 * BATCH // n)
        sequential, split = both(ranks, case, n)
        assert split.reason == sequential.reason == reason
        assert 0 < split.steps == sequential.steps < N_STEPS
        assert split.weights.numpy() == pytest.approx(sequential.weights.numpy(), rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "n"),
    [
        ({"method": "hamu-q"}, 2),
        pytest.param({"method": "gru", "gru_beta": 0.5}, 2, marks=pytest.mark.slow),
        pytest.param({"method": "gru", "gru_beta": 0.5}, 4, marks=pytest.mark.slow),
        pytest.param({"method": "gdiff", "use_optimizer": True}, 2, marks=pytest.mark.slow),
        pytest.param({"method": "none", "freeze_batchnorm": True}, 4, marks=pytest.mark.slow),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else str(value),
)
def test_a_killed_and_resumed_group_gives_the_uninterrupted_numbers_to_the_bit(
    ranks: Ranks, settings: dict[str, Any], n: int, tmp_path: Path
) -> None:
    """With dropout: each rank goes on from its own random state."""
    saving = {**settings, "save_strategy": "steps", "save_steps": 6}
    cases = {
        name: Case(settings=saving, dtype=torch.float32, has_dropout=True, folder=str(tmp_path / name))
        for name in ("whole", "parts")
    }
    whole = ranks.run(end_of, cases["whole"], n=n)
    died = ranks.run(end_of, Case(**vars(cases["parts"]) | {"die_at": 15}), n=n)
    resumed = ranks.run(end_of, cases["parts"], n=n)
    for rank in range(n):
        assert died[rank].reason == "died" and resumed[rank].rows[0]["step"] == 13
        assert all(equal_bits(resumed[rank].state[name], value) for name, value in whole[rank].state.items())
        assert resumed[rank].after == whole[rank].after
        at_13 = next(place for place, row in enumerate(whole[rank].rows) if row["step"] == 13)
        assert without_times(resumed[rank].rows) == without_times(whole[rank].rows[at_13:])


@pytest.mark.parametrize(
    "settings", [{"method": "hamu-q"}, {"method": "gru", "gru_beta": 0.5}], ids=lambda value: value["method"]
)
def test_a_cancelled_and_resumed_group_gives_the_uninterrupted_numbers_to_the_bit(
    ranks: Ranks, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The step that carries the request is begun and not applied; it leaves no trace in averages or random states."""
    whole, cut = (
        Case(settings=settings, dtype=torch.float32, has_dropout=True, folder=str(tmp_path / name)) for name in ("whole", "cut")
    )
    uninterrupted = ranks.run(end_of, whole, n=2)
    cancelled = ranks.run(end_of, Case(**vars(cut) | {"cancel_at": 9}), n=2)
    resumed = ranks.run(end_of, cut, n=2)
    for rank in range(2):
        assert (cancelled[rank].reason, cancelled[rank].steps) == ("cancelled", 9)
        assert all(equal_bits(resumed[rank].state[name], value) for name, value in uninterrupted[rank].state.items())
        assert resumed[rank].after == uninterrupted[rank].after
