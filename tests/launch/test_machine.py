"""How many trials run at once follows from the machine, unless it is said."""

from __future__ import annotations

import pytest

from hamu.errors import ConfigError
from launch.machine import Machine, Slots, choose_slots, this_machine
from launch.pairing import Pairing


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


SPLIT, GLOO = Pairing(n_workers=2), Pairing(n_workers=2, backend="gloo")


@pytest.mark.parametrize(
    ("cpus", "gpus", "pairing", "asked", "slots"),
    [
        (5, 0, SPLIT, {}, Slots(count=2, cpus_per_trial=2, workers_per_trial=2)),
        (5, 0, SPLIT, {"max_concurrent": 1}, Slots(count=1, cpus_per_trial=2, workers_per_trial=2)),
        (16, 5, SPLIT, {}, Slots(count=2, cpus_per_trial=8, gpus_per_trial=2, workers_per_trial=2, backend="nccl")),
        (16, 4, SPLIT, {"gpus": 0}, Slots(count=8, cpus_per_trial=2, workers_per_trial=2)),
        (16, 4, SPLIT, {"gpus": 2}, Slots(count=2, cpus_per_trial=8, gpus_per_trial=2, workers_per_trial=2, backend="nccl")),
        (16, 1, GLOO, {}, Slots(count=1, cpus_per_trial=16, gpus_per_trial=1, workers_per_trial=2)),
    ],
)  # fmt: skip
def test_a_split_trial_takes_a_core_or_a_gpu_for_each_worker(
    cpus: int, gpus: int, pairing: Pairing, asked: dict, slots: Slots
) -> None:
    assert choose_slots(machine(cpus, gpus), n_trials=100, pairing=pairing, **asked) == slots


def test_workers_share_cores_where_there_are_too_few_and_that_is_said() -> None:
    slots = choose_slots(machine(2), n_trials=100, pairing=Pairing(n_workers=4))
    assert (slots.count, slots.workers_per_trial, slots.cpus_per_worker) == (1, 4, 1)
    assert slots.warning is not None and "has 2 cores" in slots.warning
    assert slots.describe() == "1 at once, 4 workers a trial (gloo), 1 core each"


@pytest.mark.parametrize(
    ("gpus", "asked", "said"),
    [
        (
            1,
            {},
            "takes 2 whole GPUs a trial, and there are 1 to use; use --set gradient_pairing=sequential, or --set backend=gloo",
        ),
        (4, {"gpus": 0.5}, "each of the 2 workers of a trial has a whole GPU"),
        (4, {"max_concurrent": 3}, "4 GPUs hold 2 trials of 2 workers"),
    ],
)
def test_what_split_trials_cannot_have_is_refused(gpus: int, asked: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_slots(machine(gpus=gpus), n_trials=100, pairing=SPLIT, **asked)
