"""Records: cheap to log, complete when seen, every row exactly once whatever is killed when."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from hamu.errors import ConfigError, CorruptError, DataError
from hamu.training.records import (
    RECORD_SCHEMA,
    TRIAL_SCHEMA,
    Recorder,
    read_records,
    read_trials,
    replacing,
    write_trials,
)

TRIAL = "0001-hamu-q-12345678"


def make_recorder(folder, trial_id=TRIAL, **identity):
    return Recorder(folder, {"trial_id": trial_id, "method": "hamu-q", "seed": 42, **identity})


def log_steps(recorder, first, last):
    for step in range(first, last):
        recorder.log({"kind": "step", "step": step, "kappa": 0.5 * step})
    recorder.flush()


def steps_of(folder, trial_id=TRIAL):
    table = read_records(folder).to_pydict()
    return [step for step, trial in zip(table["step"], table["trial_id"], strict=True) if trial == trial_id]


def test_rows_carry_the_trials_identity_and_null_where_nothing_was_measured(tmp_path):
    recorder = make_recorder(tmp_path, rho=0.25)
    recorder.log({"kind": "evaluation", "step": np.int64(3), "retain_loss": np.float32(0.5), "test_loss": math.inf})
    recorder.flush()
    (row,) = read_records(tmp_path).to_pylist()
    assert (row["trial_id"], row["rho"], row["step"], row["retain_loss"]) == (TRIAL, 0.25, 3, 0.5)
    assert row["test_loss"] == math.inf
    assert row["kappa"] is None


def test_row_passed_to_log_may_be_reused_by_the_caller(tmp_path):
    recorder, row = make_recorder(tmp_path), {"step": 0}
    for step in range(3):
        row["step"] = step
        recorder.log(row)
    recorder.finish()
    assert steps_of(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("row", [{"kapa": 1.0}, {"step": 1, "retain_los": 0.1}])
def test_unknown_column_is_refused_with_the_nearest_match(tmp_path, row):
    with pytest.raises(ConfigError, match="did you mean '(kappa|retain_loss)'"):
        make_recorder(tmp_path).log(row)
    with pytest.raises(ConfigError, match="unknown record column"):
        write_trials(tmp_path / "trials.parquet", [row])


@pytest.mark.parametrize("trial_id", ["", ".hidden", "a/b", "run-00001", None])
def test_trial_id_that_cannot_name_files_is_refused(tmp_path, trial_id):
    with pytest.raises(ConfigError, match="cannot name record files"):
        make_recorder(tmp_path, trial_id=trial_id)


def test_flush_without_rows_makes_no_part(tmp_path):
    recorder = make_recorder(tmp_path)
    recorder.flush()
    assert (recorder.n_parts, os.listdir(tmp_path)) == (0, [])
    assert read_records(tmp_path).schema == RECORD_SCHEMA


def test_finish_replaces_the_parts_by_one_file_with_the_same_rows(tmp_path):
    recorder = make_recorder(tmp_path)
    for first in range(0, 30, 10):
        log_steps(recorder, first, first + 10)
    assert (recorder.n_parts, len(os.listdir(tmp_path))) == (3, 3)
    before = read_records(tmp_path)
    recorder.finish()
    recorder.finish()
    assert os.listdir(tmp_path) == [f"{TRIAL}.parquet"]
    assert read_records(tmp_path).equals(before)


def test_parts_left_by_a_kill_during_compaction_are_not_counted_twice(tmp_path):
    recorder = make_recorder(tmp_path)
    log_steps(recorder, 0, 10)
    log_steps(recorder, 10, 20)
    parts = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    recorder.finish()
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    assert steps_of(tmp_path) == list(range(20))
    make_recorder(tmp_path).finish()
    assert os.listdir(tmp_path) == [f"{TRIAL}.parquet"]


@pytest.mark.parametrize("was_finished", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_resume_drops_what_the_checkpoint_did_not_know(tmp_path, kept, was_finished):
    recorder = make_recorder(tmp_path)
    for first in range(0, 30, 10):
        log_steps(recorder, first, first + 10)
    if was_finished:
        recorder.finish()
    resumed = make_recorder(tmp_path)
    assert resumed.n_parts == 3
    resumed.log({"step": -1})
    resumed.truncate(kept)
    assert steps_of(tmp_path) == list(range(10 * kept))
    log_steps(resumed, 10 * kept, 40)
    assert steps_of(tmp_path) == list(range(40))
    resumed.finish()
    assert steps_of(tmp_path) == list(range(40))


def test_logging_after_finish_goes_on_after_the_compacted_rows(tmp_path):
    recorder = make_recorder(tmp_path)
    log_steps(recorder, 0, 5)
    recorder.finish()
    log_steps(make_recorder(tmp_path), 5, 8)
    assert steps_of(tmp_path) == list(range(8))


def test_truncate_touches_no_other_trial(tmp_path):
    # the second name begins like the first, and both have the same kinds of file
    for trial_id in (TRIAL, f"{TRIAL}-b"):
        log_steps(make_recorder(tmp_path, trial_id), 0, 5)
        (tmp_path / f".{trial_id}-00001.parquet.77.tmp").write_bytes(b"half")
    make_recorder(tmp_path).truncate(0)
    assert (steps_of(tmp_path), steps_of(tmp_path, f"{TRIAL}-b")) == ([], list(range(5)))
    assert sorted(os.listdir(tmp_path)) == [f".{TRIAL}-b-00001.parquet.77.tmp", f"{TRIAL}-b-00000.parquet"]


def test_checkpoint_that_knows_more_parts_than_there_are_is_refused(tmp_path):
    with pytest.raises(DataError, match="knows 4 record parts"):
        make_recorder(tmp_path).truncate(4)


def break_file(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("was_finished", [False, True])
def test_a_broken_record_that_the_checkpoint_knows_is_named_and_the_trial_starts_anew(tmp_path, was_finished):
    for trial_id in (TRIAL, "other"):
        recorder = make_recorder(tmp_path, trial_id)
        for first in (0, 10, 20):
            log_steps(recorder, first, first + 10)
        if was_finished:
            recorder.finish()
    broken = tmp_path / (f"{TRIAL}.parquet" if was_finished else f"{TRIAL}-00001.parquet")
    break_file(broken)
    resumed = make_recorder(tmp_path)
    with pytest.raises(CorruptError, match="is broken and cannot be read") as caught:
        resumed.truncate(2)
    assert caught.value.path == broken
    with pytest.raises(CorruptError):
        read_records(tmp_path)
    resumed.start_anew()
    assert resumed.n_parts == 0
    assert broken.with_name(f"{broken.name}.corrupt-1").exists()
    log_steps(resumed, 0, 5)
    resumed.finish()
    assert (steps_of(tmp_path), steps_of(tmp_path, "other")) == (list(range(5)), list(range(30)))


def test_a_record_cut_in_the_middle_of_a_write_after_the_checkpoint_costs_nothing(tmp_path):
    recorder = make_recorder(tmp_path)
    for first in (0, 10, 20):
        log_steps(recorder, first, first + 10)
    last = tmp_path / f"{TRIAL}-00002.parquet"
    last.write_bytes(last.read_bytes()[:40])
    resumed = make_recorder(tmp_path)
    resumed.truncate(2)
    log_steps(resumed, 20, 30)
    assert steps_of(tmp_path) == list(range(30))
    assert (tmp_path / f"{last.name}.corrupt-1").exists()


def test_a_missing_part_is_named(tmp_path):
    recorder = make_recorder(tmp_path)
    for first in (0, 10, 20):
        log_steps(recorder, first, first + 10)
    (tmp_path / f"{TRIAL}-00001.parquet").unlink()
    for work in (lambda: make_recorder(tmp_path).truncate(3), make_recorder(tmp_path).finish):
        with pytest.raises(CorruptError, match=r"-00001\.parquet is broken .*it is missing"):
            work()


def test_missing_folder_and_broken_file_are_named(tmp_path):
    with pytest.raises(DataError, match="no records folder"):
        read_records(tmp_path / "none")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet is broken and cannot be read \(no complete Parquet file"):
        read_records(tmp_path)


@pytest.mark.slow
def test_reader_sees_each_row_once_while_trials_write_end_and_resume(tmp_path):
    recorder = make_recorder(tmp_path)
    logged, stop, seen = [0], threading.Event(), []

    def write():
        for _ in range(4):
            for _ in range(4):
                log_steps(recorder, logged[0], logged[0] + 5)
                logged[0] += 5
            recorder.finish()
            recorder.truncate(recorder.n_parts)  # a resume at the end: the one file becomes parts again
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        floor = logged[0]
        steps = steps_of(tmp_path)
        assert steps == list(range(len(steps)))
        assert len(steps) >= floor
        seen.append(len(steps))
    writer.join()
    assert steps_of(tmp_path) == list(range(80))
    assert len(set(seen)) > 1


def test_a_file_that_goes_while_the_folder_is_listed_hides_no_rows(tmp_path, monkeypatch):
    """The one file of an ended trial becomes parts again after it was listed: the list has neither it nor them."""
    recorder, stat, is_resumed = make_recorder(tmp_path), os.stat, []
    for first in (0, 5, 10):
        log_steps(recorder, first, first + 5)
    recorder.finish()

    def resumes(path, *args, **kwargs):
        if not is_resumed and str(path).endswith(f"{TRIAL}.parquet"):
            is_resumed.append(True)
            recorder.truncate(recorder.n_parts)
        return stat(path, *args, **kwargs)

    monkeypatch.setattr("os.stat", resumes)
    assert steps_of(tmp_path) == list(range(15))
    assert is_resumed


WRITER = """
import sys
from pathlib import Path
from hamu.training.records import Recorder
recorder = Recorder(Path(sys.argv[1]), {"trial_id": "t"})
step = 0
while True:
    for _ in range(7):
        recorder.log({"kind": "step", "step": step}); step += 1
    recorder.flush()
    (Path(sys.argv[1]) / "checkpoint").write_text(str(recorder.n_parts))
    if recorder.n_parts % 5 == 0:
        recorder.finish()
