from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from devtools.bench import page
from kohya_mps.core.errors import StepFailed, UsageError
from tests.support.installs import make_settings

PROGRAM = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("child", child.pid, "is ready", flush=True)
time.sleep(5)
"""


def test_a_program_is_ended_with_what_it_started_once_it_is_ready(tmp_path: Path) -> None:
    output: list[bytes] = []
    command = [sys.executable, "-c", PROGRAM]
    seconds = page.seconds_until(lambda: b"ready" in b"".join(output), command, os.environ, tmp_path, output)
    assert seconds > 0
    child = int(b"".join(output).split()[1])
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=5)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_program_that_ends_before_it_is_ready_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no page')"]
    with pytest.raises(StepFailed, match="no page"):
        page.seconds_until(lambda: False, command, os.environ, tmp_path, [])


def test_without_an_installation_it_says_what_brings_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        page.until_it_answers(make_settings(tmp_path / "home"), tmp_path, 1)
    assert "invoke setup" in refusal.value.fix
