"""What is secret is in nothing that a sweep writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hamu.cli import security
from launch.attempts import Attempts
from launch.plan import make_plan
from launch.shared import failed_row
from tune_spaces.space import load_space


def test_what_is_kept_secret_is_in_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_KEPT", {})
    plan = make_plan(load_space("digits/quickstart"), name="mine", overrides={}, root=tmp_path)
    security.keep_secret({"HF_TOKEN": "hf_abcdefgh"})
    row = failed_row(plan, plan.trials[0], "OSError: https://user:hf_abcdefgh@hub/model")
    assert security.secret_names() == ("HF_TOKEN",)
    assert "hf_abcdefgh" not in json.dumps(row)
    attempts = Attempts(tmp_path, "first")
    attempts.open()
    attempts.note("died of hf_abcdefgh")
    assert "hf_abcdefgh" not in (tmp_path / "attempts.json").read_text()
