"""Resident workers under real Ray Train: processes that are killed, stopped and made to fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hamu.errors import ConfigError
from hamu.training.ray_workers import (
    Workers,
    WorkersError,
    WorkerSettings,
    check_workers,
    joined_ray,
)

TIMEOUT_S = 8.0  # long enough for two processes to start on a busy machine
SETTINGS = WorkerSettings(n_workers=2, timeout_s=TIMEOUT_S)


# Without Ray.


def test_importing_the_file_imports_neither_ray_nor_torch() -> None:
    code = "import sys, hamu.training.ray_workers; print({'ray', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("n_workers", "backend", "n_gpus", "n_cpus", "words"),
    [
        (2, "nccl", 1, 8, "needs 2 whole GPUs, got 1: NCCL cannot have two workers on one GPU"),
        (4, "nccl", 2, 8, "needs 4 whole GPUs, got 2"),
        (4, "gloo", 0, 2, "needs as many cores, got 2"),
    ],
)
def test_more_workers_than_there_is_room_for_are_refused(
    n_workers: int, backend: str, n_gpus: int, n_cpus: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_workers(n_workers, backend=backend, n_gpus=n_gpus, n_cpus=n_cpus)
    assert "'sequential'" in str(caught.value)


def test_workers_that_fit_are_not_refused() -> None:
    check_workers(2, backend="nccl", n_gpus=2, n_cpus=1)
    check_workers(2, backend="gloo", n_gpus=1, n_cpus=2)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:10001", "nowhere"])
def test_an_address_where_nothing_answers_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match="no Ray cluster at .*start one"), joined_ray(address):
        pass


# With real processes.


@dataclass(frozen=True)
class Given:
    """What `make` brings along, as a sweep does: references to arrays in Ray's object store."""

    arrays: dict[str, Any]


class Adder:
    """A handler whose calls need both ranks. What it has done so far is in its folder, as a trial's checkpoint is."""

    def __init__(self, given: Given, folder: Path, group: Any) -> None:
        import ray

        self.total = float(ray.get(given.arrays["numbers"]).sum())
        self.folder, self.group = folder, group

    def begin(self, job: str) -> dict[str, Any]:
        self.job = job
        with (self.folder / f"{job}.{self.group.rank}").open("a") as file:
            file.write("begun\n")
        return {"total": self.total, "pids": self._everybodys(os.getpid())}

    def nothing(self) -> dict[str, Any]:
        return {}

    def ranks(self) -> dict[str, Any]:
        return {"job": self.job, "ranks": self._everybodys(self.group.rank)}

    def fail_once(self, kind: str, rank: int) -> dict[str, Any]:
        """The error of that kind on one rank, while the other waits for it."""
        import torch

        mark = self.folder / f"{kind}.failed"
        if self.group.rank == rank and not mark.exists():
            mark.touch()
            raise getattr(torch, kind)("injected")
        return self.ranks()

    def fail(self) -> dict[str, Any]:
        raise ValueError("no use")

    def _everybodys(self, number: int) -> list[int]:
        import torch

        return [int(each) for each in self.group.gather_numbers(torch.tensor([number], dtype=torch.float64))]


class Holder:
    """An actor that holds workers, as a Tune trial does."""

    def __init__(self, folder: Path, given: Given) -> None:
        self.workers = Workers(partial(Adder, given, folder), SETTINGS, folder=folder / "train", name="held")

    def begin(self) -> dict[str, Any]:
        return {**self.workers.begin(job="held"), "holder": os.getpid()}


