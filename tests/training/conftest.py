"""A dataset so small that a run on it takes a second: noise that depends on its class, in a local folder."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import nn

from hamu.tasks.vision import VisionTask, task_for
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.original import load_data
from tests.training.small_digits import ended, small_model


def write_images(folder: Path, *, seed: int = 0, n_rows: int = 48) -> Path:
    """Write a dataset folder of two parquet files, four classes of 8x8 colour images."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        labels = np.arange(n_rows) % 4
        pixels = rng.integers(0, 120, (n_rows, 8, 8, 3)) + 40 * labels[:, None, None, None]
        images = []
        for image in pixels.astype(np.uint8):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, format="PNG")
            images.append(stream.getvalue())
        pq.write_table(pa.table({"img": images, "label": labels}), folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The folder of the small dataset."""
    return write_images(tmp_path / "images")


@pytest.fixture
def tiny(images: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Build a configuration on the small dataset, under an artifact root of the test's own; two steps an epoch."""

    def build(**settings: Any) -> TrainConfig:
        base = {"dataset_name": str(images), "artifact_root": str(tmp_path / "root"), "batch_size": 24, "epochs": 1}
        return TrainConfig.from_flat({**base, "device": "cpu", **settings})

    return build


@pytest.fixture(scope="session")
def digits_task(tmp_path_factory: pytest.TempPathFactory) -> VisionTask:
    """The embedded digits with forget class 0."""
    config = TrainConfig.from_flat({"method": "hamu-q", "dataset_cache_dir": str(tmp_path_factory.mktemp("cache"))})
    return task_for(config, load_data(config))


@pytest.fixture(scope="session")
def digits_model(digits_task: VisionTask) -> nn.Module:
    """A small model that knows the digits: test accuracy about 0.9. Not to be changed: `copy_of` it."""
    model = small_model()
    result = ended(TrainingRun(TrainConfig.from_flat({"epochs": 8, "lr": 1e-2, "add_forget_to_train": True}), digits_task, model))
    assert result.after["test_accuracy"] > 0.85
    return model
