"""A fault of each family in one short sweep; every fault by itself, at length: test_soak_faults.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.disturbed import Disturbed
from tests.launch.launched import trial_processes
from tests.launch.test_soak_faults import STOP_S, fill, small_disk

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

THREE = (
    "--set", "method=ft", "--set", "lr=0.01,0.02,0.03", "--set", "epochs=2", "--set", "original.num_train_epochs=1",
    "--set", "save_strategy=steps", "--set", "save_steps=2", "--max-concurrent", "1", "--no-with-reference",
)  # fmt: skip


def test_storage_that_fills_a_killed_actor_a_signal_and_a_cut_file_change_no_number(repo_root: Path, tmp_path: Path) -> None:
    quiet = Disturbed(repo_root, tmp_path, "quiet", tmp_path / "quiet.out")
    quiet.start(*THREE)
    quiet.end(200)
    with small_disk(tmp_path / "disk") as disk:
        sweep = Disturbed(repo_root, disk, "disturbed", tmp_path / "out")
        try:
            sweep.start(*THREE)
            sweep.wait_for_middle(n_ended=0)
            fill(disk / "balloon")
            sweep.wait_for_words("is full", 30)
            time.sleep(2)
            (disk / "balloon").unlink()

            sweep.wait_for_middle(n_ended=1)
            os.kill(trial_processes(sweep.process.pid)[0], signal.SIGKILL)

            sweep.wait_for_middle(n_ended=2)
            assert sweep.terminate() < STOP_S
            sweep.note_ended()
            [checkpoint] = sweep.checkpoints()
            os.truncate(checkpoint, checkpoint.stat().st_size // 2)
            sweep.resume()
            sweep.end(200)
        finally:
            sweep.close()
        assert sweep.table() == quiet.table()
        assert sweep.ran_again() == []
        assert list(checkpoint.parent.glob("checkpoint.pt.corrupt-*"))
        assert f"trial {checkpoint.parent.name} begins anew" in sweep.said
