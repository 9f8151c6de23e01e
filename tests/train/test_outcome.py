"""The outcome of a run: whether it is good, why it failed, and which changes help."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core.report import Check, Report, Status
from kohya_mps.train import outcome
from kohya_mps.train.runs import Process, Run, State
from kohya_mps.trainer_config.trainer_options import TrainerOptions
from tests.support.failure_cases import CASES
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
    assert statuses(report) == dict.fromkeys(
        ("training", "training device", "loss", "pace", "LoRA"), Status.PASS
    )
    assert detail(report, "training") == "finished after step 30 of 30"
    assert detail(report, "loss") == "1.0000 in the first step, averages 1.0000 to 0.0333"
    assert detail(report, "pace") == "0.50 s per step"
    assert report.extra["state"] is State.FINISHED
    assert report.extra["steps"] == report.extra["total"] == 30
    assert report.extra["device"] == "cpu"
    assert report.extra["losses"] == [1 / n for n in range(1, 31)]
    assert report.extra["lora"] == str(run.output / "cat.safetensors")
    assert detail(report, "LoRA") == f"{run.output / 'cat.safetensors'} (0.00 MB)"
    assert report.title == f"Run {run.path}"
    assert report.extra["run"] == str(run.path)
    assert report.extra["log"] == str(run.log)
    assert report.summary == ("", f"invoke report {run.path}", f"invoke test-lora {run.path}")


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
    assert row(report, "training").status is Status.PASS
    assert report.extra["lora"] is None


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
    assert found["known failure"].detail.startswith(
        "ValueError: fp16 mixed precision requires a GPU (not 'mps').: accelerate"
    )


def test_the_cause_of_an_error_that_was_raised_while_another_was_handled_is_explained(run: Run) -> None:
    run.log.write_text(
        "Traceback (most recent call last):\nValueError: fp16 mixed precision requires a GPU (not 'mps').\n"
        "During handling of the above exception, another exception occurred:\n"
        + "Traceback (most recent call last):\n"
        + "  a line\n" * 200
        + "KeyError: 'something else'\n"
    )

    assert "mixed_precision" in failed(outcome.summarize(run))["known failure"].fix


def test_at_most_two_known_failures_are_explained(run: Run) -> None:
    logs = [cases.log.caught for cases in CASES.values() if cases.log][:3]
    run.log.write_text("Traceback (most recent call last):\n" + "\n".join(logs))

    rows = [check.name for check in outcome.summarize(run).checks]

    assert rows.count("known failure") == 2


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
        ("DiskFull: /x: 3 MB left", "/x: 3 MB left"),
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
    run.log.write_bytes(b"loading \xff\nsteps: 10%\n")

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


def out_of_memory(world: World, begun: str = "", expected: str = "cpu", **changed: Any) -> str:
    """The remedy after a run with these settings ran out of memory."""
    run = made(world.root, process=killed_process(), model=str(world.model), expected_device=expected)
    run.settings.write_bytes(world.toml(**changed).read_bytes())
    if begun:
        begin(run, device=begun)
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
    small: dict[str, Any] = {"resolution": "256,256", "network_train_unet_only": True, "train_batch_size": 1}

    assert "no change of the settings would save more" in out_of_memory(world, **small)


def test_a_resolution_is_only_lowered(world: World) -> None:
    fix = out_of_memory(world, resolution="640,640")

    assert 'resolution = "512,512"' in fix
    assert 'resolution = "768,768"' not in fix


def test_the_peaks_are_those_of_the_device_that_the_run_was_on(world: World) -> None:
    """On MPS attention is not fused; a run that never began was to run on the expected device."""
    world.model.unlink()  # the family's size counts then; that of the world's model is nothing
    large: dict[str, Any] = {
        "resolution": "1024,1024",
        "train_batch_size": 4,
        "gradient_checkpointing": False,
    }
    on_cpu, on_mps = out_of_memory(world, **large), out_of_memory(world, expected="mps", **large)

    assert on_cpu != on_mps
    assert out_of_memory(world, begun="mps:0", **large) == on_mps
    assert out_of_memory(world, begun="mps", **large) == on_mps
    assert out_of_memory(world, begun="cpu", expected="mps", **large) == on_cpu


def test_a_batch_size_that_a_picture_set_overrides_saves_nothing(world: World) -> None:
    sets = '[[datasets]]\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = "data/10_cat"\n'
    world.write("sets.toml", sets)

    fix = out_of_memory(world, dataset_config="sets.toml", train_data_dir=None, train_batch_size=4)

    assert "train_batch_size" not in fix


def test_each_change_is_what_it_says_with_those_before_it() -> None:
    training = TrainerOptions(resolution="1024,768", train_batch_size=4)
    changes = list(outcome._cheaper_settings(training))

    assert [change for change, _ in changes] == [
        "cache_latents = true",
        "gradient_checkpointing = true",
        "train_batch_size = 1",
        "network_train_unet_only = true",
        'resolution = "768,768"',
        'resolution = "512,512"',
        'resolution = "384,384"',
    ]
    said: dict[str, Any] = {}
    for change, cheaper in changes:
        said |= tomllib.loads(change)
        assert {name: getattr(cheaper, name) for name in said} == said


@pytest.mark.parametrize(("side", "lower"), [(769, 3), (768, 2), (512, 1), (384, 0)])
def test_only_smaller_resolutions_are_tried(side: int, lower: int) -> None:
    training = TrainerOptions(resolution=f"{side},64")

    assert len(list(outcome._cheaper_settings(training))) == 4 + lower


def test_a_change_is_compared_with_the_changes_before_it(world: World) -> None:
    fix = out_of_memory(world, gradient_checkpointing=False, cache_latents=True, train_batch_size=1)

    assert "gradient_checkpointing = true" in fix
    assert "train_batch_size" not in fix


def test_a_killed_run_whose_log_tells_of_memory_ran_out_of_it(run: Run) -> None:
    run.log.write_text(
        "RuntimeError: CUDA out of memory. Tried to allocate\nTraceback (most recent call last):\n"
    )

    assert failed(outcome.summarize(run))["memory"].detail == "the device ran out of memory"


def test_the_reported_error_goes_before_what_the_log_tells_of_memory(run: Run) -> None:
    run.log.write_text("warning: out of memory, trying again\nKeyError: 'x'\n")
    end(run, "failed", 3, "KeyError: 'x'")

    found = failed(outcome.summarize(run))

    assert found["error"].detail == "KeyError: 'x'"
    assert "memory" not in found


def test_a_launcher_that_reports_a_killed_trainer_is_no_error_of_its_own(run: Run) -> None:
    run.log.write_text(
        "Traceback (most recent call last):\nChildFailedError: Signal 9 (SIGKILL) received by PID 77\n"
    )

    assert "the trainer was killed" in failed(outcome.summarize(run))["memory"].detail


def test_only_a_finished_run_names_what_to_do_with_its_lora(run: Run) -> None:
    end(run, "stopped", 3)
    assert not outcome.summarize(run).summary

    end(run, "finished", 3)
    assert f"invoke test-lora {run.path}" in outcome.summarize(run).summary


def test_a_finished_run_is_not_offered_to_be_resumed(run: Run) -> None:
    save_state(run, "cat-step00000030-state", 30)

    assert row(finished(run), "training").fix == ""
