"""The lock on an installation that one run at a time holds, and the processes that run from it."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from .errors import Busy
from .files import write_atomic
from .installation import Installation
from .process import RUN_MARK, end_leftovers, is_alive, running_from


class _Holder(msgspec.Struct, frozen=True):
    """Who holds the lock; ``left`` has the marks of killed runs whose processes may still run."""

    pid: int
    mark: str
    left: tuple[str, ...] = ()


@contextlib.contextmanager
def exclusive_lock(home: Installation) -> Iterator[None]:
    """Hold the lock on an installation, after what a killed run left running was ended.

    Raises:
        Busy: another run holds it; this one does not wait for its end.
    """
    home.state.mkdir(parents=True, exist_ok=True)
    record = home.state / "holder.json"
    lock = FileLock(home.state / "lock")
    _take(lock, home, record)
    try:
        killed = _read_holder(record)
        left = (killed.mark, *killed.left) if killed else ()
        mark = uuid.uuid4().hex
        # Written before anything that takes time: a second run has to name this process.
        write_atomic(record, msgspec.json.encode(_Holder(os.getpid(), mark, left)))
        for old in left:
            end_leftovers(old)
        os.environ[RUN_MARK] = mark
        write_atomic(record, msgspec.json.encode(_Holder(os.getpid(), mark)))
        yield
        record.unlink(missing_ok=True)
    finally:
        os.environ.pop(RUN_MARK, None)
        lock.release()


def _take(lock: FileLock, home: Installation, record: Path) -> None:
    """Take the lock, or raise an error that names the process that has it."""
    holder: _Holder | None = None
    # The first timeout is not zero: `invoke status` takes the lock for a moment to see whether it
    # is free. The second is for a killed run: a process that it was about to start keeps the lock
    # open until it has become its own program.
    for seconds in (0.1, 2.0):
        try:
            lock.acquire(timeout=seconds, poll_interval=0.02)
        except Timeout:
            if holder := _wait_for_holder(record):
                break
        else:
            return
    who = f"process {holder.pid}" if holder else "another process"
    raise Busy(
        f"{home.root} is in use by {who}",
        f"wait for it to end, or end it (`kill {holder.pid if holder else 'PID'}`)",
    )


def check_unused(home: Installation, would: str) -> None:
    """Refuse to change an environment that a training, kohya's page or TensorBoard runs from.

    Args:
        home: the installation.
        would: the end of the sentence "this would …", for the error.

    Raises:
        Busy: a process runs from one of its environments.
    """
    if users := running_from(home.generations, home.venv):
        raise Busy(
            f"process {users[0]} runs from {home.root}, maybe a training or kohya's page: this would {would}",
            f"wait for it to end, or end it (`invoke stop RUN`, `kill {users[0]}`)",
        )


def holder_pid(home: Installation) -> int | None:
    """The id of the process that holds the lock now: ``None`` if it is free, 0 if it is not known."""
    if not (home.state / "lock").exists():
        return None
    lock = FileLock(home.state / "lock")
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):  # nobody can work in a directory that cannot be written
            return None
        holder = _wait_for_holder(home.state / "holder.json")
        return holder.pid if holder else 0
    lock.release()
    return None


def _wait_for_holder(record: Path) -> _Holder | None:
    """The run that holds the lock now. It writes its record a moment after it took the lock."""
    deadline = time.monotonic() + 1
    while True:
        holder = _read_holder(record)
        if holder and is_alive(holder.pid):
            return holder
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _read_holder(record: Path) -> _Holder | None:
    try:
        return msgspec.json.decode(record.read_bytes(), type=_Holder)
    except (OSError, msgspec.DecodeError):
        return None
