"""Bad input ends with exit code 2 and one line that says how to mend it, before Ray is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.plan import make_plan
from launch.results import SweepFolder
from launch.sweep import main
from tune_spaces.scale import SCALES
from tune_spaces.space import list_spaces, load_space

HEAVY = ("torch", "ray", "transformers", "matplotlib", "datasets")


def errors_of(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["--storage-path", str(root), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def stored_sweep(root: Path, name: str, *, folder_task: str = "digits") -> SweepFolder:
    folder = SweepFolder(root / "results" / folder_task / name)
    with folder.lease():
        folder.start(make_plan(load_space("digits/quickstart"), name=name, overrides={}, root=root))
    return folder


@pytest.fixture
def local_dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "test"):
        images = pa.array([{"bytes": bytes(4), "path": None}] * 6)
        pq.write_table(pa.table({"img": images, "label": np.arange(6) % 3}), folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--space", "digits/quickstrat"], "unknown space 'digits/quickstrat'; did you mean 'digits/quickstart'?"),
        (["--space", "quickstart"], "2 spaces fit; choose one with --space"),
        (["--set", "method=hamuq"], "unknown method 'hamuq'; did you mean 'hamu-q'?"),
        (["--set", "learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["--set", "rho=1.5"], "must be in [0, 1], got 1.5"),
        (["--set", "constraint_ratio=1.5"], "is larger than radius * max_grad_norm"),
        (["--set", "forget_class=10"], "forget_class 10 does not exist in digits; its classes are 0 to 9"),
        (["--set", "rho=1", "--set", "split_ratio=0"], "split_ratio must be > 0"),
        (["--set", "gradient_pairing=split-gpu", "--set", "num_workers=3"], "needs an even number of processes, got 3"),
        (["--set", "gradient_pairing=sequential,split-gpu", "--set", "num_workers=2"], "run one sweep for each, with --set"),
        (["--set", "model_name=./no/such/model"], "'./no/such/model' is not a folder"),
        (["--set", "model_name=resnet21"], "unknown model 'resnet21'; did you mean 'resnet20'?"),
        (["--set", "dataset_name=./no/such/rows"], "'./no/such/rows' is not a folder"),
        (["--max-concurrent", "0"], "give 1 or more"),
        (["--max-concurrent", "two"], "invalid int value: 'two'"),
        (["--name", "../elsewhere"], "--name '../elsewhere'"),
        (["--sett", "lr=1"], "unknown flag '--sett'; did you mean '--set'?"),
        (["quickstart"], "a space is given with --space"),
        (["--resume", "gone"], "no sweep 'gone' to resume"),
        (["--resume", "gone", "--set", "lr=1"], "--set is of no use"),
        (["--resume", "gone", "--search", "tpe"], "--search is of no use"),
        (["--search", "tep"], "unknown search 'tep'; did you mean 'tpe'?"),
        (["--trials", "0"], "at least 1"),
        (["--scheduler", "ahsa"], "unknown scheduler 'ahsa'; did you mean 'asha'?"),
        (["--scheduler", "asha", "--score", "forget_qualty"], "did you mean 'forget_quality'?"),
        (["--until", "no-gain"], "the rule is no-gain:N"),
        (["--target", "forget_acuracy<=retrained"], "did you mean 'forget_accuracy'?"),
        (["--keep", "retain_accuracy>=0.9"], "goes with a target"),
        (["--target", "forget_accuracy<=retrained", "--no-with-reference"], "drop that flag"),
        (["--scale", "smal"], "did you mean 'small'?"),
        (["--seeds", "1,x"], "seed"),
        (["--seeds", "1,2", "--set", "seed=3"], "say the same twice"),
        (["--target", "forget_closeness>=retrained"], "closeness to itself is 1"),
        (["--set", "lr=0.1..0.01:3"], "0.1..0.01"),
        (["--probe", "0"], "give 1 or more"),
        (["--gpus-per-worker", "half"], "give a share such as 0.5, a whole number, or auto"),
        (["--gpus", "1", "--gpus-per-worker", "1"], "say the same twice"),
        (["--scheduler", "pbt"], "--set method="),
        (["--space", "cifar/timing_all", "--search", "tpe", "--dry-run"], "--search tpe goes by the trials' metrics"),
        (["--space", "cifar/timing_all", "--target", "forget_accuracy<=0.1", "--dry-run"], "use --set eval_at_ends=true"),
        (["--target", "forget_rouge<=0.1", "--dry-run"], "forget_rouge is a metric of texts"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert said in errors_of(tmp_path, capsys, *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_column_that_the_dataset_lacks_is_refused_with_those_it_has(
    local_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--set", f"dataset_name={local_dataset}", "--set", "dataset_response_field=kind"]
    assert "has no column 'kind'; it has img, label" in errors_of(tmp_path, capsys, *given)


def test_a_class_without_rows_is_refused(local_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--set", f"dataset_name={local_dataset}", "--set", "forget_class=3"]
    assert "forget_class is 3, which has no training rows" in errors_of(tmp_path, capsys, *given)


def test_a_results_folder_of_another_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored_sweep(tmp_path, "mine")
    assert "go on with --resume mine" in errors_of(tmp_path, capsys, "--name", "mine")
    assert "unknown sweep 'mien'; did you mean 'mine'?" in errors_of(tmp_path, capsys, "--resume", "mien")
    said = errors_of(tmp_path, capsys, "--resume", "mine", "--space", "cifar/rho_sweep")
    assert "belongs to a sweep of space 'digits/quickstart', not 'cifar/rho_sweep'" in said
    stored_sweep(tmp_path, "theirs", folder_task="cifar")
    said = errors_of(tmp_path, capsys, "--space", "cifar/rho_sweep", "--name", "theirs")
    assert "belongs to a sweep of space 'digits/quickstart'" in said


def test_the_environment_is_read_below_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METHOD", "hamuq")
    assert "unknown method 'hamuq'" in errors_of(tmp_path, capsys)
    monkeypatch.setenv("ARTIFACT_ROOT", str(tmp_path / "there"))
    assert main(["--dry-run", "--set", "method=ft", "--name", "mine"]) == 0
    out = capsys.readouterr().out
    assert f"results    {tmp_path / 'there'}/results/digits/mine" in out
    assert out.splitlines()[-1] == "trials: 3"


def test_a_dry_run_ends_with_the_number_of_trials_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--storage-path", str(tmp_path), "--set", "seed=1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    n_trials = 2 * len(load_space("digits/quickstart").trials())
    assert lines[-1] == f"trials: {n_trials}"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_resume_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stored_sweep(tmp_path, "mine")
    plan = folder.read_plan(tmp_path)
    folder.trial(plan.trials[0].trial_id).mkdir()
    (folder.trial(plan.trials[0].trial_id) / "row.json").write_text(json.dumps({"status": "finished"}))
    assert main(["--dry-run", "--storage-path", str(tmp_path), "--resume", "mine"]) == 0
    out = capsys.readouterr().out
    assert f"finished   1 of {len(plan.trials)}; the others would run" in out


def test_the_list_has_every_space_with_its_number_of_trials(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_spaces()
    assert all(f"{len(load_space(line.split()[0]).trials())} trials" in line for line in lines)


def test_bad_input_is_refused_before_anything_heavy_is_imported_and_in_five_seconds(repo_root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['launch/sweep.py', '--set', 'method=hamuq']; import launch.sweep as s; code = s.main(); "
        f"print([name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "[]")
    assert time.monotonic() - began < 5


def test_it_runs_as_a_script_from_any_folder(repo_root: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(repo_root / "launch/sweep.py"), "--list"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("space", list_spaces())
def test_a_dry_run_of_any_space_is_quick_and_ends_with_its_number_of_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], space: str, scale: str
) -> None:
    started = time.process_time()
    assert main(["--storage-path", str(tmp_path), "--space", space, "--scale", scale, "--dry-run"]) == 0
    assert time.process_time() - started < 5  # the limit is on wall time, which other processes share; imports come to 0.5 s
    lines = capsys.readouterr().out.splitlines()
    assert {"space", "slots", "original"} <= {line.split()[0] for line in lines[: lines.index("")]}
    n_listed = len(lines) - lines.index("") - 4  # an empty line, the heading, the trials, an empty line, the last one
    assert lines[-1] == f"trials: {n_listed}"
    assert list(tmp_path.iterdir()) == []
