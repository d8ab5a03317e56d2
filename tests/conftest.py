"""What every test stands on: a clean environment, no network, and one Ray cluster a session for the tests that ask."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The environment names that the command line reads: a developer's shell must not change what a test runs.
SETTING_NAMES = (
    "METHOD",
    "LR",
    "CONSTRAINT_RATIO",
    "FORGET_CLASS",
    "HARD_PROBABILITY",
    "NUM_GPUS",
    "GRADIENT_PAIRING",
    "MODEL_NAME",
    "FORGET_PCT",
    "DUPLICATE_SPLIT",
    "ADD_DUPLICATE",
    "DATASET_NAME",
    "USE_WANDB",
    "ARTIFACT_ROOT",
    "BATCH_SIZE",
    "NUM_TRAIN_EPOCHS",
    "RAY_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_AUTH_TOKEN_PATH",
)

# Set before any library is imported, since they are read at import.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # the models of the tests are too small to share out
    RAY_USAGE_STATS_ENABLED="0",
    TUNE_DISABLE_STRICT_METRIC_CHECKING="1",  # as in hamu/cli/ray_environment.py
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the developer's shell, for the test and the processes that it starts."""
    for name in SETTING_NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local Ray of two CPUs for the whole session; yields the `ray` module.

    It never joins a cluster that is already there, and its temporary folder is its own.
    """
    import ray

    # Short, since Ray puts Unix sockets below it and their paths may have 107 characters only.
    folder = tempfile.mkdtemp(prefix="hamu-", dir="/tmp")
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    try:
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Any]:
    """Four processes that tests call as groups of 2 to 4 ranks; started at the first call."""
    from tests.training.processes import Ranks

    pool = Ranks()
    try:
        yield pool
    finally:
        pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none; torch is asked only when such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
