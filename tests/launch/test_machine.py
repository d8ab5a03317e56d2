"""How many trials run at once follows from the machine, unless it is said."""

from __future__ import annotations

import pytest

from hamu.errors import ConfigError
from launch.machine import Machine, Slots, choose_slots, this_machine


def machine(cpus: int = 16, gpus: int = 0) -> Machine:
    return Machine(cpus=cpus, cpu_name="a core", memory_bytes=2**34, gpus=gpus)


@pytest.mark.parametrize(
    ("cpus", "gpus", "asked", "slots"),
    [
        (16, 0, {}, Slots(count=16)),
        (16, 0, {"max_concurrent": 3}, Slots(count=3)),
        (2, 0, {"max_concurrent": 4}, Slots(count=4)),
        (16, 4, {}, Slots(count=4, cpus_per_trial=4, gpus_per_trial=1.0)),
        (16, 4, {"gpus": 0.5}, Slots(count=8, cpus_per_trial=2, gpus_per_trial=0.5)),
        (16, 4, {"gpus": 2}, Slots(count=2, cpus_per_trial=8, gpus_per_trial=2)),
        (16, 4, {"gpus": 0}, Slots(count=16)),
        (16, 2, {"gpus": 0.4}, Slots(count=4, cpus_per_trial=4, gpus_per_trial=0.4)),
    ],
)
def test_slots_follow_from_the_machine_and_what_is_asked(cpus: int, gpus: int, asked: dict, slots: Slots) -> None:
    assert choose_slots(machine(cpus, gpus), n_trials=100, **asked) == slots


def test_there_are_no_more_slots_than_trials() -> None:
    assert choose_slots(machine(16), n_trials=3).count == 3
    assert choose_slots(machine(16), n_trials=0).count == 1


@pytest.mark.parametrize(
    ("gpus", "asked", "said"),
    [
        (0, {"max_concurrent": 0}, "give 1 or more"),
        (0, {"gpus": 1}, "shows 0 GPUs; give --gpus 0"),
        (0, {"gpus": -1}, "0, a share up to 1, or a whole number"),
        (2, {"gpus": 1.5}, "0, a share up to 1, or a whole number"),
        (2, {"gpus": 0.5, "max_concurrent": 5}, "2 GPUs hold 4 trials of 0.5"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(gpus: int, asked: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_slots(machine(gpus=gpus), n_trials=100, **asked)


def test_this_machine_has_cores_and_hides_gpus_that_are_masked() -> None:
    here = this_machine({"CUDA_VISIBLE_DEVICES": ""})
    assert here.cpus >= 1
    assert here.gpus == 0
    assert "cores" in here.describe()
