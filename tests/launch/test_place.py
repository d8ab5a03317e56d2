"""Where a sweep runs: what is joined and what is not, and which roots do for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.flags import parse
from launch.place import JOB, Place, check_paths, check_root, find_place, root_of
from launch.plan import make_plan, read_overrides
from tune_spaces.space import load_space

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
JOINED = Place(address="10.0.0.1:6379")


def place(*flags: str, **environment: str) -> Place:
    return find_place(parse(flags, ""), environment)


def test_nothing_is_joined_that_nobody_names() -> None:
    assert not place().is_joined
    assert not place(RAY_ADDRESS="10.0.0.1:6379").is_joined


def test_a_flag_names_a_cluster() -> None:
    assert place("--address", "10.0.0.1:6379", **TOKEN).address == "10.0.0.1:6379"
    assert place("--address", "auto").address == "auto"


def test_a_job_joins_its_cluster() -> None:
    found = place(RAY_ADDRESS="10.0.0.1:6379", **{JOB: "{}"}, **TOKEN)
    assert found.is_job
    assert found.address == "10.0.0.1:6379"


def test_a_cluster_that_others_reach_must_ask_for_a_token() -> None:
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE"):
        place("--address", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE"):
        place(RAY_ADDRESS="10.0.0.1:6379", **{JOB: "{}"})
    assert place("--address", "127.0.0.1:6379").is_joined


def test_waiting_for_nodes_is_for_clusters() -> None:
    with pytest.raises(ConfigError, match="give --address too"):
        place("--wait-for-nodes", "2")
    assert place("--address", "auto", "--wait-for-nodes", "2").n_nodes == 2


def test_a_relative_root_does_for_this_machine_only() -> None:
    check_root(Path("artifacts"), Place())
    with pytest.raises(ConfigError, match="give an absolute path on storage that all nodes share"):
        check_root(Path("artifacts"), JOINED)
    with pytest.raises(ConfigError, match="thrown away"):
        check_root(Path("artifacts"), Place(address="auto", is_job=True))


def test_a_root_inside_of_a_jobs_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="thrown away"):
        check_root(tmp_path / "artifacts", Place(address="auto", is_job=True))
    check_root(tmp_path / "artifacts", JOINED)


def test_folders_of_data_and_models_are_absolute_on_a_cluster(tmp_path: Path) -> None:
    def plan(name: str) -> object:
        overrides = read_overrides([f"dataset_name={name}"])
        return make_plan(load_space("cifar/constraint_sweep"), name="mine", overrides=overrides, root=tmp_path)

    check_paths(plan("./rows"), Place())
    check_paths(plan("cifar10"), JOINED)
    check_paths(plan(str(tmp_path)), JOINED)
    with pytest.raises(ConfigError, match=r"dataset_name '\./rows' is relative"):
        check_paths(plan("./rows"), JOINED)


def test_the_root_is_of_the_flag_then_of_the_environment() -> None:
    assert root_of(parse(["--storage-path", "there"], ""), {"ARTIFACT_ROOT": "here"}, None) == Path("there")
    assert root_of(parse([], ""), {"ARTIFACT_ROOT": "here"}, None) == Path("here")
    assert root_of(parse([], ""), {}, None) == Path("artifacts")


@pytest.mark.parametrize("text", ["s3:/bucket/x", "s3:bucket", "", " "])
def test_a_root_that_is_hardly_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--storage-path"):
        root_of(parse(["--storage-path", text], ""), {}, None)


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="holds a password") as refused:
        root_of(parse(["--storage-path", "s3://me:hunter2@bucket/x"], ""), {}, None)
    assert "hunter2" not in str(refused.value)


def test_an_address_has_a_port() -> None:
    with pytest.raises(ConfigError, match="it is host:port"):
        place("--address", "nonsense", **TOKEN)
