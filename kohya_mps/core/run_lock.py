"""The lock that one run at a time holds on an installation, and what runs from it."""

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
    """Who holds the installation; ``left`` are the marks of killed runs whose processes may still run."""

    pid: int
    mark: str
    left: tuple[str, ...] = ()


@contextlib.contextmanager
def exclusive_lock(home: Installation) -> Iterator[None]:
    """Hold the installation; what a killed run left running is ended first.

    Raises:
        Busy: another run holds it; its end is not waited for.
    """
    home.state.mkdir(parents=True, exist_ok=True)
    record = home.state / "holder.json"
    lock = FileLock(home.state / "lock")
    _take(lock, home, record)
    try:
        killed = _read_holder(record)
        left = (killed.mark, *killed.left) if killed else ()
        mark = uuid.uuid4().hex
        # Before anything that takes time: a second run has to name this process.
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
    """Take the lock, or name who has it."""
    holder: _Holder | None = None
    # First not zero: `invoke status` takes the lock for a moment to see whether somebody has
    # it. Then, while nobody alive has it, longer: a process that a killed run was about to
    # start keeps the lock open until it has become its own program.
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
    """Refuse to change what a training, kohya's page or TensorBoard is running from.

    Args:
        would: what would be done to it, as it is put to the person.

    Raises:
        Busy: a process runs from one of the home's environments.
    """
    if users := running_from(home.generations, home.venv):
        raise Busy(
            f"process {users[0]} runs from {home.root}, maybe a training or kohya's page: this would {would}",
            f"wait for it to end, or end it (`invoke stop RUN`, `kill {users[0]}`)",
        )


def holder_pid(home: Installation) -> int | None:
    """The process that holds the installation now, if any."""
    if not (home.state / "lock").exists():
        return None
    lock = FileLock(home.state / "lock")
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):  # a home that cannot be written has nobody at work in it
            return None
        holder = _wait_for_holder(home.state / "holder.json")
        return holder.pid if holder else 0
    lock.release()
    return None


def _wait_for_holder(record: Path) -> _Holder | None:
    """The run that holds the lock now; it writes its record a moment after it took the lock."""
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
