"""On a disk that is really full, everything that a trial leaves waits for space and is whole then; nothing is left half."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hamu.storage import files
from hamu.storage.files import patiently, read_json, replacing, write_json
from hamu.storage.lease import Lease
from hamu.training.checkpoints import load_checkpoint, save_checkpoint
from hamu.training.records import Recorder, read_records

BIG = 200_000  # float32 numbers: 0.8 MB of the disk's 2 MiB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk cannot be made here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def checkpoint(disk: Path) -> None:
    save_checkpoint(disk / "new" / "checkpoint.pt", {"weights": torch.arange(float(BIG))})
    assert load_checkpoint(disk / "new" / "checkpoint.pt")["weights"][-1] == BIG - 1


def record(disk: Path) -> None:
    recorder = Recorder(disk / "kept", {"trial_id": "t"})
    for step in range(500):
        recorder.log({"kind": "step", "step": step, "kappa": step**0.5})
    recorder.flush()
    recorder.finish()
    assert read_records(disk / "kept").num_rows == 500


def row(disk: Path) -> None:
    write_json(disk / "kept" / "row.json", {"error": "x" * 5000})
    assert len(read_json(disk / "kept" / "row.json")["error"]) == 5000


def lease(disk: Path) -> None:
    with Lease(disk / "new") as held:
        held.check()


def weights(disk: Path) -> None:
    def write() -> None:
        with replacing(disk / "kept" / "model.safetensors") as temporary:
            save_file({"weights": torch.ones(BIG)}, temporary)

    patiently(write, folder=disk)
    assert load_file(disk / "kept" / "model.safetensors")["weights"].sum() == BIG


@pytest.mark.parametrize("write", [checkpoint, record, row, lease, weights])
def test_a_write_waits_until_there_is_space(disk: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_S", 0.02)
    (disk / "kept").mkdir()
    fill = disk / "others"
    with fill.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass
    said: list[str] = []
    files.on_wait(said.append)
    done = threading.Event()

    def free_later() -> None:
        while len(said) < 3 and not done.is_set():
            done.wait(0.01)
        os.truncate(fill, 0)

    freeing = threading.Thread(target=free_later)
    freeing.start()
    try:
        write(disk)
    finally:
        done.set()
        freeing.join()
        files.on_wait(None)
    assert len(said) >= 3
    assert "is full (0 of 0.00195 GiB free); waiting for space" in said[0]
    assert [path.name for path in disk.rglob(".*.tmp")] == []