"""


@pytest.mark.parametrize(
    "delay_s", [0.0, pytest.param(0.013, marks=pytest.mark.slow), pytest.param(0.031, marks=pytest.mark.slow)]
)
def test_killed_process_leaves_only_complete_files_and_resumes_without_a_double_step(tmp_path, delay_s):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoint").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2 + delay_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    visible = [name for name in os.listdir(tmp_path) if name.endswith(".parquet") and not name.startswith(".")]
    assert visible
    for name in visible:
        assert pq.read_metadata(tmp_path / name).num_rows > 0
    steps = steps_of(tmp_path, "t")
    assert steps == list(range(len(steps)))
    resumed = Recorder(tmp_path, {"trial_id": "t"})
    kept = resumed.n_parts - 1  # as if the last checkpoint were one part old
    resumed.truncate(kept)
    log_steps(resumed, 7 * kept, 7 * kept + 10)
    resumed.finish()
    assert steps_of(tmp_path, "t") == list(range(7 * kept + 10))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "t.parquet"]


@pytest.mark.slow  # a wall-clock bound has no place in the fast suite
def test_log_takes_less_than_ten_microseconds(tmp_path):
    recorder, row = make_recorder(tmp_path), {name: 1.0 for name in RECORD_SCHEMA.names if name.endswith("_margin")}
    best = min(_seconds(lambda: [recorder.log(row) for _ in range(1000)]) for _ in range(5))
    assert best / 1000 < 10e-6  # about 1 us on one core; the best of five bears a busy machine


def _seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_trials_come_back_with_every_column(tmp_path):
    path = tmp_path / "new" / "trials.parquet"
    write_trials(path, [{"trial_id": "a", "steps": 3, "forget_quality": math.nan}, {"trial_id": "b", "error": "no"}])
    first, second = read_trials(path)
    assert list(first) == TRIAL_SCHEMA.names
    assert (first["steps"], second["steps"], second["error"]) == (3, None, "no")
    assert math.isnan(first["forget_quality"])
    write_trials(path, [])
    assert read_trials(path) == []
    assert os.listdir(path.parent) == ["trials.parquet"]


def test_missing_trials_are_named(tmp_path):
    with pytest.raises(DataError, match="no trials at"):
        read_trials(tmp_path / "trials.parquet")


def test_failed_replacement_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["a.txt"])
