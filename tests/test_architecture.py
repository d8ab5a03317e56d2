"""The rules that keep the parts apart, read from the source: who imports whom, and what appears in which file."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hamu", "tune_spaces", "launch")
TOP_LEVEL_FOLDERS = {"hamu", "tune_spaces", "launch", "tests", "docker", ".ci", ".github"}

# What each part may import of the others, besides itself: the arrows of the house. A module directly in `hamu` that is
# not listed (its front door, say) may import all of `hamu`, and only the outermost parts may import it.
LOWEST = {"hamu.errors"}
STORED = LOWEST | {"hamu.storage"}
MIDDLE = STORED | {"hamu.hub", "hamu.scores", "hamu.methods", "hamu.data", "hamu.models"}
MAY_IMPORT: dict[str, set[str]] = {
    "hamu.errors": set(),
    "hamu.storage": LOWEST,
    "hamu.hub": LOWEST,
    "hamu.scores": LOWEST,
    "hamu.methods": LOWEST | {"hamu.scores"},
    "hamu.data": STORED | {"hamu.hub"},
    "hamu.models": STORED | {"hamu.hub"},
    "hamu.tasks": MIDDLE,
    "hamu.training": MIDDLE | {"hamu.tasks"},
    "hamu.reports": STORED | {"hamu.training.records"},
}
OUTER = {
    "hamu.cli": ("hamu",),
    "tune_spaces": ("hamu",),
    "launch": ("hamu", "tune_spaces"),
}


@dataclass(frozen=True)
class Import:
    """One import of a module by a file: `module` is absolute; `line` counts from 1."""

    module: str
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


@cache
def sources() -> tuple[tuple[Path, ast.Module], ...]:
    """Every source file of the product, parsed."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return tuple((path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))) for path in paths)


def module_of(path: Path) -> str:
    """Dotted name of a file: hamu/methods/core.py -> hamu.methods.core."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, less those under `if TYPE_CHECKING:`, which never run: naming a type is no dependency."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from executed(other)
            continue
        yield node
        yield from executed(node)


def imports_in(path: Path, tree: ast.Module) -> Iterator[Import]:
    """Every import of a file, also those inside functions; `from a import b` counts as a.b where b is a module."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in executed(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, path, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Import(whole if is_module(whole) else base, path, node.lineno)


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or a package of ours, or torch.distributed."""
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file() or name == "torch.distributed"


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(dict.fromkeys(found for path, tree in sources() for found in imports_in(path, tree)))


def part_of(module: str) -> str:
    """The part that a module belongs to: its package in `hamu`, else its top-level package."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "hamu" else parts[0]


def is_within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


def is_allowed(found: Import) -> bool:
    """Whether an import goes in the agreed direction."""
    target, part = found.module, part_of(module_of(found.path))
    if target.split(".")[0] not in PACKAGES or is_within(target, part):
        return True
    if part in MAY_IMPORT:
        return any(is_within(target, allowed) for allowed in MAY_IMPORT[part])
    allowed = OUTER.get(part, ("hamu",))
    # The command line is an end point: nobody imports it but launch, for its printing of settings and errors.
    if is_within(target, "hamu.cli") and part != "launch":
        return False
    return any(is_within(target, name) for name in allowed)


def files_that(names: Iterator[Path]) -> list[str]:
    return sorted({str(path.relative_to(ROOT)) for path in names})


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def test_imports_run_one_way() -> None:
    assert [str(found) for found in all_imports() if not is_allowed(found)] == []


