from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kohya_mps.core import cli
from kohya_mps.core.errors import Busy, StepFailed, UsageError
from kohya_mps.core.report import Check, Report, Status


@pytest.fixture(autouse=True)
def _handlers_and_umask() -> object:
    handler, mask = signal.getsignal(signal.SIGTERM), os.umask(0o022)
    os.umask(mask)
    yield
    signal.signal(signal.SIGTERM, handler)
    os.umask(mask)


def failing(error: BaseException) -> object:
    def step() -> Report:
        raise error

    return step


def ended(step: object, **options: bool) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run_task(step, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value.code, int)
    return caught.value.code


def report(status: Status) -> Report:
    return Report("A title", (Check("a check", status, "what was found", "what to type"),), {"more": [1]})


def test_a_good_report_is_printed_and_nothing_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run_task(lambda: report(Status.WARN))
    assert "what was found" in capsys.readouterr().out


def test_a_failed_check_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: report(Status.FAIL)) == 1
    assert "what to type" in capsys.readouterr().out


def test_json_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run_task(lambda: report(Status.PASS), json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "ok": True,
        "checks": [{"name": "a check", "status": "pass", "detail": "what was found", "fix": "what to type"}],
        "more": [1],
    }
    assert printed.err == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [(StepFailed("what", "fix"), 1), (UsageError("what", "fix"), 2), (Busy("what", "fix"), 3)],
)
def test_an_error_is_printed_without_a_traceback_and_as_json(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(failing(error), json=True) == code
    printed = capsys.readouterr()
    assert printed.err == "error: what\n  -> fix\n"
    assert json.loads(printed.out) == {
        "ok": False,
        "checks": [{"name": "error", "status": "fail", "detail": "what", "fix": "fix"}],
    }


def test_an_interruption_ends_with_130_and_says_how_to_continue(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(failing(KeyboardInterrupt())) == 130
    message = "\nInterrupted. Nothing is broken: the same command continues from here.\n"
    assert capsys.readouterr().err == message


def test_a_termination_is_an_interruption() -> None:
    def step() -> Report:
        os.kill(os.getpid(), signal.SIGTERM)
        return report(Status.PASS)

    assert ended(step) == 130


def test_a_returned_exit_code_is_passed_on_and_0_ends_nothing() -> None:
    assert ended(lambda: 7) == 7
    cli.run_task(lambda: 0)


def test_dry_is_refused_before_anything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    def step() -> int:
        raise AssertionError("the step was run")

    assert ended(step, dry=True) == 2
    assert "--dry" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "what", "fix"),
    [
        (errno.ENOSPC, "The disk is full: /some/where", "free some space, then run the same command again"),
        (errno.EDQUOT, "The disk is full: /some/where", "free some space, then run the same command again"),
        (errno.EACCES, "No permission to write: /some/where (Permission denied)", "make it writable for you"),
        (errno.EPERM, "No permission to write: /some/where (", "make it writable for you"),
        (
            errno.EROFS,
            "No permission to write: /some/where (Read-only",
            "choose another directory with KOHYA_HOME",
        ),
    ],
)
def test_a_full_or_forbidden_disk_is_the_users_to_mend(
    number: int, what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(failing(OSError(number, os.strerror(number), "/some/where"))) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {what}")
    assert fix in second


def test_an_error_of_a_file_without_a_name_names_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(failing(OSError(errno.ENOSPC, "No space left"))) == 1
    assert capsys.readouterr().err.startswith("error: The disk is full\n")


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    """The little that is left in the buffer must not be written when the interpreter ends."""
    code = """
from kohya_mps.core import cli
from kohya_mps.core.report import Report
cli.run_task(lambda: Report("", ()), json=True)
"""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    _, error = process.communicate()
    assert (process.returncode, error) == (0, b"")


def test_an_error_of_the_system_that_the_user_cannot_mend_is_a_bug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(failing(OSError(errno.EPIPE, "Broken pipe"))) == 1
    assert "This is a bug in kohya-mps: BrokenPipeError" in capsys.readouterr().err


def test_a_number_is_read_and_anything_else_is_wrong_usage() -> None:
    assert cli.parse_int("--port", "6006") == 6006
    with pytest.raises(UsageError, match="--port: found 'x'") as caught:
        cli.parse_int("--port", "x")
    assert caught.value.fix == "accepted: a whole number"


def test_what_a_step_makes_is_writable_for_nobody_else(tmp_path: Path) -> None:
    os.umask(0)

    def step() -> int:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "file").write_text("")
        return 0

    cli.run_task(step)
    for path in (tmp_path / "made", tmp_path / "made" / "file"):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_a_stricter_umask_of_the_users_is_kept(tmp_path: Path) -> None:
    os.umask(0o077)

    def step() -> int:
        (tmp_path / "made").mkdir()
        return 0

    cli.run_task(step)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700
