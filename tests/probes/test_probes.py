from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml

from kohya_mps.core import settings
from kohya_mps.core.installation import Installation
from kohya_mps.install import checkout, lockfile
from kohya_mps.install.lockfile import LINUX_X86_64, MAC_ARM64

PROBES = sorted(settings.PROBES.glob("*.py"))

# Where a distribution's import name is not its own name.
DISTRIBUTION = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "lycoris": "lycoris-lora",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a probe is a script of its own and imports nothing relatively"
            yield node.module or ""


def distribution(module: str) -> str:
    top = module.partition(".")[0]
    return DISTRIBUTION.get(top, top.replace("_", "-").lower())


def locked(*, gui: bool = False) -> set[str]:
    """What the lock installs; with the GUI's page, it is more than the trainer's."""
    profile = settings.load_profile("validated")
    read = lockfile.read(profile.lock_for(gui=gui))
    return set(read.versions(MAC_ARM64)) & set(read.versions(LINUX_X86_64))


def modules() -> list[str]:
    listed = yaml.safe_load((settings.CONFIG / "trainer_modules.yaml").read_text(encoding="utf-8"))
    return list(listed["modules"])


@pytest.mark.parametrize("probe", PROBES, ids=lambda path: path.name)
def test_a_probe_imports_only_what_the_trainers_environment_has(probe: Path) -> None:
    names = set(imported(ast.parse(probe.read_text(encoding="utf-8"))))
    foreign = {n for n in names if n.partition(".")[0] not in sys.stdlib_module_names}
    # small_trainer.py shrinks sd-scripts' own library, by a name that it computes.
    assert {n for n in foreign if distribution(n) not in locked(gui=probe.name.startswith("gui_"))} == set()


@pytest.mark.parametrize("probe", PROBES, ids=lambda path: path.name)
def test_a_probe_says_how_it_is_called(probe: Path) -> None:
    text = ast.get_docstring(ast.parse(probe.read_text(encoding="utf-8"))) or ""
    assert text
    if probe.name != "__init__.py":
        assert re.search(rf"^usage.*: {re.escape(probe.name)}", text, re.MULTILINE)


def test_every_module_that_smoke_imports_is_installed_by_the_lock() -> None:
    assert {name for name in modules() if distribution(name) not in locked()} == set()
    assert len(modules()) == len(set(modules()))


@pytest.mark.upstream
@pytest.mark.skipif(not os.environ.get("KOHYA_REPO_URL"), reason="KOHYA_REPO_URL names no real kohya_ss")
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_the_list_covers_what_the_real_trainers_import(tmp_path: Path) -> None:
    home = Installation(tmp_path / "home")
    checkout.ensure_checkout(msgspec.structs.replace(settings.load(), home=home.root))
    own = {path.stem for path in home.sd_scripts.rglob("*.py")} | {p.name for p in home.sd_scripts.iterdir()}
    needed: dict[str, str] = {}
    sources = [*home.sd_scripts.glob("*train*.py"), *(home.sd_scripts / "library").glob("*.py")]
    sources += (home.sd_scripts / "networks").glob("lora*.py")
    assert len(sources) > 30
    for path in sources:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                for name in imported(node):
                    needed.setdefault(name.partition(".")[0], path.name)
    listed = {name.partition(".")[0] for name in modules()}
    missing = {
        name: where
        for name, where in needed.items()
        if name not in listed | own and name not in sys.stdlib_module_names
    }
    assert missing == {}
    # And the optimizers that are imported only when they are used.
    assert {"lion_pytorch", "prodigyopt", "schedulefree", "pytorch_optimizer"} <= listed
