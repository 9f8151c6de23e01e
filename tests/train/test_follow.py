"""Following a training from the terminal that started it and from another one, and stopping it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kohya_mps.core.errors import Stopped, UsageError
from kohya_mps.core.settings import ROOT, Settings
from kohya_mps.train import follow, runs, start
from kohya_mps.train.runs import Process, Run, State
from kohya_mps.train.start import TrainOptions
from tests.support.stand_in_trainer import WAIT, stand_in
from tests.support.training_runs import begin, end, killed_process, made, made_by_0_1_0, save_state, step_line
from tests.support.world import World


def test_a_detached_training_is_followed_and_stopped_from_another_terminal(
    installation: Settings, world: World
) -> None:
    stand_in(installation, WAIT)

    started = start.train(installation, world.toml(), TrainOptions(detach=True))
    run = Run(Path(started.extra["run"]))
    _until(lambda: len(run.steps()) == 4)
    assert run.state() is State.RUNNING
    report = follow.stop(world.root)

    assert report.extra["state"] is State.STOPPED
    assert "--resume` continues after step" in report.checks[0].fix
    with pytest.raises(UsageError, match="is not running"):
        follow.stop(world.root)
    assert follow.logs(world.root).extra["state"] is State.STOPPED


def test_ctrl_c_saves_first_and_says_how_to_resume(installation: Settings, world: World) -> None:
    stand_in(installation, WAIT)
    # Whoever started the tests may have ignored it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        _until(lambda: any(len(Run(p.parent).steps()) == 4 for p in world.root.glob("runs/*/run.json")))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(Stopped, match=r"its state saved[^$]*--resume` continues after step") as stopped:
            start.train(installation, world.toml(), TrainOptions())
    finally:
        signal.signal(signal.SIGINT, before)

    assert stopped.value.exit_code == 130
    assert runs.find(world.root).state() is State.STOPPED


def test_a_second_ctrl_c_ends_the_training_at_once(tmp_path: Path) -> None:
    run = made(tmp_path, process=killed_process())
    save_state(run, "cat-step00000003-state", 3)
    child = subprocess.Popen(["sleep", "60"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        _until(run.stop_file.exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.5, interrupt_twice).start()
    try:
        with pytest.raises(Stopped, match=r"was ended at once[^$]*--resume` continues after step 3"):
            follow.own_training(run, child)
    finally:
        signal.signal(signal.SIGINT, before)

    assert child.returncode == -signal.SIGKILL or child.returncode == -signal.SIGTERM


def test_ctrl_c_while_logs_are_shown_does_not_end_the_training(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    run = made(tmp_path, process=Process.of(child.pid))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(Stopped, match=r"is still running[^$]*invoke stop"):
            follow.logs(tmp_path)
        assert run.state() is State.RUNNING
        assert not run.stop_file.exists()
    finally:
        signal.signal(signal.SIGINT, before)
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("how", "message"),
    [("finished", "is finished"), ("stopped", "was stopped"), ("failed", "failed"), ("", "was killed")],
)
def test_a_run_that_ended_is_not_stopped_again(tmp_path: Path, how: str, message: str) -> None:
    run = made(tmp_path, process=killed_process())
    if how:
        end(run, how, 3)

    with pytest.raises(UsageError, match=f"is not running: it {message}"):
        follow.stop(tmp_path)


@pytest.mark.parametrize(("device", "code"), [("cpu", 0), ("cuda:0", 1), ("mps:0", 1)])
def test_the_exit_code_says_whether_the_training_ran_on_the_expected_device(
    tmp_path: Path, device: str, code: int
) -> None:
    run = made(tmp_path, process=killed_process(), expected_device="cpu")
    begin(run, device=device)
    run.steps_file.write_text(step_line(1))
    end(run, "finished", 1)

    done = subprocess.run(
        [sys.executable, "-m", "invoke", "logs", str(run.path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == code, done.stderr
    assert f"{device}, 1 process, expected cpu" in done.stdout


def test_the_logs_of_a_run_of_version_0_1_0_are_shown(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by_0_1_0(world.root, world.toml(), world.model)

    report = follow.logs(world.root, whole=True)

    assert report.ok
    assert report.extra["steps"] == 4
    assert capsys.readouterr().out == "loading\nWARNING   old and known\nsteps:  66%\n"


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["finished", ""])
def test_ctrl_c_in_a_training_that_ends_anyway_reports_how_it_ended(tmp_path: Path, how: str) -> None:
    run = made(tmp_path, process=killed_process())
    child = subprocess.Popen(["sleep", "60"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        _until(run.stop_file.exists)
        if how:
            end(run, how, 30)
        child.kill()

    threading.Timer(0.5, interrupt).start()
    try:
        if how:
            assert follow.own_training(run, child).extra["state"] is State.FINISHED
        else:
            with pytest.raises(Stopped, match="was interrupted"):
                follow.own_training(run, child)
    finally:
        signal.signal(signal.SIGINT, before)
