"""An artifact root in a store: what one machine writes another reads, a folder has one owner, a store that cannot say is refused.

The store and its two mirrors are of conftest.py.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hamu.errors import ConfigError, CorruptError
from hamu.storage import mount
from hamu.storage.files import read_json, replacing, set_aside, write_json
from hamu.storage.generations import StoreGenerations
from hamu.storage.lease import Lease, LeaseError, holder_of, probe_exclusive
from hamu.training.checkpoints import load_checkpoint, save_checkpoint
from hamu.training.records import Recorder, read_records, read_trials
from launch.plan import Plan, make_plan
from launch.repair import repair
from launch.results import SweepFolder, check_free, find_sweep, trial_lock
from launch.results import write_json as write_row
from launch.shared import failed_row
from tune_spaces.space import load_space


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def in_store(root: Path) -> list[str]:
    found = mount.store_of(root)
    assert found is not None
    store, folder = found
    store.invalidate_cache()
    return sorted(path[len(folder) + 1 :] for path in store.find(folder))


def test_a_mirrored_path_says_where_it_belongs(url: str, here: Path, tmp_path: Path) -> None:
    assert here == tmp_path / "here" / "hamu-store" / "s3" / url.split("/")[2] / "hamu"
    assert mount.url_of(here / "results" / "a") == f"{url}/results/a"
    assert mount.shown(here) == url
    assert mount.url_of(tmp_path) is None
    assert mount.shown(tmp_path) == str(tmp_path)
    assert mount.mount(f"{url}/", tmp_path / "here") == here


def test_a_dry_run_names_a_place_and_contacts_nothing(tmp_path: Path) -> None:
    root = mount.mount("s3://nobody-asks/hamu", tmp_path, asks_store=False)
    assert mount.shown(root / "results") == "s3://nobody-asks/hamu/results"
    mount.fetch(root)
    with pytest.raises(
        ConfigError, match="--resume mine --dry-run: a dry run does not look into a store.*s3://nobody-asks/hamu/r"
    ):
        find_sweep(root, "mine")
    check_free(SweepFolder(root / "results" / "digits" / "mine"), space="digits/quickstart", root=root)
    assert SweepFolder(root / "results" / "digits" / "mine").rows() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_is_read_on_another_machine_and_a_newer_one_too(here: Path, there: Path) -> None:
    (here / "a").mkdir()
    write_json(here / "a" / "b.json", {"n": 1})
    mount.fetch(there / "a" / "b.json")
    assert read_json(there / "a" / "b.json") == {"n": 1}
    for n in (2, 3):  # in one second, with the same size
        write_json(here / "a" / "b.json", {"n": n})
        mount.fetch(there / "a")
        assert read_json(there / "a" / "b.json") == {"n": n}
    write_json(there / "a" / "b.json", {"n": 4})
    mount.fetch(here)
    assert read_json(here / "a" / "b.json") == {"n": 4}
    assert names(here) == in_store(here) == ["a/b.json"]


def test_an_unchanged_file_is_not_fetched_again(here: Path, there: Path) -> None:
    write_json(here / "a.json", {"n": 1})
    mount.fetch(there)
    stamp = os.stat(there / "a.json")
    mount.fetch(there)
    mount.fetch(there / "a.json")
    assert os.stat(there / "a.json") == stamp


def test_deletions_reach_another_machine_and_what_was_only_written_there_stays(here: Path, there: Path) -> None:
    for name in ("a", "b", "c"):
        write_json(here / f"{name}.json", {})
    mount.fetch(there)
    (there / "own.json").write_text("{}")
    mount.remove(here / "a.json")
    aside = set_aside(here / "b.json")
    mount.fetch(there)
    assert names(there) == ["b.json.corrupt-1", "c.json", "own.json"]
    assert names(here) == in_store(here) == [aside.name, "c.json"]
    mount.remove(here / "none")
    write_json(there / "b.json", {})
    (there / "b.json.corrupt-1").unlink()  # not fetched yet, as it were
    assert set_aside(there / "b.json").name == "b.json.corrupt-2"


def test_a_folder_is_published_and_replaced(here: Path, there: Path) -> None:
    model = here / "model"
    (model / "part").mkdir(parents=True)
    (model / "record.json").write_text("1")
    (model / "part" / "weights").write_text("first")
    (model / ".hidden").touch()
    mount.publish(model)
    mount.fetch(there / "model")
    assert names(there) == ["model/part/weights", "model/record.json"]
    (model / "part" / "weights").unlink()
    (model / "weights").write_text("second")
    mount.publish(model)
    mount.fetch(there / "model")
    assert names(there) == ["model/record.json", "model/weights"]
    mount.remove(there / "model")
    mount.fetch(here)
    assert names(here) == ["model/.hidden"]


def test_publishing_leaves_alone_what_another_machine_has_put_beside(here: Path, there: Path) -> None:
    write_json(here / "a.json", {})
    (there / "b.json").write_text("{}")
    mount.publish(there)
    assert in_store(here) == ["a.json", "b.json"]


def test_only_what_is_asked_for_is_fetched(here: Path, there: Path) -> None:
    for name in ("row.json", "checkpoint.pt"):
        (here / "trials" / "t").mkdir(parents=True, exist_ok=True)
        (here / "trials" / "t" / name).write_text("{}")
    mount.publish(here / "trials")
    mount.fetch(there / "trials", only=lambda name: name.endswith("/row.json"))
    assert names(there) == ["trials/t/row.json"]


def test_a_failed_upload_leaves_the_old_file_here_and_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = here / "a.json"
    write_json(path, {"n": 1})
    found = mount.store_of(path)
    assert found is not None

    def fail(*args: Any, **settings: Any) -> None:
        raise OSError("the bucket is away")

    monkeypatch.setattr(found[0], "put_file", fail)
    with pytest.raises(OSError, match="the bucket is away"), replacing(path) as temporary:
        temporary.write_text("{}")
    assert read_json(path) == {"n": 1}
    assert names(here) == ["a.json"]


def test_a_broken_checkpoint_and_record_are_found_in_a_store_too(here: Path, there: Path) -> None:
    save_checkpoint(here / "t" / "checkpoint.pt", {"weights": torch.ones(100)})
    assert load_checkpoint(there / "t" / "checkpoint.pt")["weights"].sum() == 100
    (there / "t" / "checkpoint.pt").write_bytes(b"cut")
    mount.publish(there / "t")
    with pytest.raises(CorruptError):
        load_checkpoint(here / "t" / "checkpoint.pt")
    set_aside(here / "t" / "checkpoint.pt")
    assert in_store(here) == ["t/checkpoint.pt.corrupt-1"]


def test_a_lease_holds_across_machines(here: Path, there: Path) -> None:
    for generation in (1, 2):
        with Lease(here / "sweep") as lease:
            lease.check()
            lease.beat()
            with pytest.raises(LeaseError, match=r"s3://.*/hamu/sweep is in use by process"), Lease(there / "sweep"):
                pass
            assert holder_of(there / "sweep") is not None
            assert in_store(here) == [f"sweep/.lease.{generation}"]
        assert holder_of(there / "sweep") is None


def test_a_beat_on_its_way_does_not_hide_that_a_lease_was_given_back(here: Path) -> None:
    for index in range(8):
        lease = Lease(here / str(index))
        stop = threading.Event()
        with lease:
            beating = threading.Thread(target=lambda lease=lease, stop=stop: [lease.beat() for _ in iter(stop.is_set, True)])
            beating.start()
        stop.set()
        beating.join()
        assert holder_of(here / str(index)) is None


def test_a_dead_holder_in_a_store_is_watched_and_then_taken_over(here: Path, there: Path) -> None:
    found = mount.store_of(here / "sweep")
    assert found is not None
    dead = StoreGenerations(*found, ".lease")
    assert dead.create(1, '{"host": "node7", "pid": 5, "since": "noon", "boot": "another", "pid_namespace": "x"}')
    assert not dead.create(1, "another")
    said: list[str] = []
    with Lease(there / "sweep", stale_s=0.5, say=said.append):
        assert in_store(here) == ["sweep/.lease.2"]
    assert said[0].startswith(f"{mount.shown(here)}/sweep was last held by process 5 on node7 since noon; watching")


def test_a_paused_holder_in_a_store_finds_out(here: Path, there: Path) -> None:
    with Lease(here / "sweep") as lease:
        found = mount.store_of(there / "sweep")
        assert found is not None
        assert StoreGenerations(*found, ".lease").create(2, "{}")
        with pytest.raises(LeaseError, match="no longer this process's"):
            lease.check()


def test_of_many_that_want_a_lease_in_a_store_one_gets_it(here: Path) -> None:
    won: list[int] = []
    barrier = threading.Barrier(4)

    def want(rank: int) -> None:
        barrier.wait()
        try:
            with Lease(here / "race"):
                won.append(rank)
                done.wait(20)
        except LeaseError:
            lost.release()

    done, lost = threading.Event(), threading.Semaphore(0)
    threads = [threading.Thread(target=want, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    assert all(lost.acquire(timeout=20) for _ in range(3))
    done.set()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def plan_and_folder(root: Path) -> tuple[Plan, SweepFolder]:
    plan = make_plan(load_space("digits/quickstart"), name="mine", overrides={"unlearning_method": ("ft",)}, root=root)
    return plan, SweepFolder(root / "results" / "digits" / "mine")


@pytest.mark.slow
def test_a_sweep_begun_on_one_machine_is_resumed_on_another(here: Path, there: Path) -> None:
    plan, folder = plan_and_folder(here)
    first, second = (trial.trial_id for trial in plan.trials[:2])
    with folder.lease():
        check_free(folder, space=plan.space, root=here)
        folder.start(plan)
        for index, trial in enumerate(plan.trials[:2]):
            own = folder.trial(trial.trial_id)
            with trial_lock(own) as lease:
                recorder = Recorder(folder.records, {"trial_id": trial.trial_id})
                recorder.log({"kind": "step", "step": 0})
                recorder.flush()
                recorder.log({"kind": "step", "step": 1})
                recorder.flush()
                lease.check()
                if index == 0:
                    recorder.finish()
                    row = {**failed_row(plan, trial, ""), "status": "finished", "error": None}
                    write_row(own / "row.json", row)
                else:
                    save_checkpoint(own / "checkpoint.pt", {"n_parts": 1})
        folder.refresh_trials()

    found = find_sweep(there, "mine")
    assert found.path == there / "results" / "digits" / "mine"
    with found.lease():
        with pytest.raises(LeaseError), folder.lease():
            pass
        again = found.read_plan(there)
        assert again.trials == plan.trials
        assert repair(found, again, pytest.fail) == []
        assert list(found.rows()) == [first]
        assert found.unfinished(again) == [trial.trial_id for trial in plan.trials[1:]]
        with trial_lock(found.trial(second)):
            saved = load_checkpoint(found.trial(second) / "checkpoint.pt")
            recorder = Recorder(found.records, {"trial_id": second})
            assert recorder.n_parts == 2
            recorder.truncate(saved["n_parts"])
            recorder.log({"kind": "step", "step": 1})
            recorder.finish()
            write_row(found.trial(second) / "row.json", {**failed_row(plan, plan.trials[1], ""), "status": "finished"})
        found.write_trials()
    assert list(folder.rows()) == [first, second]
    table = read_records(folder.records).to_pydict()
    assert list(zip(table["trial_id"], table["step"], strict=True)) == [(first, 0), (first, 1), (second, 0), (second, 1)]
    assert [row["trial_id"] for row in read_trials(folder.trials_parquet)] == [first, second]


def test_a_broken_row_in_a_store_makes_its_trial_run_again(here: Path, there: Path) -> None:
    plan, folder = plan_and_folder(here)
    folder.start(plan)
    trial = plan.trials[0]
    folder.trial(trial.trial_id).mkdir()
    path = folder.trial(trial.trial_id) / "row.json"
    write_row(path, {**failed_row(plan, trial, ""), "status": "finished"})
    path.write_bytes(path.read_bytes()[:-9])
    mount.publish(path)
    other = SweepFolder(there / "results" / "digits" / "mine")
    said: list[str] = []
    assert repair(other, other.read_plan(there), said.append) == [trial.trial_id]
    assert said[0].startswith(f"trial {trial.trial_id} runs again: s3://")
    assert [name for name in in_store(here) if "row.json" in name] == [
        f"results/digits/mine/trials/{trial.trial_id}/row.json.corrupt-1"
    ]


def forgetful_store() -> type:
    """A file system that takes the word "create" and overwrites, as a store without conditional writes does."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Forgetful(MemoryFileSystem):
        protocol = "forgetful"
        store: dict[str, Any] = {}  # noqa: RUF012

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **settings: Any) -> None:
            super().pipe_file(path, value, mode="overwrite")

    return Forgetful


