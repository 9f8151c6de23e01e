"""Runs: every question about a training is answered from its files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.train import runs
from kohya_mps.train.runs import Process, Resumption, Run, State
from tests.support.training_runs import begin, killed_process, made, made_by_0_1_0, save_state, step_line
from tests.support.world import World


def test_a_run_whose_process_lives_is_running(tmp_path: Path) -> None:
    run = made(tmp_path, process=Process.of(os.getpid()))

    assert run.state() is State.RUNNING


def test_another_process_that_has_the_number_now_does_not_count(tmp_path: Path) -> None:
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


def test_a_run_whose_trainer_reported_its_end_was_not_killed(tmp_path: Path) -> None:
    run = made(tmp_path, process=killed_process())
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


def test_no_run_is_an_error_that_names_what_starts_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run[^$]*invoke train"):
        runs.find(tmp_path)


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.steps_file.write_text(step_line(1) + step_line(2)[:20])

    assert [step.step for step in run.steps()] == [1]


def test_steps_that_a_resumed_run_repeats_are_removed(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.steps_file.write_text("".join(step_line(n) for n in range(1, 8)))

    run.forget_after(5)

    assert [step.step for step in run.steps()] == [1, 2, 3, 4, 5]


def test_only_a_complete_state_is_resumed_from(tmp_path: Path) -> None:
    run = made(tmp_path, process=killed_process())
    save_state(run, "cat-step00000010-state", 10)
    save_state(run, "cat-step00000020-state", 20)
    save_state(run, ".cat-step00000030-state.unfinished", 30)
    (save_state(run, "cat-step00000040-state", 40) / "watched_0.pt").unlink()

    assert runs.resumable(run).step == 20


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [("finished", UsageError, "is finished"), ("failed", StepFailed, "before it saved a state")],
)
def test_a_run_that_cannot_be_resumed_is_refused_with_the_reason(
    tmp_path: Path, how: str, error: type[Exception], message: str
) -> None:
    run = made(tmp_path, process=killed_process())
    run.ended_file.write_text(json.dumps({"how": how, "step": 3, "error": ""}))

    with pytest.raises(error, match=message):
        runs.resumable(run)


def test_a_run_that_is_running_is_not_resumed(tmp_path: Path) -> None:
    run = made(tmp_path, process=Process.of(os.getpid()))
    begin(run, pid=os.getpid())

    with pytest.raises(UsageError, match="still running"):
        runs.resumable(run)


def test_a_directory_that_is_not_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run"):
        Run(tmp_path).record()


@pytest.mark.parametrize(("name", "message"), [("nowhere.toml", "no such file"), (".", "has no train.toml")])
def test_settings_that_do_not_exist_are_an_error_that_names_what_makes_them(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(UsageError, match=rf"{message}[^$]*invoke new"):
        runs.settings_file(tmp_path / name)


def test_a_project_and_its_settings_file_mean_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text("")

    assert runs.settings_file(tmp_path) == runs.settings_file(tmp_path / "train.toml")


def test_the_finished_lora_goes_before_the_checkpoints_and_the_latest_checkpoint_before_the_others(
    tmp_path: Path,
) -> None:
    run = made(tmp_path)
    assert run.lora() is None
    for age, name in enumerate(("cat-step00000001", "cat-step00000002", ".cat-step00000003")):
        (run.output / f"{name}.safetensors").touch()
        os.utime(run.output / f"{name}.safetensors", (1000 + age, 1000 + age))
    assert run.lora() == run.output / "cat-step00000002.safetensors"

    (run.output / "cat.safetensors").touch()
    os.utime(run.output / "cat.safetensors", (1, 1))

    assert run.lora() == run.output / "cat.safetensors"


def test_comments_and_empty_lines_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# one\n\n a cat --w 64 \na dog\n")

    assert made(tmp_path).prompts() == ("a cat --w 64", "a dog")


def test_the_first_step_after_a_resumption_has_no_duration(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.steps_file.write_text("".join(step_line(n) for n in range(1, 6)))

    assert runs.durations(run.steps(), [Resumption("2026-01-02T04:00:00+00:00", 3, "g")]) == {
        2: pytest.approx(0.5),
        3: pytest.approx(0.5),
        5: pytest.approx(0.5),
    }


def test_a_run_of_version_0_1_0_is_read_and_can_be_resumed(world: World) -> None:
    run = made_by_0_1_0(world.root, world.toml(), world.model)

    found = runs.find(world.root)

    assert found == run
    assert found.state() is State.STOPPED
    assert [step.step for step in found.steps()] == [1, 2, 3, 4]
    assert found.record().commits is not None
    assert runs.resumable(found).step == 4


def test_a_zombie_does_not_run(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    run = made(tmp_path, process=Process.of(child.pid))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    assert run.state() is State.DIED
    child.wait()


def test_a_launcher_that_has_not_noticed_its_killed_trainer_is_waited_for(tmp_path: Path) -> None:
    launcher = subprocess.Popen(["sleep", "1"])
    run = made(tmp_path, process=Process.of(launcher.pid))
    begin(run, pid=killed_process().pid)
    save_state(run, "cat-step00000003-state", 3)

    assert runs.resumable(run).step == 3
    launcher.wait()
