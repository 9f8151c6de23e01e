"""One installation: where its parts lie, and the lock that one run at a time holds."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from .errors import Busy, UsageError
from .process import RUN_MARK, end_leftovers, running_from

STATE = ".kohya-mps"


class Home(msgspec.Struct, frozen=True):
    """The places of an installation, all below ``root`` (``KOHYA_HOME``)."""

    root: Path

    @property
    def state(self) -> Path:
        """Everything of ours that is not the checkout and not the link to the environment."""
        return self.root / STATE

    @property
    def venv(self) -> Path:
        """The link to the active environment."""
        return self.root / "venv"

    @property
    def generations(self) -> Path:
        """The built environments, each in a directory of its own."""
        return self.state / "generations"

    @property
    def verification(self) -> Path:
        """The generated models and images that the training step trains on, and its runs."""
        return self.state / "verification"

    @property
    def spread_config(self) -> Path:
        """The accelerate configuration of trainings with more than one process; absent with one."""
        return self.state / "several.yaml"

    @property
    def moving(self) -> Path:
        """The record of a checkout on its way: while it is there, a run was killed in between."""
        return self.state / "moving-kohya_ss.json"

    @property
    def sd_scripts(self) -> Path:
        """The submodule with the trainers."""
        return self.root / "sd-scripts"


class _Holder(msgspec.Struct, frozen=True):
    """Who holds the installation; ``left`` are the marks of killed runs whose processes may still run."""

    pid: int
    mark: str
    left: tuple[str, ...] = ()


def check_place(home: Home) -> None:
    """Refuse a place that an installation cannot, or must not, be put in.

    Raises:
        UsageError: it is a file, belongs to something else, cannot be written, or is a
            place where another user could swap the programs that we would then run.
    """
    root = home.root
    choose = "choose another place with KOHYA_HOME"
    if os.path.lexists(root) and not root.is_dir():
        raise UsageError(f"{root} is not a directory", choose)
    if root.is_dir():
        strangers = sorted({entry.name for entry in root.iterdir()} - {STATE, "venv", ".DS_Store"})
        if strangers and not (root / ".git").exists() and not home.moving.exists():
            listed = ", ".join(strangers[:5]) + (", …" if len(strangers) > 5 else "")
            raise UsageError(f"{root} is not empty and is no kohya_ss checkout: it holds {listed}", choose)
    existing = root
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"{existing} is not a directory, so {root} cannot be made", choose)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{existing} is not writable for you, so {root} cannot be used", choose)
    ours = (home.venv / "bin", home.venv, home.generations, home.state, root)
    for place in ours:
        if place.exists() and place.stat().st_uid not in (0, os.getuid()):
            mine = shlex.join(["sudo", "chown", "-R", pwd.getpwuid(os.getuid()).pw_name, str(place)])
            raise UsageError(
                f"{place} belongs to another user, who could replace the programs that run from {root}",
                f"if it is yours, `{mine}`; else {choose}",
            )
    for place in (*ours, *root.parents):
        if place.exists() and (reason := _shared_with_others(place)):
            raise UsageError(
                f"{place} {reason}: another user could replace the programs that run from {root}",
                f"`chmod go-w {shlex.quote(str(place))}`, or {choose}",
            )


def _shared_with_others(place: Path) -> str:
    mode = place.stat()
    if mode.st_mode & stat.S_ISVTX:
        return ""
    if mode.st_mode & stat.S_IWOTH:
        return "can be written by every user"
    if mode.st_mode & stat.S_IWGRP and mode.st_gid not in (0, _private_group()):
        return "can be written by its group"
    return ""


def _private_group() -> int | None:
    """The group that many systems make for one user alone: as private as the user."""
    import grp

    user = pwd.getpwuid(os.getuid())
    try:
        return user.pw_gid if grp.getgrgid(user.pw_gid).gr_name == user.pw_name else None
    except KeyError:
        return None


@contextlib.contextmanager
def held(home: Home) -> Iterator[None]:
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
        write(record, msgspec.json.encode(_Holder(os.getpid(), mark, left)))
        for old in left:
            end_leftovers(old)
        os.environ[RUN_MARK] = mark
        write(record, msgspec.json.encode(_Holder(os.getpid(), mark)))
        yield
        record.unlink(missing_ok=True)
    finally:
        os.environ.pop(RUN_MARK, None)
        lock.release()


def _take(lock: FileLock, home: Home, record: Path) -> None:
    """Take the lock, or name who has it."""
    holder: _Holder | None = None
    # First not zero: `invoke status` takes the lock for a moment to see whether somebody has
    # it. Then, while nobody alive has it, longer: a process that a killed run was about to
    # start keeps the lock open until it has become its own program.
    for seconds in (0.1, 2.0):
        try:
            lock.acquire(timeout=seconds, poll_interval=0.02)
        except Timeout:
            if holder := _present_holder(record):
                break
        else:
            return
    who = f"process {holder.pid}" if holder else "another process"
    raise Busy(
        f"{home.root} is in use by {who}",
        f"wait for it to end, or end it (`kill {holder.pid if holder else 'PID'}`)",
    )


def check_unused(home: Home, would: str) -> None:
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


def running(home: Home) -> int | None:
    """The process that holds the installation now, if any."""
    if not (home.state / "lock").exists():
        return None
    lock = FileLock(home.state / "lock")
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):  # a home that cannot be written has nobody at work in it
            return None
        holder = _present_holder(home.state / "holder.json")
        return holder.pid if holder else 0
    lock.release()
    return None


def _present_holder(record: Path) -> _Holder | None:
    """The run that holds the lock now; it writes its record a moment after it took the lock."""
    deadline = time.monotonic() + 1
    while True:
        holder = _read_holder(record)
        if holder and _alive(holder.pid):
            return holder
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _read_holder(record: Path) -> _Holder | None:
    try:
        return msgspec.json.decode(record.read_bytes(), type=_Holder)
    except (OSError, msgspec.DecodeError):
        return None


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step: readers see the old or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name: what a killed run left is replaced and does not pile up.
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        with new.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(0o644)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def link(path: Path, target: Path) -> None:
    """Point the symbolic link ``path`` at ``target`` in one step, relative to its directory."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target, path.parent))
    new.replace(path)
