from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from devtools.bench import page
from kohya_mps.core.errors import StepFailed, UsageError
from tests.support.installs import make_settings

PROGRAM = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
)


def test_a_program_is_ended_with_what_it_started_once_it_is_ready(tmp_path: Path) -> None:
    output: list[bytes] = []
    program = f"{PROGRAM} print('ready', flush=True); time.sleep(60)"
    seconds = page.seconds_until(
        lambda: b"ready" in b"".join(output), [sys.executable, "-c", program], os.environ, tmp_path, output
    )
    assert 0 < seconds < 30


def test_a_program_that_ends_before_it_is_ready_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no page')"]
    with pytest.raises(StepFailed, match="no page"):
        page.seconds_until(lambda: False, command, os.environ, tmp_path, [])


def test_without_an_installation_it_says_what_brings_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        page.until_it_answers(make_settings(tmp_path / "home"), tmp_path, 1)
    assert "invoke setup" in refusal.value.fix
