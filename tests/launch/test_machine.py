"""How many trials run at once follows from the machine, unless it is said."""

from __future__ import annotations

import pytest

from hamu.errors import ConfigError
from launch.machine import CONTEXT_BYTES, Machine, Slots, choose_slots, fit_slots, fit_text, memory_cap, this_machine
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


GIB = 2**30


def gpu_machine(cpus: int = 16, gpus: int = 1, gib: float = 80) -> Machine:
    return Machine(cpus=cpus, cpu_name="a core", memory_bytes=2**38, gpus=gpus, gpu_memory_bytes=int(gib * GIB))


@pytest.mark.parametrize(
    ("machine", "gib_a_trial", "per_gpu"),
    [
        (gpu_machine(gib=80), 10, 6),  # 10 * 1.25 + 0.6 = 13.1; 80 / 13.1 = 6.1
        (gpu_machine(gib=80), 0.001, 16),  # no more than cores
        (gpu_machine(cpus=4, gpus=2, gib=80), 0.001, 2),
        (gpu_machine(gib=80), 60, 1),
        (gpu_machine(gib=80), 200, 1),
    ],
)
def test_as_many_trials_share_a_gpu_as_its_memory_and_the_cores_hold(machine: Machine, gib_a_trial: float, per_gpu: int) -> None:
    whole = choose_slots(machine, n_trials=100, shares_gpus=True)
    slots = fit_slots(whole, machine, int(gib_a_trial * GIB))
    assert slots.count == per_gpu * machine.gpus
    assert slots.cpus_per_trial == machine.cpus // slots.count
    # Ray gives out ten-thousandths: as many trials as planned fit on a GPU, and not one more.
    steps = round(slots.gpus_per_trial * 10_000)
    assert 10_000 // steps == per_gpu
    assert (slots.warning is not None) == (gib_a_trial > 79)


def test_as_many_at_once_as_asked_for_and_as_there_are_trials() -> None:
    machine = gpu_machine()
    few = choose_slots(machine, n_trials=3, shares_gpus=True)
    assert fit_slots(few, machine, GIB).count == 3
    asked = choose_slots(machine, n_trials=100, max_concurrent=5, shares_gpus=True)
    assert fit_slots(asked, machine, GIB).count == 5
    assert fit_slots(asked, machine, 50 * GIB).count == 1


@pytest.mark.parametrize(
    ("gpus", "n_trials", "asked", "count", "share", "cpus"),
    [
        (4, 4, {}, 4, 1.0, 16),  # a GPU for each
        (4, 3, {}, 3, 1.0, 16),
        (4, 6, {}, 6, 0.5, 8),
        (4, 100, {"max_concurrent": 4}, 4, 1.0, 16),
        (1, 3, {}, 3, 0.3333, 21),
        (4, 100, {}, 24, 0.1666, 2),  # as many as the memory holds
    ],
)
def test_trials_that_are_few_get_as_much_of_the_gpus_and_cores_as_there_is(
    gpus: int, n_trials: int, asked: dict, count: int, share: float, cpus: int
) -> None:
    machine = gpu_machine(cpus=64, gpus=gpus, gib=80)
    slots = fit_slots(choose_slots(machine, n_trials=n_trials, shares_gpus=True, **asked), machine, 10 * GIB)
    assert (slots.count, slots.gpus_per_trial, slots.cpus_per_trial) == (count, share, cpus)


def test_what_decided_on_the_slots_is_told_and_their_warning_too() -> None:
    def told(machine: Machine, memory: int | None) -> str:
        return fit_text(fit_slots(choose_slots(machine, n_trials=9, shares_gpus=True), machine, memory), machine, memory)

    assert told(gpu_machine(), GIB) == "9 at once, 1 core and 0.1111 GPU each, by the memory that a trial should need"
    for here, memory, of in ((gpu_machine(), None, "a trial"), (machine(4, gpus=2), GIB, "the GPU")):
        text = told(here, memory)
        assert "by the memory" not in text
        assert f"warning: --gpus-per-worker auto: the memory of {of} is not known" in text
    assert "by the memory that a trial should need\nwarning: a trial may need 250.6 GiB" in told(gpu_machine(), 200 * GIB)
    assert told(machine(4), GIB) == "4 at once, 1 core each"


def test_without_a_gpu_or_its_memory_slots_stay_as_they_are() -> None:
    on_cores = choose_slots(machine(4), n_trials=9)
    assert fit_slots(on_cores, machine(4), GIB) == on_cores
    unknown = machine(4, gpus=2)
    fitted = fit_slots(choose_slots(unknown, n_trials=9), unknown, GIB)
    assert (fitted.count, fitted.gpus_per_trial) == (2, 1.0)
    assert fitted.warning is not None and "the memory of the GPU is not known" in fitted.warning


def test_a_split_pair_never_gets_a_share_of_a_gpu() -> None:
    here = gpu_machine(gpus=2)
    with pytest.raises(ConfigError, match="each of the 2 workers of a trial has a whole GPU; leave it out, or use --set"):
        fit_slots(choose_slots(here, n_trials=4, pairing=SPLIT), here, GIB)


def test_processes_that_share_a_gpu_are_capped_below_their_share_and_others_are_not() -> None:
    here = gpu_machine(gib=10)
    slots = choose_slots(here, n_trials=9, gpus=0.25)
    cap = memory_cap(slots, here)
    assert cap is not None and cap * 10 * GIB + CONTEXT_BYTES == pytest.approx(0.25 * 10 * GIB)
    assert memory_cap(choose_slots(here, n_trials=9), here) is None
    assert memory_cap(choose_slots(here, n_trials=9, gpus=0), here) is None
    assert memory_cap(choose_slots(gpu_machine(gpus=2), n_trials=9, pairing=SPLIT), here) is None


@pytest.mark.parametrize(
    ("nodes", "gpus", "count", "cpus"),
    [
        (((96, 8), (96, 8)), 1.0, 16, 12),  # two boxes of eight
        (((8, 0), (96, 8)), 1.0, 8, 12),  # a head without a GPU
        (((16, 3), (16, 3)), 2.0, 2, 16),  # the two GPUs of a trial are on one node: a third of each box is of no use
        (((8, 1), (4, 1)), 0.5, 4, 2),  # the node with fewer cores beside its GPU decides
    ],
)
def test_a_sequential_trial_fits_on_one_node_of_a_cluster(
    nodes: tuple[tuple[int, int], ...], gpus: float, count: int, cpus: int
) -> None:
    slots = choose_slots(cluster_of(nodes), n_trials=100, gpus=gpus)
    assert (slots.count, slots.cpus_per_trial) == (count, cpus)


def test_a_split_trial_may_span_nodes() -> None:
    slots = choose_slots(cluster_of(((12, 1), (12, 1))), n_trials=100, pairing=Pairing(n_workers=2))
    assert (slots.count, slots.cpus_per_worker, slots.gpus_per_worker, slots.backend) == (1, 12, 1, "nccl")


def test_a_trial_whose_gpus_no_node_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="the cluster shows 2 GPUs on 2 nodes"):
        choose_slots(cluster_of(((12, 1), (12, 1))), n_trials=4, gpus=2)


def cluster_of(nodes: tuple[tuple[int, int], ...]) -> Machine:
    cpus, gpus = (sum(each[i] for each in nodes) for i in (0, 1))
    return Machine(cpus=cpus, cpu_name="nodes", memory_bytes=2**40, gpus=gpus, nodes=nodes)
