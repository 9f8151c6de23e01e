"""What both front ends share: print a step's report, turn its outcome into an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from .errors import FAILED, INTERRUPTED, KohyaError, StepFailed, UsageError

if TYPE_CHECKING:
    from .report import Report


def run_task(step: Callable[[], Report | int], *, json: bool = False, dry: bool = False) -> None:
    """Run ``step`` and print its report, or end with the exit code that it returns.

    Args:
        step: what was typed.
        json: print the report as JSON.
        dry: invoke's ``--dry``, which cannot be kept: it would still run the step.

    Raises:
        SystemExit: with the documented exit code, when the report is not good, when the
            step raised an error that a person can mend, or when it was interrupted.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    # What is made here is nobody else's to change, whatever the user's umask allows.
    os.umask(os.umask(0o022) | 0o022)
    try:
        if dry:
            raise UsageError("--dry is not supported: the steps do their work without a shell")
        result = step()
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing is broken: the same command goes on from here.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except KohyaError as error:
        _print_error(error, json)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        mendable = _user_error(error)
        if mendable is None:
            raise
        _print_error(mendable, json)
        raise SystemExit(mendable.exit_code) from None
    if isinstance(result, int):
        raise SystemExit(result)
    _print(result, json)
    if not result.ok:
        raise SystemExit(FAILED)


def _print(report: Report, json: bool) -> None:
    from .report import show, to_json

    try:
        if json:
            print(to_json(report), flush=True)
        else:
            show(report)
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted; nothing more can be written there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_sigterm(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _user_error(error: OSError) -> KohyaError | None:
    """The disk and its permissions are the user's to mend; any other OSError is a bug."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StepFailed(f"The disk is full{where}", "free some space, then run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StepFailed(
            f"No permission to write{where} ({error.strerror})",
            "make it writable for you, or choose another place with KOHYA_HOME",
        )
    return None


def _print_error(error: KohyaError, json: bool) -> None:
    print(f"error: {error}", file=sys.stderr)
    if json:
        from .report import Check, Report, Status, to_json

        check = Check("error", Status.FAIL, error.what, error.fix)
        print(to_json(Report("", (check,))))
