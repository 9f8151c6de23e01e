"""The rules of the house that no linter knows: sizes of rooms and functions, a test file for each module."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kohya_mps

ROOT = Path(__file__).parent.parent
PACKAGES = ("kohya_mps", "devtools")

# Modules with logic and without a test file of their own, and why.
NO_TEST_FILE = {
    "devtools/editable_only.py": "hatchling, which runs it, is not in the lock; test_packaging.py runs uv",
}

# Scripts that run under the trainer's interpreter: one file of tests for the folder.
RUN_BY_THE_TRAINER = {
    "kohya_mps/probes": "tests/probes/test_probes.py",
    "devtools/rehearsal/simulation": "tests/devtools/rehearsal/test_device.py",
}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def file_that_tests(module: Path) -> Path:
    """``kohya_mps/ROOM/X.py`` is tested by ``tests/ROOM/test_X.py``, ``devtools/…`` by ``tests/devtools/…``."""
    if shared := RUN_BY_THE_TRAINER.get(name(module.parent)):
        return ROOT / shared
    parts = module.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kohya_mps" else parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ROOT.joinpath("tests", *parts[:-1], f"test_{parts[-1]}.py")


def test_a_room_has_at_most_sixteen_modules() -> None:
    rooms = {path.parent for path in modules()}
    sizes = {name(room): len([p for p in room.glob("*.py") if p.name != "__init__.py"]) for room in rooms}
    assert len(sizes) > 10
    assert {room: size for room, size in sizes.items() if size > 16} == {}


def test_a_function_has_at_most_sixty_lines() -> None:
    lengths = {
        f"{name(path)}: {each.name}": (each.end_lineno or 0) - each.lineno + 1
        for path in [*modules(), ROOT / "tasks.py", ROOT / "noxfile.py"]
        for each in functions(path)
    }
    assert len(lengths) > 500
    assert {where: lines for where, lines in lengths.items() if lines > 60} == {}


def test_no_module_imports_a_private_name_of_another() -> None:
    """ruff sees private attributes (SLF); it has no stable rule for imports."""
    private = [
        f"{name(path)}: {alias.name}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGES))
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert private == []


def test_every_module_with_logic_has_its_test_file() -> None:
    with_logic = [path for path in modules() if any(functions(path))]
    without = {name(path) for path in with_logic if not file_that_tests(path).is_file()}
    assert without == set(NO_TEST_FILE)


def test_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_the_changelog_has_a_dated_section_for_the_version() -> None:
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(kohya_mps.__version__)} \(\d{{4}}-\d\d-\d\d\)", sections[1])


def test_the_lock_of_the_tools_is_made_from_the_projects_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints" / "tools.in").read_text(encoding="utf-8").splitlines()
    assert {Requirement(line).name for line in lines if not line.startswith("#")} == set(
        project["dependencies"]
    )


def test_no_file_names_a_package_registry() -> None:
    """The packages come from the index that pip or uv is configured with, a mirror included."""
    index = pytest.importorskip("pip._internal.models.index")
    hosts = [
        host for each in (index.PyPI, index.TestPyPI) for host in (each.netloc, each.file_storage_domain)
    ]
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    contents = {file: (ROOT / file).read_bytes() for file in files if (ROOT / file).is_file()}
    assert "constraints/train.txt" in contents
    assert [file for file, content in contents.items() for host in hosts if host.encode() in content] == []