@dataclass(frozen=True)
class Slot:
    """Workers, and where they write."""

    workers: Workers
    folder: Path

    def pids(self, job: str) -> list[int]:
        return self.workers.begin(job=job)["pids"]

    def n_begun(self, job: str) -> list[int]:
        return [len((self.folder / f"{job}.{rank}").read_text().splitlines()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def given(ray_cluster: Any) -> Given:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not find the tests' modules
    return Given({"numbers": ray_cluster.put(np.arange(10.0))})


@pytest.fixture(scope="class")
def slot(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slot]:
    folder = tmp_path_factory.mktemp("workers")
    note_others()
    workers = Workers(partial(Adder, given, folder), SETTINGS, folder=folder / "train", name="slot")
    yield Slot(workers, folder)
    workers.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], limit_s: float = 15) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def held_groups(ray: Any) -> list[str]:
    return [key for key, row in ray.util.placement_group_table().items() if row["state"] != "REMOVED"]


def pid_of(actor_class: str) -> int:
    from ray._private.state import state

    living = [actor for actor in state.actor_table(None).values() if actor["State"] == "ALIVE"]
    return next(actor["Pid"] for actor in living if actor["ActorClassName"] == actor_class)


_OTHERS: set[str] = set()
"""Actors of other tests on this Ray: of a dead one the number of its process may be another's by now."""


def note_others() -> None:
    from ray._private.state import state

    _OTHERS.update(state.actor_table(None))


def is_nothing_left(ray: Any) -> bool:
    """Whether no actor or process of these tests, and no placement group, is left."""
    from ray._private.state import state

    actors = [actor for actor_id, actor in state.actor_table(None).items() if actor_id not in _OTHERS]
    has_actors = any(actor["State"] != "DEAD" or (actor["Pid"] and is_alive(actor["Pid"])) for actor in actors)
    return not has_actors and not held_groups(ray) and ray.available_resources().get("CPU") == 2.0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(180)
