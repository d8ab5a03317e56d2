"""A sweep on texts: one small Llama, shared by all trials, in one process each and in two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hamu.training.records import read_trials
from tests.launch.launched import Launched

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

GIVEN = (
    "--space", "llm/quickstart", "--set", "method=hamu-q,kl", "--set", "constraint_ratio=0.01", "--set", "lr=0.05",
    "--set", "epochs=0.5", "--set", "original.num_train_epochs=0.5", "--set", "forget_pct=5",
)  # fmt: skip
SPLIT = ("--set", "gradient_pairing=split-gpu", "--set", "num_workers=2")
METRICS = tuple(f"{split}_{metric}" for split in ("retain", "forget", "test") for metric in ("loss", "accuracy", "min_k"))


@pytest.fixture(scope="module")
def sweeps(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    launched = Launched(repo_root, tmp_path_factory.mktemp("artifacts"))
    yield launched
    launched.end()


def rows_of(sweeps: Launched, name: str) -> list[dict[str, Any]]:
    return read_trials(sweeps.root / "art" / "results" / "llm" / name / "trials.parquet")


def test_trials_on_texts_leave_their_adapters_and_split_ones_the_same_numbers(sweeps: Launched) -> None:
    out = sweeps.run("--name", "one", *GIVEN)
    assert "S " in out and "largest feasible constraint ratio" in out
    alone = rows_of(sweeps, "one")
    assert [(row["method"], row["status"]) for row in alone] == [("hamu-q", "finished"), ("kl", "finished")]
    for row in alone:
        folder = sweeps.root / row["model_path"]
        assert (folder / "adapter_model.safetensors").is_file()
        assert json.loads((folder / "record.json").read_text())["start_model"]["path"].endswith("authors/seed_42/forget_05/full")
        assert row["memory_estimate_bytes"] > 0
    sweeps.run("--name", "two", *GIVEN, *SPLIT)
    for one, other in zip(alone, rows_of(sweeps, "two"), strict=True):
        assert other["steps"] == one["steps"] == 4
        for name in METRICS:
            assert other[name] == pytest.approx(one[name], rel=1e-4), name  # float32, summed in another order
