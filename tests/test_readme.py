"""The README's Python examples run as they stand and do what the text beside them says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_with_ones_own_model_forgets_a_class_and_keeps_the_rest(tmp_path: Path) -> None:
    (example,) = [code for code in EXAMPLES if "hamu.unlearn" in code]
    after = {line.split()[0]: float(line.split()[-1]) for line in run(example, tmp_path).splitlines()}
    assert after["forget"] < 0.1 and after["retain"] > 0.9
    assert len(example.split("\n\n")[-1].splitlines()) < 20


@pytest.mark.slow
def test_the_example_with_ones_own_loop_prints_a_step(tmp_path: Path) -> None:
    (example,) = [code for code in EXAMPLES if "combine_gradients" in code]
    assert run(example, tmp_path).startswith("('")


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_every_relative_link_points_to_a_file(link: str) -> None:
    assert (Path(__file__).parent.parent / link).exists()