def looking_store() -> type:
    """A file system that looks whether there is a file before it writes one: two processes may both see none."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Looking(MemoryFileSystem):
        protocol = "looking"
        store: dict[str, Any] = {}  # noqa: RUF012
        pipe_file = fsspec.AbstractFileSystem.pipe_file

    return Looking


@pytest.mark.parametrize(
    ("make", "reason"),
    [(forgetful_store, "lets two processes create one file"), (looking_store, r"\(Looking\) has no exclusive create")],
)
def test_a_store_without_exclusive_create_is_refused(tmp_path: Path, make: Any, reason: str) -> None:
    import fsspec

    kind = make()
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    with pytest.raises(ConfigError, match=rf"{reason}.*give --storage-path a local or NFS folder, or a bucket"):
        mount.mount(f"{kind.protocol}://bucket/hamu", tmp_path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [("s3://", "names no bucket"), ("nosuch://bucket/a", "knows no such store"), ("s3://not-there/a", "cannot hold a sweep")],
)
def test_a_url_that_leads_nowhere_is_refused(server: str, tmp_path: Path, url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        mount.mount(url, tmp_path)


def test_a_path_needs_no_store(tmp_path: Path) -> None:
    assert mount.mount(f"file://{tmp_path}", tmp_path / "scratch") == tmp_path
    write_json(tmp_path / "a.json", {})
    mount.fetch(tmp_path)
    mount.publish(tmp_path / "a.json")
    mount.remove(tmp_path / "a.json")
    mount.remove(tmp_path / "a.json")
    probe_exclusive(tmp_path)
    assert names(tmp_path) == []
