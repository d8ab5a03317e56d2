"""A resumed sweep starts its trials from the weights that it began with, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hamu.errors import CheckpointError
from launch.originals import _pin
from launch.shared import Original


def test_other_weights_than_the_sweep_began_with_are_refused(tmp_path: Path) -> None:
    pins = tmp_path / "originals.json"
    first = Original(path="there", arrays={"w": np.ones(3, np.float32)})
    _pin(pins, "a", first)
    _pin(pins, "b", Original(path="elsewhere", arrays={"w": np.zeros(3, np.float32)}))
    _pin(pins, "a", first)
    with pytest.raises(CheckpointError, match="has other weights .* start a sweep of another --name"):
        _pin(pins, "a", Original(path="there", arrays={"w": np.full(3, 2, np.float32)}))
