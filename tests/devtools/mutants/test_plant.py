from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kohya_mps.core.settings import ROOT


@pytest.mark.slow
def test_faults_are_planted_in_a_small_project_and_named_by_what_they_change(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.mutmut]\nsource_paths = ["small.py"]\nuse_git_change_detection = false\n'
        'pytest_add_cli_args_test_selection = ["tests"]\n'
    )
    (tmp_path / "small.py").write_text(
        "def increment(a):\n    return a + 1\n\n\ndef print_it(a):\n    return print('no words', 'word')\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_small.py").write_text(
        "from small import increment\n\ndef test_it():\n    assert increment(1) == 2\n"
    )

    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "devtools.mutants.plant"],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    show = "from devtools.mutants import survivors\nfor one in survivors.planted(): print(one.survived, one.name)"
    named = subprocess.run(
        [sys.executable, "-c", show], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    ).stdout.splitlines()

    assert "False small.increment: return a + 1 -> return a - 1" in named
    assert "True small.print_it: return print('no words', 'word') -> return print('no words', None)" in named
    assert not [line for line in named if "WORDS" in line], "sentences are left alone"
    assert [line for line in named if "'WORD'" in line]