class TestRealWorkers:
    """In this order: each takes over the processes that the one before has left."""

    def test_what_a_killed_owner_held_is_free_for_the_next_one(self, ray_cluster: Any, given: Given, tmp_path: Path) -> None:
        holder = ray_cluster.remote(num_cpus=0)(Holder).remote(tmp_path, given)
        held = ray_cluster.get(holder.begin.remote())
        assert len(held_groups(ray_cluster)) == 1
        os.kill(pid_of("TrainController"), signal.SIGKILL)  # before it can clean up, as it may when its owner has died
        os.kill(held["holder"], signal.SIGKILL)
        assert wait_until(lambda: not any(map(is_alive, held["pids"])))
        assert len(held_groups(ray_cluster)) == 1  # Ray itself keeps it for ever: the next test's workers need both its cores

    def test_a_named_cluster_is_joined_and_left_running(self, ray_cluster: Any) -> None:
        address = ray_cluster.get_runtime_context().gcs_address
        code = (
            "import sys, ray; from hamu.training.ray_workers import joined_ray\n"
            "with joined_ray(sys.argv[1]): print(ray.cluster_resources()['CPU'])"
        )
        done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.split()) == (0, ["2.0"]), done.stderr
        assert ray_cluster.cluster_resources()["CPU"] == 2.0

    def test_workers_begin_with_what_make_brings_along(self, slot: Slot) -> None:
        reply = slot.workers.begin(job="first")
        assert reply["total"] == 45
        assert len(set(reply["pids"])) == 2
        assert slot.workers.ask("ranks") == {"job": "first", "ranks": [0, 1]}

    def test_a_call_takes_milliseconds_and_the_next_job_the_same_processes(self, slot: Slot) -> None:
        before = slot.pids("warm")
        times = []
        for _ in range(30):
            started = time.perf_counter()
            slot.workers.ask("nothing")
            times.append(time.perf_counter() - started)
        assert sorted(times)[len(times) // 2] < 0.05  # 5 ms on two cores that are otherwise idle
        assert slot.pids("next") == before

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_killed_process_is_replaced_and_the_caller_sees_the_reply_only(self, slot: Slot, rank: int) -> None:
        pids = slot.pids(f"kill {rank}")
        os.kill(pids[rank], signal.SIGKILL)
        assert slot.workers.ask("ranks") == {"job": f"kill {rank}", "ranks": [0, 1]}
        assert slot.n_begun(f"kill {rank}") == [2, 2]
        assert wait_until(lambda: not any(map(is_alive, pids)))

    def test_an_error_on_one_rank_ends_all_processes_and_the_job_goes_on_in_new_ones(self, slot: Slot) -> None:
        pids = slot.pids("memory")
        assert slot.workers.ask("fail_once", kind="OutOfMemoryError", rank=1) == {"job": "memory", "ranks": [0, 1]}
        assert slot.n_begun("memory") == [2, 2]
        assert wait_until(lambda: not any(map(is_alive, pids)))

    def test_a_process_that_hangs_is_found_and_ended(self, slot: Slot) -> None:
        pids = slot.pids("hang")
        os.kill(pids[1], signal.SIGSTOP)
        assert slot.workers.ask("ranks") == {"job": "hang", "ranks": [0, 1]}
        assert wait_until(lambda: not any(map(is_alive, pids)))

    def test_closed_workers_leave_nothing(self, slot: Slot, ray_cluster: Any) -> None:
        started = time.monotonic()
        slot.workers.close()
        assert time.monotonic() - started < 5
        assert wait_until(lambda: is_nothing_left(ray_cluster))
        with pytest.raises(WorkersError, match="closed"):
            slot.workers.ask("ranks")
        slot.workers.close()


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(300)
class TestRealWorkersAtLength:
    """What takes longer to show."""

    @pytest.fixture
    def slot(self, given: Given, tmp_path: Path) -> Iterator[Slot]:
        note_others()
        workers = Workers(partial(Adder, given, tmp_path), SETTINGS, folder=tmp_path / "train", name="long")
        yield Slot(workers, tmp_path)
        workers.close()

    def test_a_device_error_on_rank_0_ends_all_processes_too(self, slot: Slot) -> None:
        pids = slot.pids("device")
        assert slot.workers.ask("fail_once", kind="AcceleratorError", rank=0) == {"job": "device", "ranks": [0, 1]}
        assert wait_until(lambda: not any(map(is_alive, pids)))

    def test_a_call_that_always_fails_is_given_up_with_its_error(self, slot: Slot, ray_cluster: Any) -> None:
        slot.pids("fails")
        with pytest.raises(WorkersError, match="died 3 times over 'fail'; last: rank .: ValueError: no use"):
            slot.workers.ask("fail")
        with pytest.raises(WorkersError, match="no use"):
            slot.workers.begin(job="next")
        slot.workers.close()
        assert wait_until(lambda: is_nothing_left(ray_cluster))

    def test_processes_that_hang_while_idle_are_replaced(self, slot: Slot) -> None:
        pids = slot.pids("idle")
        os.kill(pids[0], signal.SIGSTOP)
        assert wait_until(lambda: not any(map(is_alive, pids)), 60)
        assert slot.workers.ask("ranks") == {"job": "idle", "ranks": [0, 1]}

    def test_idling_for_longer_than_the_timeout_is_no_hang(self, slot: Slot) -> None:
        pids = slot.pids("waits")
        time.sleep(2 * TIMEOUT_S)
        assert slot.pids("goes on") == pids
        assert slot.workers.ask("ranks")["ranks"] == [0, 1]

    def test_workers_whose_controller_was_killed_say_so_and_leave_nothing(self, slot: Slot, ray_cluster: Any) -> None:
        slot.pids("without")
        os.kill(pid_of("TrainController"), signal.SIGKILL)
        time.sleep(2)  # they answer for as long as they live
        with pytest.raises(WorkersError, match="have ended: ActorDiedError"):
            slot.workers.ask("ranks")
        slot.workers.close()
        assert wait_until(lambda: is_nothing_left(ray_cluster))

    def test_workers_that_all_hang_are_closed_by_force(self, slot: Slot, ray_cluster: Any) -> None:
        for pid in slot.pids("stuck"):
            os.kill(pid, signal.SIGSTOP)
        slot.workers.close()
        assert wait_until(lambda: is_nothing_left(ray_cluster))
