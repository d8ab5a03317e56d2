"""What the tests of slots share: the rows of digits, and a model that was trained on them for an epoch."""

from __future__ import annotations

import pytest

from hamu.data.sources import ImageData, load_image_data
from hamu.training.config import TrainConfig
from launch.shared import Original
from tests.launch.small_sweep import small_original


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return load_image_data(TrainConfig().data)


@pytest.fixture(scope="session")
def original(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return small_original(digits, tmp_path_factory.mktemp("original"))
