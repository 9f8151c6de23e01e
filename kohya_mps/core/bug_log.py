"""The log of an unexpected error, for a bug report."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import sys
import traceback
from pathlib import Path

import kohya_mps

from .files import write_atomic


def write(error: Exception) -> Path:
    """Write a log of an error with versions, the command line and the traceback.

    The file is in the user's directory for logs. It has no names and passwords of URLs and no
    path of the user's home, because people publish it.

    Raises:
        OSError: it cannot be written.
    """
    from platformdirs import user_log_path

    now = datetime.datetime.now(datetime.UTC)
    path = user_log_path("kohya-mps") / f"bug-{now:%Y%m%dT%H%M%SZ}-{os.getpid()}.log"
    write_atomic(path, text(error, now).encode(errors="replace"))
    return path


def text(error: Exception, now: datetime.datetime) -> str:
    """The text of the log."""
    from .settings import ROOT, without_secret

    lines = [
        f"kohya-mps {kohya_mps.__version__} (commit {_commit(ROOT)})",
        f"Python {platform.python_version()} on {platform.platform()}, {platform.machine()}",
        f"installed profile: {_profile() or 'none'}",
        f"command: {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        f"time: {now.isoformat(timespec='seconds')}",
        "",
        "".join(traceback.format_exception(error)),
    ]
    return without_secret("\n".join(lines)).replace(str(Path.home()), "~")


def _commit(root: Path) -> str:
    from .process import capture

    found = None
    with contextlib.suppress(Exception):  # a log without it is better than none
        found = capture(["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    return found.stdout.strip() if found and found.returncode == 0 else "unknown"


def _profile() -> str:
    from .installation import Installation, installed_profile
    from .settings import load

    with contextlib.suppress(Exception):  # the settings themselves may be what is broken
        return installed_profile(Installation(load().home))
    return ""
