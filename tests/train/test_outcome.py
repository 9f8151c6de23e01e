"""The outcome of a run: whether it is good, why it failed, and which changes help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core.report import Check, Report, Status
from kohya_mps.train import outcome
from kohya_mps.train.runs import Process, Run, State
from tests.support.reports import detail, failed, statuses
from tests.support.training_runs import begin, end, killed_process, made, save_state, step_line
from tests.support.world import World


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose process is gone and whose trainer reported no end."""
    return made(tmp_path, process=killed_process())


def finished(run: Run, *, device: str = "cpu", processes: int = 1) -> Report:
    begin(run, device=device, processes=processes)
    run.steps_file.write_text("".join(step_line(n) for n in range(1, 31)))
    end(run, "finished", 30)
    return outcome.summarize(run)


def row(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_a_finished_run_is_good_and_has_its_figures(run: Run) -> None:
    (run.output / "cat.safetensors").write_bytes(b"lora")

    report = finished(run)

    assert report.ok
    assert statuses(report).keys() == {"training", "training device", "loss", "pace", "LoRA"}
    assert detail(report, "training") == "finished after step 30 of 30"
    assert detail(report, "loss") == "1.0000 in the first step, averages 1.0000 to 0.0333"
    assert detail(report, "pace") == "0.50 s per step"
    assert report.extra["state"] is State.FINISHED
    assert report.extra["steps"] == report.extra["total"] == 30
    assert report.extra["device"] == "cpu"
    assert report.extra["losses"] == [1 / n for n in range(1, 31)]
    assert report.extra["lora"] == str(run.output / "cat.safetensors")
    assert f"invoke report {run.path}" in report.summary


@pytest.mark.parametrize(
    ("device", "expected", "good"),
    [
        ("cpu", "cpu", True),
        ("cuda:1", "cuda", True),
        ("mps:0", "mps", True),
        ("mps", "mps", True),
        ("cpu", "mps", False),
        ("cpu", "cuda", False),
        ("cuda:0", "mps", False),
        ("mps:0", "cpu", False),
    ],
)
def test_only_the_expected_device_is_good(tmp_path: Path, device: str, expected: str, good: bool) -> None:
    report = finished(made(tmp_path, process=killed_process(), expected_device=expected), device=device)

    check = row(report, "training device")
    assert report.ok is good
    assert check.status is (Status.PASS if good else Status.FAIL)
    assert check.detail == f"{device}, 1 process, expected {expected}"
    assert ("invoke configure" in check.fix) is not good


def test_several_processes_are_counted(run: Run) -> None:
    assert "cpu, 2 processes" in detail(finished(run, processes=2), "training device")


def test_a_run_that_is_running_is_good_and_says_where_it_is(tmp_path: Path) -> None:
    run = made(tmp_path, process=Process.of(os.getpid()))
    begin(run, total=40)
    run.steps_file.write_text("".join(step_line(n) for n in range(1, 8)))

    report = outcome.summarize(run)

    assert report.ok
    assert detail(report, "training") == "running, at step 7 of 40"


def test_a_stopped_run_is_good_and_says_how_to_resume(run: Run) -> None:
    save_state(run, "cat-step00000004-state", 4)
    end(run, "stopped", 4)

    report = outcome.summarize(run)

    assert report.ok
    assert detail(report, "training") == "stopped after step 4"
    assert row(report, "training").fix == f"`invoke train {run.path} --resume` continues after step 4"


def test_without_a_saved_state_a_new_run_is_the_remedy(run: Run) -> None:
    assert "starts a new run" in outcome.how_to_resume(run)


def test_a_known_failure_in_the_log_is_explained(run: Run) -> None:
    run.log.write_text("ValueError: fp16 mixed precision requires a GPU (not 'mps').\n")

    found = failed(outcome.summarize(run))

    assert "mixed_precision" in found["known failure"].fix


def test_what_was_printed_before_the_last_error_is_not_its_reason(run: Run) -> None:
    run.log.write_text(
        "ValueError: fp16 mixed precision requires a GPU (not 'mps').\nand it went on\n"
        "Traceback (most recent call last):\nKeyError: 'something else'\n"
    )
    end(run, "failed", 3, "KeyError: 'something else'")

    found = failed(outcome.summarize(run))

    assert found["error"].detail == "KeyError: 'something else'"
    assert str(run.log) in found["error"].fix
    assert "known failure" not in found


def test_a_loss_that_ended_the_run_is_explained(run: Run) -> None:
    end(run, "failed", 4, "NotFinite: the loss of step 4 is nan")

    found = failed(outcome.summarize(run))

    assert found["training"].detail == "failed after step 4"
    assert "step 4 is nan" in found["not finite"].detail
    assert "nothing was saved from it" in found["not finite"].detail
    assert "learning_rate" in found["not finite"].fix


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("DiskFull: /x has 3 MB left; the checkpoint needs 9 MB more", "3 MB left"),
        ("OSError: [Errno 28] No space left on device", "No space left"),
    ],
)
def test_a_full_disk_is_explained_with_how_to_resume(run: Run, error: str, message: str) -> None:
    save_state(run, "cat-step00000003-state", 3)
    end(run, "failed", 4, error)

    found = failed(outcome.summarize(run))

    assert message in found["disk"].detail
    assert "free some space" in found["disk"].fix
    assert "--resume` continues after step 3" in found["training"].fix


