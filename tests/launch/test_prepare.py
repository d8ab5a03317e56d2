"""Going on with a sweep from the command line: as it is, longer, or with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.flags import parse
from launch.place import Place
from launch.prepare import Prepared, prepare
from launch.results import SweepFolder, write_json

FLAGS = ("--set", "method=ft", "--set", "lr=0.01,0.02", "--no-with-reference")


def prepared(root: Path, *flags: str) -> Prepared:
    return prepare(parse(["--storage-path", str(root), *flags], ""), Place())


def begun(root: Path, *flags: str) -> Prepared:
    """A sweep whose plan is written."""
    found = prepared(root, "--name", "mine", *(flags or FLAGS))
    with found.folder.lease():
        found.write_plan()
    return found


def end_all(folder: SweepFolder, found: Prepared) -> None:
    for trial in found.whole.trials:
        path = folder.trial(trial.trial_id) / "row.json"
        path.parent.mkdir(parents=True)
        write_json(path, {"trial_id": trial.trial_id, "status": "finished"})


def test_a_sweep_is_extended_once_and_then_gone_on_with(tmp_path: Path) -> None:
    begun(tmp_path)
    longer = prepared(tmp_path, "--resume", "mine", "--extend", "--set", "lr=0.04")
    assert len(longer.plan.trials) == 3
    longer.write_plan()
    again = prepared(tmp_path, "--resume", "mine", "--extend", "--set", "lr=0.04")  # as a batch system gives it a second time
    assert again.base is None
    assert again.plan.trials == longer.plan.trials
    assert len(prepared(tmp_path, "--resume", "mine").plan.trials) == 3


def test_an_extension_by_nothing_is_refused_when_all_have_ended(tmp_path: Path) -> None:
    found = begun(tmp_path)
    end_all(found.folder, found)
    with pytest.raises(ConfigError, match="has all 2 trials .* and all have ended"):
        prepared(tmp_path, "--resume", "mine", "--extend", "--set", "lr=0.02")


def test_a_search_that_may_try_no_more_is_refused_unless_it_is_told_to(tmp_path: Path) -> None:
    found = begun(tmp_path, *FLAGS, "--search", "random", "--trials", "2")
    end_all(found.folder, found)
    with pytest.raises(ConfigError, match="may try 2 trials, and has; give --trials"):
        prepared(tmp_path, "--resume", "mine", "--extend", "--set", "lr=0.04")
    assert prepared(tmp_path, "--resume", "mine", "--extend", "--set", "lr=0.04", "--trials", "3").plan.n_to_run == 3


def test_two_extensions_at_once_do_not_overwrite_each_other(tmp_path: Path) -> None:
    begun(tmp_path)
    first = prepared(tmp_path, "--resume", "mine", "--extend", "--set", "lr=0.04")
    second = prepared(tmp_path, "--resume", "mine", "--extend", "--set", "lr=0.08")
    first.write_plan()
    with pytest.raises(ConfigError, match="extended by another process just now"):
        second.write_plan()
    assert len(prepared(tmp_path, "--resume", "mine").plan.trials) == 3


def test_shares_of_one_sweep_take_one_plan(tmp_path: Path) -> None:
    shares = [prepared(tmp_path, "--name", "mine", *FLAGS, "--part", f"{i}/2") for i in (1, 2)]
    for share in shares:
        share.write_plan()
    assert [len(share.plan.trials) for share in shares] == [1, 1]
    later = prepared(tmp_path, "--name", "mine", *FLAGS, "--part", "1/2")
    assert not later.is_new
    with pytest.raises(ConfigError, match="give all shares the same flags"):
        prepared(tmp_path, "--name", "mine", "--set", "method=gdiff", "--part", "1/2")


def test_shares_of_an_extended_sweep_go_on_with_all_of_it(tmp_path: Path) -> None:
    begun(tmp_path)
    prepared(tmp_path, "--resume", "mine", "--extend", "--set", "lr=0.04,0.08").write_plan()
    assert len(prepared(tmp_path, "--name", "mine", *FLAGS, "--part", "1/2").plan.trials) == 2
