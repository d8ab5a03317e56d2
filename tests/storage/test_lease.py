"""A lease has one holder; a dead one loses it, a live one never, and a paused one finds out."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hamu.errors import ConfigError
from hamu.storage.beats import stop_beating
from hamu.storage.lease import Lease, LeaseError, holder_of, probe_exclusive

HOLD = """
import sys, time
from pathlib import Path
from hamu.storage.lease import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
RACE = """
import sys, time
from pathlib import Path
from hamu.storage.lease import Lease, LeaseError
base, n_races, rank = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for race in range(n_races):
    folder = base / str(race)
    (folder / f"ready-{rank}").touch()
    while not (folder / "ready-0").exists() or not (folder / "ready-1").exists():
        pass
    try:
        with Lease(folder):
            (folder / f"won-{rank}").touch()
            deadline = time.monotonic() + 20
            while not (folder / f"lost-{1 - int(rank)}").exists() and time.monotonic() < deadline:
                time.sleep(0.0005)
    except LeaseError:
        (folder / f"lost-{rank}").touch()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def lease_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".lease*"))


def write_owner(folder: Path, generation: int = 1, **changes: object) -> Path:
    """The file of a holder on another machine, or what `changes` make of it."""
    owner = {"host": "node7", "boot": "another", "pid_namespace": "pid:[1]", "pid": 77, "started": "5", "since": "noon"}
    path = folder / f".lease.{generation}"
    path.write_text(json.dumps(owner | changes))
    return path


def owner_text(folder: Path) -> dict[str, object]:
    with Lease(folder / "own"):
        return json.loads((folder / "own" / ".lease.1").read_text())


def test_a_lease_is_given_back_and_taken_again(tmp_path: Path) -> None:
    for generation in (1, 2, 3):
        with Lease(tmp_path / "a") as lease:
            lease.check()
            assert lease_files(tmp_path / "a") == [f".lease.{generation}"]
        assert holder_of(tmp_path / "a") is None
        with pytest.raises(LeaseError, match="no longer this process's"):
            lease.check()


def test_a_live_holder_is_named(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    rule = rf"is in use by process {holder.pid} on .* since .*; wait for it, stop it, or choose another --name"
    with pytest.raises(LeaseError, match=rule), Lease(tmp_path):
        pass
    began = time.monotonic()
    with pytest.raises(ConfigError, match=str(holder.pid)), Lease(tmp_path, patience_s=0.3):
        pass
    assert 0.3 <= time.monotonic() - began < 5
    assert str(holder.pid) in str(holder_of(tmp_path))


def test_a_killed_holder_loses_it_at_once_reaped_or_not(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
    began = time.monotonic()
    with Lease(tmp_path):
        assert time.monotonic() - began < 1
        assert lease_files(tmp_path) == [".lease.2"]


def test_a_patient_process_takes_it_when_the_holder_dies(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    threading.Timer(0.3, holder.kill).start()
    began = time.monotonic()
    with Lease(tmp_path, patience_s=30):
        assert time.monotonic() - began < 5


def test_another_process_with_the_holders_id_is_not_the_holder(tmp_path: Path) -> None:
    own = owner_text(tmp_path)
    write_owner(tmp_path, **own)
    with pytest.raises(LeaseError), Lease(tmp_path):
        pass
    write_owner(tmp_path, **own | {"started": "1"})  # as this process's id, in an earlier life
    with Lease(tmp_path):
        pass


def test_a_beating_holder_of_another_machine_is_alive_and_a_silent_one_dead(tmp_path: Path) -> None:
    path, said, stop = write_owner(tmp_path), [], threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(LeaseError, match="in use by process 77 on node7 since noon"), Lease(tmp_path, stale_s=1.0):
            pass
        assert holder_of(tmp_path, stale_s=1.0) == "process 77 on node7 since noon"
    finally:
        stop.set()
        beating.join()
    began = time.monotonic()
    with Lease(tmp_path, stale_s=0.5, say=said.append):
        assert 0.5 <= time.monotonic() - began < 5
    assert said == [f"{tmp_path} was last held by process 77 on node7 since noon; watching for up to 0.5 s whether it still is"]


def test_a_holder_that_has_not_said_who_it_is_is_given_time(tmp_path: Path) -> None:
    (tmp_path / ".lease.4").touch()
    began = time.monotonic()
    with Lease(tmp_path, stale_s=0.3):
        assert time.monotonic() - began >= 0.3
        assert lease_files(tmp_path) == [".lease.5"]


def test_this_process_beats_for_all_its_leases_with_one_thread(tmp_path: Path) -> None:
    n_threads = threading.active_count()
    leases = [Lease(tmp_path / str(index), beat_s=0.05) for index in range(5)]
    try:
        for lease in leases:
            lease.__enter__()
        assert threading.active_count() <= n_threads + 1
        before = [os.stat(tmp_path / str(index) / ".lease.1").st_mtime_ns for index in range(5)]
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            now = [os.stat(tmp_path / str(index) / ".lease.1").st_mtime_ns for index in range(5)]
            if all(new > old for new, old in zip(now, before, strict=True)):
                break
            time.sleep(0.02)
        else:
            pytest.fail("a lease has had no beat")
    finally:
        for lease in leases:
            lease.release()


def test_a_holder_that_was_paused_finds_out_and_touches_nothing(tmp_path: Path) -> None:
    """Paused for longer than another machine waits: that one has the lease when this one wakes."""
    with Lease(tmp_path) as paused:
        stop_beating(paused)
        first = tmp_path / ".lease.1"
        first.write_text(first.read_text().replace('"boot": "', '"boot": "x'))  # as another machine sees it
        paused._text = first.read_text()
        with Lease(tmp_path, stale_s=0.2) as taken:
            with pytest.raises(LeaseError, match="no longer this process's"):
                paused.check()
            paused.beat()
            paused.release()
            taken.check()
            assert lease_files(tmp_path) == [".lease.2"]


def test_a_holder_whose_folder_is_gone_finds_out(tmp_path: Path) -> None:
    with Lease(tmp_path / "a") as lease:
        (tmp_path / "a" / ".lease.1").unlink()
        with pytest.raises(LeaseError):
            lease.check()


def test_a_late_process_that_makes_an_old_generation_again_does_not_hold_it(tmp_path: Path) -> None:
    with Lease(tmp_path) as first:
        pass
    with Lease(tmp_path), Lease(tmp_path / "b") as late:
        late._files = first._files
        assert not late._take(1)  # generation 1 was cleared away by the second holder
        assert lease_files(tmp_path) == [".lease.2"]


def test_a_lease_that_is_dropped_without_a_word_is_free(tmp_path: Path) -> None:
    lease = Lease(tmp_path)
    lease.__enter__()
    del lease
    gc.collect()
    with Lease(tmp_path):
        pass


def test_a_fork_does_not_give_back_what_its_parent_holds(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        child = os.fork()
        if child == 0:
            lease.release()
            os._exit(0)
        os.waitpid(child, 0)
        lease.check()


def test_leases_of_other_names_in_the_same_folder_are_others(tmp_path: Path) -> None:
    with Lease(tmp_path), Lease(tmp_path, ".lease-part-1-of-2"), Lease(tmp_path, ".lease-part-11-of-2"):
        assert len(lease_files(tmp_path)) == 3


@pytest.mark.parametrize("n_races", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_of_two_processes_that_want_a_dead_ones_lease_one_gets_it(tmp_path: Path, n_races: int) -> None:
    dead = subprocess.run([sys.executable, "-c", HOLD.replace("time.sleep(60)", "import os; os._exit(9)"), str(tmp_path / "d")])
    assert dead.returncode == 9
    stale = (tmp_path / "d" / ".lease.1").read_text()
    for race in range(n_races):
        (tmp_path / str(race)).mkdir()
        (tmp_path / str(race) / ".lease.1").write_text(stale)
    racers = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), str(n_races), rank]) for rank in ("0", "1")]
    assert [racer.wait(timeout=200) for racer in racers] == [0, 0]
    winners = [sorted(path.name for path in (tmp_path / str(race)).glob("won-*")) for race in range(n_races)]
    assert all(len(each) == 1 for each in winners), winners
    assert all(len(list((tmp_path / str(race)).glob("lost-*"))) == 1 for race in range(n_races))


def test_of_many_threads_one_holds_it_at_a_time(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work(_: int) -> None:
        with Lease(tmp_path, patience_s=60):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert most == [1]


def test_a_stopped_holder_of_this_machine_is_alive(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(LeaseError), Lease(tmp_path, stale_s=0.2, patience_s=0.5):
        pass


def test_a_folder_can_be_owned_and_one_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    probe_exclusive(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot hold a sweep .*give --storage-path"):
        probe_exclusive(tmp_path / "file" / "below")


def test_a_lease_costs_less_than_two_milliseconds(tmp_path: Path) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        with Lease(tmp_path) as lease:
            lease.check()
        return time.perf_counter() - began

    assert min(seconds() for _ in range(30)) < 0.002  # about 0.3 ms; the best of thirty bears a busy machine