def test_another_number_of_processes_than_before_is_explained(run: Run) -> None:
    end(run, "failed", 0, "NoExactResume: the state was not saved by a run of as many processes")

    found = failed(outcome.summarize(run))

    assert "as many processes" in found["resume"].detail
    assert "invoke configure --processes" in found["resume"].fix


def test_a_run_that_was_killed_without_a_word_may_have_needed_too_much_memory(run: Run) -> None:
    run.log.write_text("loading\nsteps: 10%\n")

    found = failed(outcome.summarize(run))

    assert found["training"].detail.startswith("killed after step 0")
    assert "the trainer was killed" in found["memory"].detail


def test_a_run_that_ended_with_an_error_was_not_killed_for_its_memory(run: Run) -> None:
    run.log.write_text("Traceback (most recent call last):\nKeyError: 'x'\n")

    found = failed(outcome.summarize(run))

    assert found["error"].detail == "KeyError: 'x'"
    assert "memory" not in found


def test_a_failure_that_printed_nothing_says_so(run: Run) -> None:
    end(run, "failed", 0)

    assert failed(outcome.summarize(run))["error"].detail == "the trainer printed nothing"


def out_of_memory(world: World, **changed: Any) -> str:
    """The remedy after a run with these settings ran out of memory."""
    run = made(world.root, process=killed_process(), model=str(world.model))
    run.settings.write_bytes(world.toml(**changed).read_bytes())
    end(run, "failed", 4, "RuntimeError: MPS backend out of memory (…)")
    return failed(outcome.summarize(run))["memory"].fix


def test_changes_that_save_memory_are_offered_with_the_predicted_peaks(world: World) -> None:
    fix = out_of_memory(world, train_batch_size=4, gradient_checkpointing=False, cache_latents=False)

    assert "predicted" in fix
    assert fix.index("gradient_checkpointing = true (about") < fix.index("train_batch_size = 1 (about")
    peaks = [float(part.split("(about ")[1].split(" GB")[0]) for part in fix.split("; ")]
    assert peaks == sorted(peaks, reverse=True)


def test_a_change_that_saves_nothing_is_not_offered(world: World) -> None:
    fix = out_of_memory(world, train_batch_size=1, gradient_checkpointing=True, cache_latents=True)

    assert "resolution" in fix
    for change in ("cache_latents", "gradient_checkpointing", "train_batch_size"):
        assert change not in fix


def test_settings_that_leave_nothing_to_save_are_named_as_such(world: World) -> None:
    small = {"resolution": "256,256", "network_train_unet_only": True, "train_batch_size": 1}

    assert "no change of the settings would save more" in out_of_memory(world, **small)


def test_a_resolution_is_only_lowered(world: World) -> None:
    fix = out_of_memory(world, resolution="640,640")

    assert 'resolution = "512,512"' in fix
    assert 'resolution = "768,768"' not in fix
