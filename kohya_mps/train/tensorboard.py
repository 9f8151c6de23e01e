"""``invoke tensorboard``: the environment's own TensorBoard, on this machine's address alone."""

from __future__ import annotations

import os
from pathlib import Path

from kohya_mps.core.installation import Installation
from kohya_mps.core.process import stream
from kohya_mps.core.report import say
from kohya_mps.core.settings import Settings
from kohya_mps.install import accelerate_launch
from kohya_mps.install.generations import installed

from . import runs

_LOOPBACK = "127.0.0.1"


def serve(settings: Settings, target: Path, port: int) -> int:
    """Serve the logs of a run, or of all runs of a project, until Ctrl-C.

    Returns:
        The exit status of TensorBoard.

    Raises:
        UsageError: there is no run, or nothing is installed.
    """
    logs = log_directory(target)
    generation = installed(Installation(settings.home))
    say(f"http://{_LOOPBACK}:{port}/ shows {logs}; Ctrl-C ends it")
    command = [str(generation.python), "-m", "tensorboard.main", "--logdir", str(logs)]
    return stream(
        [*command, "--host", _LOOPBACK, "--port", str(port)], env=accelerate_launch.environ(generation)
    ).returncode


def log_directory(target: Path) -> Path:
    """The logs of all runs of a project, or of one run.

    Raises:
        UsageError: there is no run.
    """
    all_runs = Path(os.path.abspath(target)) / runs.RUNS
    return all_runs if all_runs.is_dir() else runs.find(target).tensorboard
