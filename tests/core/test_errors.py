from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from kohya_mps.core.errors import Busy, KohyaError, StepFailed, Stopped, UsageError, restores


@pytest.mark.parametrize(
    ("kind", "code"), [(KohyaError, 1), (StepFailed, 1), (UsageError, 2), (Busy, 3), (Stopped, 130)]
)
def test_each_kind_of_error_has_its_exit_code(kind: type[KohyaError], code: int) -> None:
    assert kind("what").exit_code == code


def test_an_error_says_what_is_wrong_and_what_to_type() -> None:
    assert str(StepFailed("it is broken", "`mend it`")) == "it is broken\n  -> `mend it`"
    assert str(StepFailed("it is broken")) == "it is broken"


def test_the_command_that_restores_a_file_does(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    path = tmp_path / "it's a file.yaml"
    path.write_text("good")
    git("init")
    git("add", "-A")
    git("commit", "-m", "a file")
    path.write_text("spoilt")
    command = restores(path).split("`")[1]
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    assert path.read_text() == "good"
