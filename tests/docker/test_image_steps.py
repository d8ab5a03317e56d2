"""The install steps of an image, read from its Dockerfile and run as they stand there, in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docker.dockerfile import expanded, read_dockerfile

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]

PLACE = "/opt/hamu"


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_the_install_steps_give_a_venv_that_runs_a_sweep(name: str, repo_root: Path, tmp_path: Path) -> None:
    """torch comes as the package index has it (`--build-arg TORCH=`), Python as this machine has it where uv cannot fetch one."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not on PATH")
    build = next(stage for stage in read_dockerfile(repo_root / "docker" / name) if stage.name == "build")
    settings = {**build.settings(), "TORCH": ""}
    settings = {key: value.replace(PLACE, str(tmp_path)) for key, value in settings.items()}
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ} | settings
    environment |= {key: value for key, value in os.environ.items() if key.startswith(("UV_INDEX", "UV_DEFAULT", "SSL_", "HTTP"))}
    environment |= {"UV_LINK_MODE": "hardlink"}  # no second copy of torch on this disk
    if not can_fetch_python(settings["PYTHON"], environment):
        settings |= {"PYTHON": "3.11"}
        environment |= {"PYTHON": "3.11", "UV_PYTHON_PREFERENCE": "only-system"}
    work = tmp_path
    steps = 0
    for each in build.instructions:
        if each.name == "WORKDIR":
            work = Path(each.value.replace(PLACE, str(tmp_path)))
            work.mkdir(parents=True, exist_ok=True)
        elif each.name == "COPY" and not each.flags:
            *sources, target = expanded(each.value, settings).split()
            for source in sources:
                copy(repo_root / source, work / target if len(sources) == 1 and target != "./" else work / source)
        elif each.name == "RUN" and "apt-get" not in each.value:
            command = each.value.replace("--managed-python", "") if settings["PYTHON"] == "3.11" else each.value
            found = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=work, env=environment, capture_output=True, text=True
            )
            assert found.returncode == 0, found.stderr
            steps += 1
    assert steps == 3
    python = tmp_path / "venv" / "bin" / "python"
    assert list((tmp_path / "venv").glob("lib/python3.11/site-packages/torch/__pycache__/*.pyc"))
    assert list((work / "launch" / "__pycache__").glob("sweep.*.pyc"))
    assert [(tmp_path / "venv" / "bin" / tool).exists() for tool in ("ray", "pytest")] == [True, False]
    wanted = dict(line.split("==") for line in (repo_root / "constraints.txt").read_text().splitlines() if "==" in line)
    listed = subprocess.run(["uv", "pip", "freeze", "--python", python], capture_output=True, text=True, check=True).stdout
    installed = dict(line.partition(" ")[0].split("==") for line in listed.splitlines() if "==" in line)
    ours = {key: value.partition("+")[0] for key, value in installed.items() if key in wanted}
    assert {"ray", "torch", "transformers"} <= ours.keys()
    assert ours == {key: wanted[key] for key in ours}
    clean = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path), "ARTIFACT_ROOT": str(tmp_path / "artifacts")}
    command = ["python", "launch/sweep.py", "--name", "first", "--set", "method=ft", "--set", "epochs=0.5"]
    command += ["--set", "original.num_train_epochs=1", "--max-concurrent", "1"]
    found = subprocess.run(command, cwd=work, env=clean, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "artifacts" / "results" / "digits" / "first" / "report.html").exists()


def can_fetch_python(python: str, environment: dict[str, str]) -> bool:
    """Whether uv has, or can fetch, the Python of the image."""
    found = subprocess.run(["uv", "python", "install", "--no-bin", python], env=environment, capture_output=True, timeout=300)
    return found.returncode == 0


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)
