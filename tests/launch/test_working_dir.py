"""What of the repository is sent with a job."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.working_dir import MOST_BYTES, cluster_in_job, measure, sources, staged

NEEDED = {"launch/sweep.py", "launch/interpreter.py", "hamu/errors.py", "tune_spaces/space.py", "pyproject.toml"}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of a few files."""
    root = tmp_path / "repository"
    for name in ("hamu/a.py", "launch/sweep.py", "launch/clusters/one.yaml", "tune_spaces/b.py", "pyproject.toml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_the_packages_go_and_nothing_else(repo_root: Path) -> None:
    files = {path.as_posix() for path in sources(repo_root)}
    assert files >= NEEDED
    assert {name.split("/")[0] for name in files} == {"hamu", "tune_spaces", "launch", "pyproject.toml"}
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]


def test_its_size_is_about_a_megabyte(repo_root: Path) -> None:
    with staged(repo_root) as folder:
        n_files, n_bytes = measure(folder)
        assert n_files == len(sources(repo_root))
        assert 0.5e6 < n_bytes < 3e6  # the bound is a tenth of what would be worth a thought on a slow line
    assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["hamu/.env", "launch/key.pem", "hamu/rows.parquet", "tune_spaces/artifacts/x.json", "data/x.csv", "a.py"]
)
def test_keys_data_and_other_folders_stay_here(small: Path, name: str) -> None:
    before = sources(small)
    (small / name).parent.mkdir(parents=True, exist_ok=True)
    (small / name).write_text("x")
    assert sources(small) == before


def test_a_space_of_ones_own_goes_along(small: Path) -> None:
    (small / "tune_spaces" / "mine.py").write_text("SPACE = 1")
    with staged(small) as folder:
        assert (folder / "tune_spaces" / "mine.py").read_text() == "SPACE = 1"


def test_what_has_not_changed_has_the_name_under_which_the_cluster_has_it_already(small: Path) -> None:
    from ray._private.runtime_env.packaging import get_uri_for_directory

    names = []
    for text in ("a", "a", "b"):
        (small / "hamu" / "a.py").write_text(text)
        with staged(small) as folder:
            names.append(get_uri_for_directory(str(folder), include_gitignore=True))
    assert names[0] == names[1] != names[2]


def test_a_cluster_file_from_elsewhere_goes_along_with_its_settings(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("cluster_name: mine")
    (tmp_path / "mine.settings.yaml").write_text("max_concurrent: 2")
    with staged(small, cluster_file=tmp_path / "mine.yaml") as folder:
        there = folder / cluster_in_job(tmp_path / "mine.yaml", small)
        assert there.read_text() == "cluster_name: mine"
        assert there.with_name("mine.settings.yaml").read_text() == "max_concurrent: 2"


def test_a_cluster_file_of_the_repository_stays_where_it_is(small: Path) -> None:
    assert cluster_in_job(small / "launch/clusters/one.yaml", small) == "launch/clusters/one.yaml"


def test_two_cluster_files_of_one_name_are_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("another")
    with pytest.raises(ConfigError, match=r"one\.yaml.*rename"), staged(small, cluster_file=tmp_path / "one.yaml"):
        pass


def test_what_is_too_large_is_named(small: Path) -> None:
    with (small / "hamu" / "table.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"hamu/table\.json"), staged(small):
        pass


def test_a_folder_that_is_not_the_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no hamu"):
        sources(tmp_path)


def test_plain_ray_job_submit_sends_the_same_files(repo_root: Path, tmp_path: Path) -> None:
    """Ray's own packaging, which reads .rayignore and .gitignore."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(repo_root), package, include_gitignore=True)
    sent = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert sent == {path.as_posix() for path in sources(repo_root)}
