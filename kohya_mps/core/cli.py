"""What every command shares: it prints the report, and turns the outcome into an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from .errors import FAILED, GOOD, INTERRUPTED, KohyaError, StepFailed, UsageError

if TYPE_CHECKING:
    from .report import Report


def run_task(step: Callable[[], Report | int], *, json: bool = False, dry: bool = False) -> None:
    """Run ``step`` and print its report, or exit with the code that it returns.

    Args:
        step: what the command does.
        json: print the report as JSON.
        dry: invoke's ``--dry``; it is refused, because invoke would still run the step.

    Raises:
        SystemExit: with the documented exit code, if the report has a failed check, or the
            step raised an error or was interrupted.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    # Nobody else may change what is made here, whatever the user's umask allows.
    os.umask(os.umask(0o022) | 0o022)
    try:
        result = (_refuse_dry if dry else step)()
        code = result if isinstance(result, int) else _print(result, json)
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing is broken: the same command continues from here.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except KohyaError as error:
        code = _print_error(error, json)
    except Exception as error:
        code = _print_error(_user_error(error) or _bug(error), json)
    if code:
        raise SystemExit(code)


def _refuse_dry() -> int:
    raise UsageError("--dry is not supported: the steps do their work without a shell")


def parse_int(flag: str, value: str) -> int:
    """Convert the value of a flag to a whole number.

    invoke could convert it, but would answer a wrong one with a traceback.

    Raises:
        UsageError: it is not a whole number.
    """
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{flag}: found {value!r}", "accepted: a whole number") from None


def _print(report: Report, json: bool) -> int:
    from .report import show, to_json

    try:
        if json:
            print(to_json(report), flush=True)
        else:
            show(report)
    except BrokenPipeError:
        # The reader, such as `head`, has read enough; the interpreter must not flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return GOOD if report.ok else FAILED


def _print_error(error: KohyaError, json: bool) -> int:
    print(f"error: {error}", file=sys.stderr)
    if json:
        from .report import Check, Report, Status, to_json

        check = Check("error", Status.FAIL, error.what, error.fix)
        print(to_json(Report("", (check,))))
    return error.exit_code


def _on_sigterm(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _user_error(error: Exception) -> KohyaError | None:
    """A full disk or a missing permission is for the user to mend; any other OSError is a bug."""
    if not isinstance(error, OSError):
        return None
    path = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StepFailed(f"The disk is full{path}", "free some space, then run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StepFailed(
            f"No permission to write{path} ({error.strerror})",
            "make it writable for you, or choose another directory with KOHYA_HOME",
        )
    return None


def _bug(error: Exception) -> KohyaError:
    """Write the log of an unexpected error, and say where it is."""
    import traceback

    from . import bug_log

    what = f"This is a bug in kohya-mps: {traceback.format_exception_only(error)[-1].splitlines()[0]}"
    try:
        log = bug_log.write(error)
    except Exception:  # no log can be written; the bug may be in what writes it
        traceback.print_exception(error)
        return StepFailed(what, "attach the lines above to an issue")
    if os.environ.get("CI"):  # the machine, and the log with it, will be gone
        traceback.print_exception(error)
    return StepFailed(what, f"attach this log to an issue: {log}")