@pytest.mark.parametrize(
    ("path", "module", "expected"),
    [
        ("hamu/methods/core.py", "hamu.errors", True),
        ("hamu/methods/core.py", "hamu.training.loop", False),
        ("hamu/training/records.py", "hamu.storage.files", True),
        ("hamu/storage/files.py", "hamu.training.records", False),
        ("hamu/data/splits.py", "hamu.training.config", False),
        ("hamu/tasks/vision.py", "hamu.models.resnet", True),
        ("hamu/reports/page.py", "hamu.training.records", True),
        ("hamu/reports/page.py", "hamu.training.loop", False),
        ("hamu/training/loop.py", "launch.sweep", False),
        ("hamu/training/loop.py", "hamu.cli.train", False),
        ("hamu/training/loop.py", "torch", True),
        ("tune_spaces/space.py", "launch.runner", False),
        ("launch/sweep.py", "tune_spaces.space", True),
        ("hamu/__init__.py", "hamu.methods", True),
        ("hamu/__init__.py", "launch", False),
    ],
)
def test_the_direction_rule_tells_good_from_bad(path: str, module: str, expected: bool) -> None:
    assert is_allowed(Import(module, ROOT / path, 1)) is expected


def test_torch_distributed_lives_in_one_file() -> None:
    by_import = (found.path for found in all_imports() if is_within(found.module, "torch.distributed"))
    by_name = (path for path, tree in sources() for node in executed(tree) if dotted(node) == "torch.distributed")
    assert files_that(iter([*by_import, *by_name])) == ["hamu/training/groups.py"]


def test_ray_is_imported_by_one_file_of_hamu_only() -> None:
    names = files_that(found.path for found in all_imports() if is_within(found.module, "ray"))
    assert [name for name in names if name.startswith("hamu/")] == ["hamu/training/ray_workers.py"]


def test_only_the_command_line_and_launch_read_the_environment() -> None:
    readers = {"os.environ", "os.getenv", "os.putenv", "os.environb"}
    found = []
    for path, tree in sources():
        for node in executed(tree):
            taken = [f"os.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else [dotted(node)]
            if readers.intersection(taken) and not is_within(module_of(path), "launch"):
                found.append(path)
    assert [name for name in files_that(iter(found)) if not name.startswith("hamu/cli/")] == []


def test_no_file_is_loaded_in_a_way_that_can_run_code() -> None:
    unsafe = {"pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "yaml.load"}
    found = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "cloudpickle", "joblib", "yaml"):
                found += [f"{path}:{node.lineno}" for a in node.names if f"{node.module}.{a.name}" in unsafe]
            if not isinstance(node, ast.Call):
                continue
            name, settings = dotted(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                name in unsafe
                or name.endswith(".read_pickle")
                or (name == "torch.load" and settings.get("weights_only") != "True")
                or settings.get("allow_pickle") == "True"
                or settings.get("trust_remote_code") == "True"
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert found == []


def test_results_are_removed_and_replaced_through_the_storage_only() -> None:
    """Else they stay in the store of a URL root, or another machine reads the old ones: `mount.remove`, `files.replacing`."""
    own_ways = {"unlink", "rmtree", "rmdir", "removedirs", "rename", "renames"}
    allowed = {"launch/on_tune.py": {"shutil.rmtree"}}  # what Ray has left in its own folder, which no store holds
    found = []
    for path, tree in sources():
        name = str(path.relative_to(ROOT))
        for node in ast.walk(tree) if name.startswith("launch/") else ():
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            said = dotted(node.func)
            is_own_way = node.func.attr in own_ways or said in ("os.remove", "os.replace")
            if is_own_way and said not in allowed.get(name, ()):
                found.append(f"{name}:{node.lineno} {said or node.func.attr}")
    assert found == []


def test_a_file_name_says_its_purpose() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    every = [path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py")]
    assert files_that(path for path in every if path.name in vague) == []


def test_top_level_folders_are_those_of_the_house() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines() if "/" in name} <= TOP_LEVEL_FOLDERS


@pytest.mark.parametrize("module", ["hamu", "hamu.errors", "hamu.methods.names", "hamu.training.config"])
def test_importing_the_light_modules_brings_no_heavy_library(module: str) -> None:
    heavy = ["torch", "torchvision", "transformers", "datasets", "ray", "pandas", "matplotlib", "sklearn"]
    code = f"import json, sys; import {module}; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
