"""Split pairing takes the steps of sequential pairing on texts too: whole models and adapters, with and without checkpointing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hamu.methods.catalog import METHODS
from hamu.tasks.catalog import modality_of
from hamu.training.config import TrainConfig
from hamu.training.groups import Group
from hamu.training.loop import TrainingRun
from tests.training.processes import Ranks

pytestmark = pytest.mark.slow

N_STEPS, BATCH = 7, 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run on texts."""

    folder: str
    method: str = "hamu-q"
    lora: bool = True
    checkpointing: bool = False
    accumulation: int = 1
    dtype: torch.dtype = torch.float64


def end_of(case: Case) -> tuple[Tensor, Tensor, list[float]]:
    """The trained weights before and after a run on this rank, and both losses of its steps."""
    group = Group.current("cpu") if dist.is_initialized() else Group.alone()
    flat: dict[str, Any] = {
        "modality": "llm",
        "method": case.method,
        "lr": 0.05,
        "batch_size": BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_checkpointing": case.checkpointing,
        "add_lora": case.lora,
        "eval_strategy": "no",
        "save_strategy": "no",
        "dataset_name": f"{case.folder}/retain.jsonl",
        "forget_dataset_name": f"{case.folder}/forget.jsonl",
        "test_dataset_name": f"{case.folder}/test.jsonl",
    }
    if case.method.startswith("hamu"):
        flat |= {"constraint_ratio": 0.01, "continue_on_failed_feasibility": True}
    config = TrainConfig.from_flat(flat)
    task = modality_of(config).make_task(config, modality_of(config).load_data(config))
    model = task.new_model(0)
    with torch.no_grad():  # a new adapter's other half is zero
        generator = torch.Generator().manual_seed(1)
        for param in model.parameters():
            if param.requires_grad and not param.any():
                param.normal_(0, 0.02, generator=generator)
    model = model.to(case.dtype)
    run = TrainingRun(config, task, model, group=group)
    run.total_steps = N_STEPS
    start = trained(model)
    losses = [
        row[name] for row in run if row["kind"] == "step" for name in ("retain_batch_loss", "forget_batch_loss") if name in row
    ]
    assert run.step == N_STEPS
    assert group.have_same_bits([param for param in model.parameters() if param.requires_grad])
    return start, trained(model), losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts of 1 to 12 words; 37 rows are six batches of 6 and one row, so that of two pairs one has none at the end."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["red", "green", "blue", "salt", "iron", "moss", "wind", "seven", "eight", "nine", "ten", "eleven"]
    for split, first, n in (("retain", 0, 37), ("forget", 37, 11), ("test", 48, 5)):
        rows = [{"question": f"What is {i}?", "answer": " ".join(words[: 1 + i % 12])} for i in range(first, first + n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def trained(model: torch.nn.Module) -> Tensor:
    return torch.cat([param.detach().double().flatten() for param in model.parameters() if param.requires_grad])


@pytest.mark.parametrize(
    ("lora", "checkpointing", "method"),
    [
        (True, False, "hamu-q"),
        *(pytest.param(True, False, method, marks=pytest.mark.slow) for method in METHODS if method != "hamu-q"),
        *(
            pytest.param(*kind, method, marks=pytest.mark.slow)
            for kind in ((True, True), (False, False), (False, True))
            for method in ("hamu-q", "kl")
        ),
    ],
)
def test_two_ranks_take_the_steps_of_one_process(ranks: Ranks, folder: str, lora: bool, checkpointing: bool, method: str) -> None:
    case = Case(folder=folder, method=method, lora=lora, checkpointing=checkpointing)
    ((_, alone, _),) = ranks.run(end_of, case, n=1)
    (start, split, _), (_, other, _) = ranks.run(end_of, case, n=2)
    assert torch.equal(split, other)
    assert float((split - start).abs().max()) > 1e-5, "the weights have moved"
    # The passes see the same rows in the same order, so that only sums over ranks are rounded differently, in float64. Llama
    # normalises in float32 whatever the parameters are, which turns such a difference into one of a float32 at times.
    assert float((split - alone).abs().max()) <= 1e-7 * float(alone.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_four_ranks_take_the_steps_of_one_that_accumulates_two_batches(ranks: Ranks, folder: str, lora: bool) -> None:
    ((_, alone, _),) = ranks.run(end_of, Case(folder=folder, lora=lora, accumulation=2), n=1)
    (start, split, _), *_ = ranks.run(end_of, Case(folder=folder, lora=lora), n=4)
    assert float((split - start).abs().max()) > 1e-5
    assert float((split - alone).abs().max()) <= 1e-6 * float(alone.abs().max())  # other rows go together; float32 inside


@pytest.mark.slow
def test_two_ranks_see_the_losses_of_one_process_in_float32(ranks: Ranks, folder: str) -> None:
    case = Case(folder=folder, dtype=torch.float32)
    ((_, _, alone),) = ranks.run(end_of, case, n=1)
    (_, _, split), _ = ranks.run(end_of, case, n=2)
    assert len(split) == 2 * N_STEPS
    assert split == pytest.approx(alone, rel=1e-5)
