"""Runs: every question about a training is answered from its files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.train import runs
from kohya_mps.train.runs import Process, Run, State
from tests.support.training_runs import made, step_line


def test_a_run_whose_process_lives_is_running(tmp_path: Path) -> None:
    run = made(tmp_path, process=Process.of(os.getpid()))

    assert run.state() is State.RUNNING


def test_a_number_that_another_process_has_now_does_not_count(tmp_path: Path) -> None:
    run = made(tmp_path, process=Process(os.getpid(), began=1.0))

    assert run.state() is State.DIED


@pytest.mark.parametrize(
    ("seconds", "state"), [(0.5, State.RUNNING), (-0.5, State.RUNNING), (5.0, State.DIED)]
)
def test_a_process_is_the_same_when_the_clock_was_set_by_less_than_a_second(
    tmp_path: Path, seconds: float, state: State
) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        now = Process.of(child.pid)
        run = made(tmp_path, process=Process(child.pid, now.began + seconds))

        assert run.state() is state
    finally:
        child.kill()
        child.wait()


def test_a_run_that_said_how_it_ended_did_not_die(tmp_path: Path) -> None:
    run = made(tmp_path, process=_gone())
    run.ended_file.write_text('{"how": "stopped", "step": 4, "error": ""}')

    assert run.state() is State.STOPPED


def test_the_latest_run_is_found_even_if_two_began_in_one_second(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text("x = 1\n")
    for _ in range(11):
        made(tmp_path, run=runs.new(file))

    found = runs.find(tmp_path)

    newest = max((tmp_path / "runs").iterdir(), key=lambda p: p.stat().st_ctime_ns)
    assert found.path == newest
    assert runs.find(found.path) == found


def test_a_settings_file_finds_its_own_runs_alone(tmp_path: Path) -> None:
    made(tmp_path, run=runs.new(tmp_path / "one.toml"), settings="one.toml")
    made(tmp_path, run=runs.new(tmp_path / "two.toml"), settings="two.toml")
    (tmp_path / "one.toml").write_text("")

    assert runs.find(tmp_path / "one.toml").record().settings == str(tmp_path / "one.toml")


def test_no_run_is_said_with_what_starts_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run[^$]*invoke train"):
        runs.find(tmp_path)


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.steps_file.write_text(step_line(1) + step_line(2)[:20])

    assert [step.step for step in run.steps()] == [1]


def test_steps_that_are_made_again_are_forgotten(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.steps_file.write_text("".join(step_line(n) for n in range(1, 8)))

    run.forget_after(5)

    assert [step.step for step in run.steps()] == [1, 2, 3, 4, 5]


def test_only_a_whole_state_is_gone_on_from(tmp_path: Path) -> None:
    run = made(tmp_path, process=_gone())
    _state(run, "cat-step00000010-state", 10)
    _state(run, "cat-step00000020-state", 20)
    _state(run, ".cat-step00000030-state.unfinished", 30)
    (_state(run, "cat-step00000040-state", 40) / "watched_0.pt").unlink()

    assert runs.resumable(run).step == 20


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [("finished", UsageError, "is finished"), ("failed", StepFailed, "before it saved a state")],
)
def test_what_cannot_be_resumed_says_why(tmp_path: Path, how: str, error: type[Exception], said: str) -> None:
    run = made(tmp_path, process=_gone())
    run.ended_file.write_text(json.dumps({"how": how, "step": 3, "error": ""}))

    with pytest.raises(error, match=said):
        runs.resumable(run)


def test_a_running_one_is_not_resumed(tmp_path: Path) -> None:
    run = made(tmp_path, process=Process.of(os.getpid()))
    begun = {"total": 9, "device": "cpu", "processes": 1, "pid": os.getpid()}
    run.begun_file.write_bytes(msgspec.json.encode(begun))

    with pytest.raises(UsageError, match="still running"):
        runs.resumable(run)


def _state(run: Run, name: str, step: int) -> Path:
    state = run.output / name
    state.mkdir(parents=True)
    (state / "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": step}))
    (state / "watched_0.pt").touch()
    return state


def _gone() -> Process:
    child = subprocess.Popen(["sleep", "60"])
    process = Process.of(child.pid)
    child.kill()
    child.wait()
    return process
