"""All trials of a sweep pair their gradients the same way; a dry run says how."""

from __future__ import annotations

from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.machine import Machine, Slots
from launch.pairing import Pairing, pairing_of
from launch.plan import Plan, make_plan, read_overrides
from launch.plan_text import plan_text
from tests.launch.small_sweep import SPACE


def plan(*assignments: str) -> Plan:
    return make_plan(SPACE, name="small", overrides=read_overrides(assignments), root=Path("art"))


def test_the_pairing_follows_from_the_settings() -> None:
    assert pairing_of(plan()).is_split is False
    given = pairing_of(plan("gradient_pairing=split-gpu", "num_workers=4", "backend=gloo", "ddp_timeout=60"))
    assert given == Pairing(n_workers=4, backend="gloo", timeout_s=60)


def test_trials_that_pair_differently_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_workers 2, 4: .* is the same for all; run one sweep for each"):
        pairing_of(plan("gradient_pairing=split-gpu", "num_workers=2,4"))


def test_a_dry_run_says_how_many_workers_a_trial_has() -> None:
    machine = Machine(cpus=2, cpu_name="a core", memory_bytes=2**34, gpus=0)
    slots = Slots(count=1, cpus_per_trial=2, workers_per_trial=2)
    text = plan_text(plan("gradient_pairing=split-gpu", "num_workers=2"), machine=machine, slots=slots, folder="there")
    assert "slots      1 at once, 2 workers a trial (gloo), 1 core each" in text
