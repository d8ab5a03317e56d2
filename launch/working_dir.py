"""What of the repository goes to a cluster: the three packages and pyproject.toml, copied into a folder of their own.

No artifacts, no data, no virtual environment, no tests: a megabyte or two, where the whole checkout can be many gigabytes. Ray
names the package by a hash of its contents, so a submission that changes nothing uploads nothing. `.rayignore` at the top of the
repository says the same to the plain `ray job submit --working-dir .`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hamu.errors import ConfigError
from launch.cluster_yaml import settings_path

PACKAGES = ("hamu", "tune_spaces", "launch")
BESIDE = ("pyproject.toml",)
CLUSTERS = "launch/clusters"
MOST_BYTES = 50 * 2**20
"""Ray refuses ten times as much; code of this kind never comes near, so something else has been put among it."""

_SUFFIXES = frozenset({".py", ".pyi", ".yaml", ".yml", ".json", ".toml", ".txt", ".csv", ".sbatch", ".sh"})
_CACHES = frozenset({"__pycache__", "artifacts", "outputs", "wandb"})


def sources(root: Path) -> list[Path]:
    """Files to send, relative to the repository, in order: by their kind, so that neither a key nor a dataset goes along.

    Raises:
        ConfigError: `root` is not the repository.
    """
    lacking = [name for name in (*PACKAGES, *BESIDE) if not (root / name).exists()]
    if lacking:
        raise ConfigError(f"{root} has no {lacking[0]}, which a job needs; give the folder of the repository")
    found = [Path(name) for name in BESIDE]
    for package in PACKAGES:
        for folder, folders, names in os.walk(root / package):
            folders[:] = [name for name in folders if name not in _CACHES and not name.startswith(".")]
            here = Path(folder).relative_to(root)
            found += [here / name for name in names if Path(name).suffix in _SUFFIXES and not name.startswith(".")]
    return sorted(found)


@contextlib.contextmanager
def staged(root: Path, *, cluster_file: Path | None = None) -> Iterator[Path]:
    """Give a folder with what a job needs, and remove it afterwards.

    Args:
        root: of the repository.
        cluster_file: of the cluster; one that lies outside of the repository is put among those that are in it, with its
            settings (see `cluster_in_job`).

    Raises:
        ConfigError: `root` is not the repository, what is to be sent is too large, or a cluster file of another content has
            the same name.
    """
    files = sources(root)
    sizes = {path: (root / path).stat().st_size for path in files}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ConfigError(
            f"the packages are {megabytes(sum(sizes.values()))}, of which {largest} {megabytes(sizes[largest])}, and at most "
            f"{megabytes(MOST_BYTES)} are sent with a job; keep data and models under the artifact root"
        )
    with tempfile.TemporaryDirectory(prefix="hamu-job-") as place:
        folder = Path(place)
        for path in files:
            _copy(root / path, folder / path)
        if cluster_file is not None:
            target = folder / cluster_in_job(cluster_file, root)
            for source, to in ((cluster_file, target), (settings_path(cluster_file), settings_path(target))):
                if not source.is_file():
                    continue
                if to.exists() and to.read_bytes() != source.read_bytes():
                    raise ConfigError(f"{source} and {CLUSTERS}/{to.name} have one name and are different; rename the first")
                _copy(source, to)
        yield folder


def cluster_in_job(cluster_file: Path, root: Path) -> str:
    """Where a job finds the cluster file, relative to its working directory."""
    path, top = cluster_file.resolve(), root.resolve()
    if path.is_relative_to(top) and path.relative_to(top).parts[0] in PACKAGES:
        return path.relative_to(top).as_posix()
    return f"{CLUSTERS}/{path.name}"


def measure(folder: Path) -> tuple[int, int]:
    """Number of files in a folder, and their bytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def megabytes(n_bytes: int) -> str:
    """A size in words."""
    return f"{n_bytes / 1e6:.1f} MB"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
