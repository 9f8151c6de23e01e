"""The project as pip and uv install it: in place, and no other way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kohya_mps.core.process import uv

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.environment  # the build backend and the packages come from an index


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_an_editable_install_finds_settings_and_locks_from_anywhere(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    python = str(venv / "bin" / "python")
    for command in (
        ("venv", "--quiet", "--no-project", "--python", sys.executable, str(venv)),
        ("pip", "install", "--quiet", "--python", python, "--editable", str(ROOT)),
    ):
        done = run(uv(), *command)
        assert done.returncode == 0, done.stderr
    program = (
        "import importlib.metadata as installed, kohya_mps\n"
        "from kohya_mps.core import settings\n"
        "assert settings.load().profile.lock_file.is_file()\n"
        "assert installed.version('kohya-mps') == kohya_mps.__version__\n"
    )
    done = run(python, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_wheel_which_would_lack_settings_and_locks_is_refused(tmp_path: Path) -> None:
    done = run(uv(), "build", "--wheel", "--out-dir", str(tmp_path), str(ROOT))
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr
    assert list(tmp_path.glob("*.whl")) == []
