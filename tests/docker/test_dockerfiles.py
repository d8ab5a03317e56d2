"""What can be told of the images without building them: no Docker engine is asked for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.docker.dockerfile import Stage, is_sent, read_dockerfile

NAMES = ("Dockerfile.cpu", "Dockerfile.gpu")
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", re.IGNORECASE)


@pytest.fixture(params=NAMES)
def stages(request: pytest.FixtureRequest, repo_root: Path) -> list[Stage]:
    return read_dockerfile(repo_root / "docker" / request.param)


def tool(name: str) -> str:
    """A linter of the dev extra, beside Python or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; it comes with the dev extra")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_hadolint_has_nothing_to_say(name: str, repo_root: Path) -> None:
    found = subprocess.run([tool("hadolint"), str(repo_root / "docker" / name)], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_every_base_has_a_version(stages: list[Stage]) -> None:
    for stage in stages:
        _, _, tag = stage.image.rpartition(":")
        assert re.search(r"\d", tag) and "latest" not in tag, stage.image


def test_versions_come_from_the_constraints_and_code_is_compiled(stages: list[Stage]) -> None:
    build = next(stage for stage in stages if stage.name == "build")
    installs = [each.value for each in build.all("RUN") if "uv pip install" in each.value]
    first, last = installs
    assert "--constraint constraints.txt" in first
    assert "--compile-bytecode" in first
    assert "--no-deps" in last
    assert "-m compileall -q hamu tune_spaces launch" in last


def test_what_clouds_need_fits_the_constraints(repo_root: Path) -> None:
    def pins(path: str) -> dict[str, str]:
        lines = (repo_root / path).read_text().splitlines()
        return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))

    cloud, ours = pins("docker/cloud.txt"), pins("constraints.txt")
    assert {"boto3", "s3fs", "gcsfs", "google-api-python-client"} <= cloud.keys()
    assert {name: (version, ours[name]) for name, version in cloud.items() if ours.get(name, version) != version} == {}


def test_the_image_runs_as_nobody_of_importance_and_tells_how_it_is(stages: list[Stage]) -> None:
    final = stages[-1]
    names = [each.name for each in final.instructions]
    assert final.all("USER")[-1].value == "1000:1000"
    assert not {"RUN", "COPY", "ADD"}.intersection(names[names.index("USER") :])
    assert "health.py" in final.all("HEALTHCHECK")[0].value
    assert "org.opencontainers.image.title" in final.settings("LABEL") or "title" in final.all("LABEL")[0].value


def test_no_secret_is_built_in(stages: list[Stage]) -> None:
    for stage in stages:
        assert {name for name in stage.settings() if SECRET.search(name)} == set()


def test_all_that_is_copied_is_there_and_is_sent_to_the_build(stages: list[Stage], repo_root: Path) -> None:
    ignore = (repo_root / ".dockerignore").read_text()
    for stage in stages:
        for each in stage.all("COPY"):
            if any(flag.startswith("--from=") for flag in each.flags):
                continue
            *sources, _ = each.value.split()
            for source in sources:
                assert (repo_root / source).exists(), source
                assert is_sent(source, ignore), source


@pytest.mark.parametrize(
    "path",
    [
        *(".git", ".venv", "artifacts", ".env", "tests"),
        *("docker/ray_token", "docker/compose.yaml", "hamu/__pycache__", "launch/__pycache__/a.pyc"),
    ],
)
def test_what_no_image_needs_is_not_sent(path: str, repo_root: Path) -> None:
    assert not is_sent(path, (repo_root / ".dockerignore").read_text())


def test_both_images_have_one_python_and_one_uv(repo_root: Path) -> None:
    cpu, gpu = (read_dockerfile(repo_root / "docker" / name) for name in NAMES)
    assert cpu[0].image == gpu[0].image
    assert cpu[1].settings("ARG")["PYTHON"] == gpu[1].settings("ARG")["PYTHON"]
    differing = [
        (a, b)
        for ours, theirs in zip(cpu, gpu, strict=True)
        for a, b in zip(ours.instructions, theirs.instructions, strict=True)
        if a != b
    ]
    assert [a.name for a, _ in differing] == ["ARG", "LABEL", "RUN"]  # torch's build, the words, gcc


def test_the_cuda_of_the_base_is_that_of_torch(repo_root: Path) -> None:
    gpu = read_dockerfile(repo_root / "docker" / "Dockerfile.gpu")
    major, minor = re.search(r"nvidia/cuda:(\d+)\.(\d+)", gpu[-1].image).groups()  # type: ignore[union-attr]
    assert gpu[1].settings("ARG")["TORCH"] == f"--torch-backend=cu{major}{minor}"
    local = version("torch").partition("+")[2]
    assert not local.startswith("cu") or local == f"cu{major}{minor}"
