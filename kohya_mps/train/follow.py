"""Follow a training until it ends, from the terminal that started it or another one, and stop it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from kohya_mps.core.errors import Stopped, UsageError
from kohya_mps.core.process import end_tree
from kohya_mps.core.report import Report, say

from . import live_view, runs
from .outcome import how_to_resume, summarize
from .runs import Run, State

_POLL_SECONDS = 0.2

_HOW_IT_ENDED = {
    State.FINISHED: "is finished",
    State.STOPPED: "was stopped",
    State.FAILED: "failed",
    State.DIED: "was killed",
}


def own_training(run: Run, child: subprocess.Popen[bytes]) -> Report:
    """Show the progress of a training that this process started until it ends.

    The first Ctrl-C asks the trainer to save its state and end; a second one ends it at once.

    Raises:
        Stopped: the user stopped it.
    """
    try:
        live_view.show(run, lambda: child.poll() is None, on_ctrl_c="saves the state and stops the training")
    except KeyboardInterrupt:
        _stop_own(run, child)
    return summarize(run)


def _stop_own(run: Run, child: subprocess.Popen[bytes]) -> None:
    run.stop_file.touch()
    say("\nThe trainer saves its state after this step and ends. Ctrl-C again ends it at once.")
    try:
        child.wait()
    except KeyboardInterrupt:
        end_tree([child.pid], grace_seconds=0)
        child.wait()
        raise Stopped(
            f"{run.path} was ended at once; what is newer than its last saved state is lost",
            how_to_resume(run),
        ) from None
    ended = run.ended()
    if ended and ended.how is State.STOPPED:
        raise Stopped(
            f"{run.path} was stopped after step {ended.step}, its state saved", how_to_resume(run)
        ) from None
    if not ended or ended.how is not State.FINISHED:
        raise Stopped(f"{run.path} was interrupted", f"its log: {run.log}") from None


def logs(target: Path, *, whole: bool = False) -> Report:
    """``invoke logs``: show the progress of a run until it ends.

    Args:
        target: a run, or a project or settings file, whose latest run is shown.
        whole: print everything that the trainer prints.

    Raises:
        UsageError: there is no run.
        Stopped: the user pressed Ctrl-C, which does not end the training.
    """
    run = runs.find(target)
    try:
        live_view.show(run, lambda: run.state() is State.RUNNING, whole_log=whole)
    except KeyboardInterrupt:
        raise Stopped(
            f"{run.path} is still running", f"`invoke stop {run.quoted_path}` saves its state and ends it"
        ) from None
    return summarize(run)


def stop(target: Path) -> Report:
    """``invoke stop``: ask the trainer to save its state and end, and wait until it has ended.

    Raises:
        UsageError: there is no run, or it is not running.
    """
    run = runs.find(target)
    state = run.state()
    if state is not State.RUNNING:
        raise UsageError(
            f"{run.path} is not running: it {_HOW_IT_ENDED[state]}", f"`invoke report {run.quoted_path}`"
        )
    run.stop_file.touch()
    say(f"{run.path}: the trainer saves its state after this step and ends")
    while run.state() is State.RUNNING:
        time.sleep(_POLL_SECONDS)
    return summarize(run)
