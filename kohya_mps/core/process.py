"""The one place that starts processes: in a scrubbed environment, and never left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from .errors import StepFailed
from .text import strip_ansi

if TYPE_CHECKING:
    import psutil

# Marks every process of one run, so that what a killed run left behind can be found.
RUN_MARK = "KOHYA_MPS_RUN"

# How often a silent child is looked after, in seconds.
_POLL_SECONDS = 0.25

# What changes which code a child imports, where pip and uv put things, or which repository
# git works on. What configures the network, certificates, caches and package sources stays.
_DROPPED_PREFIXES = ("PYTHON", "VIRTUAL_ENV", "CONDA", "_CE_", "MAMBA", "PIP_", "ACCELERATE_", "DYLD_")
_DROPPED = {
    "LD_PRELOAD", "PIPENV_ACTIVE", "POETRY_ACTIVE", "PYENV_VERSION", "__PYVENV_LAUNCHER__",
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR", "GIT_NAMESPACE",
    "UV_PYTHON", "UV_PROJECT_ENVIRONMENT", "UV_SYSTEM_PYTHON", "UV_TARGET", "UV_PREFIX",
    "UV_BREAK_SYSTEM_PACKAGES", "UV_CONSTRAINT", "UV_OVERRIDE", "UV_EXCLUDE", "UV_EXCLUDE_NEWER",
    "UV_NO_BINARY", "UV_NO_BINARY_PACKAGE", "UV_NO_VERIFY_HASHES", "UV_REQUIRE_HASHES", "UV_COMPILE_BYTECODE",
    "UV_TORCH_BACKEND", "UV_PROJECT", "UV_WORKING_DIR", "UV_WORKING_DIRECTORY", "UV_VENV_SEED",
    "GIT_DEFAULT_HASH",
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


class ProcessResult(msgspec.Struct, frozen=True):
    """How a process ended.

    ``tail`` is the end of what it printed, ``seconds`` its wall time and ``peak_bytes`` the
    largest resident memory of it or any process it started and waited for; never less than
    what this process had when it started it.
    """

    returncode: int
    tail: str
    seconds: float
    peak_bytes: int
    stalled: bool = False

    @property
    def last_line(self) -> str:
        """The last thing it said, which for most programs is the reason it failed."""
        plain = strip_ansi(self.tail).replace("\r", "\n")
        lines = [line.strip() for line in plain.splitlines() if line.strip()]
        return lines[-1] if lines else "(it printed nothing)"


def clean_environ(
    environ: Mapping[str, str] | None = None,
    *,
    path_first: Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment for a child: nothing that leaks another Python's things into it.

    Args:
        environ: what to start from; this process's environment when not given.
        path_first: a directory to put first on ``PATH``, such as the environment's ``bin``.
        extra: variables to add.
    """
    source = dict(os.environ if environ is None else environ)
    active = [source[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if source.get(name)]
    kept = {
        name: value
        for name, value in source.items()
        if name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES)
    }
    path = [
        entry
        for entry in source.get("PATH", os.defpath).split(os.pathsep)
        if not any(Path(entry).is_relative_to(root) for root in active)
    ]
    kept["PATH"] = os.pathsep.join(([str(path_first)] if path_first else []) + path)
    kept["PYTHONNOUSERSITE"] = "1"
    return kept | dict(extra or {})


def capture(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a short command and return its output; the caller judges the exit status."""
    environ = clean_environ() if env is None else dict(env)
    environ.pop("COLUMNS", None)  # uv would wrap its sentences, and they are read here
    try:
        return subprocess.run(
            [os.fspath(part) for part in argv],
            cwd=cwd,
            env=environ,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError as error:
        raise StepFailed(f"{error.filename or argv[0]}: not found") from error


def stream(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    stall_seconds: float | None = None,
    on_output: Callable[[bytes], None] | None = None,
    keep_bytes: int = 64 * 1024,
) -> ProcessResult:
    """Run a command and pass on what it prints, as it prints it, to standard error.

    Args:
        argv: program and arguments; never a string for a shell.
        cwd: where it runs.
        env: its whole environment; the scrubbed one when not given.
        log: a file that receives everything it prints.
        stall_seconds: end it when it has printed nothing for this long.
        on_output: receives each piece instead of standard error.
        keep_bytes: how much of the end is kept in :attr:`ProcessResult.tail`.

    The child is gone when this returns or raises. So is all it started, when it is ended from
    here; what it left running when it ended by itself is not waited for.
    """
    started = time.monotonic()
    command = [os.fspath(part) for part in argv]
    show = on_output or _OutputForwarder()
    tail: deque[bytes] = deque()
    kept = 0
    last_output = started
    stalled = False
    with contextlib.ExitStack() as stack:
        log_file: BinaryIO | None = stack.enter_context(log.open("wb")) if log else None
        ours, theirs = _terminal() if on_output is None and log is None and sys.stderr.isatty() else os.pipe()
        stack.callback(os.close, ours)
        try:
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env=clean_environ() if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
            )
        except FileNotFoundError as error:
            raise StepFailed(f"{error.filename or command[0]}: not found") from error
        finally:
            os.close(theirs)
        reaped = 0
        try:
            while True:
                if not select.select([ours], [], [], _POLL_SECONDS)[0]:
                    reaped, status, usage = os.wait4(child.pid, os.WNOHANG)
                    if reaped:
                        break  # what it left running may hold the pipe open for ever
                    if stall_seconds and not stalled and time.monotonic() - last_output > stall_seconds:
                        stalled = True
                        end_tree([child.pid])
                    continue
                piece = _read(ours)
                if not piece:
                    break
                last_output = time.monotonic()
                show(piece)
                if log_file:
                    log_file.write(piece)
                    log_file.flush()
                tail.append(piece)
                kept += len(piece)
                while len(tail) > 1 and kept - len(tail[0]) >= keep_bytes:
                    kept -= len(tail.popleft())
            if not reaped:
                _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            end_tree([child.pid])
            child.wait()
            raise
        finally:
            if isinstance(show, _OutputForwarder):
                show.finish()
    return ProcessResult(
        returncode=child.returncode,
        tail=b"".join(tail).decode(errors="replace"),
        seconds=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        stalled=stalled,
    )


def start(
    argv: Sequence[str | os.PathLike[str]], *, cwd: Path, env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a command that may outlive this process; what it prints is appended to ``log``.

    It gets a session of its own: neither the terminal's Ctrl-C nor its end reach it.
    """
    command = [os.fspath(part) for part in argv]
    with log.open("ab") as output:
        try:
            return subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise StepFailed(f"{error.filename or command[0]}: not found") from error


def uv() -> str:
    """The uv that came with the project's own tools."""
    from uv import find_uv_bin

    try:
        return os.fspath(find_uv_bin())
    except FileNotFoundError as error:
        raise StepFailed(
            f"uv is not where its package says: {error}",
            "install the project's tools again: README, Install",
        ) from error


def end_tree(pids: Iterable[int], grace_seconds: float = 5.0) -> None:
    """End processes and everything below them: ask first, then insist."""
    import psutil

    tree: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            tree += [*root.children(recursive=True), root]

    def alive() -> list[psutil.Process]:
        # Not psutil's own wait: it would reap our child, whose exit status is still wanted.
        return [process for process in tree if process.is_running() and is_alive(process.pid)]

    for process in alive():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + grace_seconds
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in alive():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for (a zombie) does not."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # it is there, and is somebody else's
        return True


def end_leftovers(mark: str) -> int:
    """End what a killed run left running, found by the mark in its environment.

    Returns:
        How many processes were ended.
    """
    left = find_processes(lambda process: process.environ().get(RUN_MARK) == mark)
    end_tree(process.pid for process in left)
    return len(left)


def running_from(*directories: Path) -> list[int]:
    """The processes whose program or script, as they were started, lies in one of these directories."""
    prefixes = tuple(f"{directory}{os.sep}" for directory in directories)
    found = find_processes(lambda process: any(part.startswith(prefixes) for part in process.cmdline()[:2]))
    return sorted(process.pid for process in found)


def find_processes(wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """The processes besides this one that are wanted, of those that may be looked at."""
    import psutil

    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and wanted(process):
                found.append(process)
    return found


class _OutputForwarder:
    """Passes a child's output on to standard error.

    In a file or a CI log a progress bar would be written out once a redraw; there, only
    what was left standing at the end of each line is passed on.
    """

    def __init__(self) -> None:
        self._whole = sys.stderr.isatty()
        self._line = b""

    def __call__(self, piece: bytes) -> None:
        if not self._whole:
            *lines, self._line = (self._line + piece).replace(b"\r\n", b"\n").split(b"\n")
            self._line = self._line[self._line.rfind(b"\r", 0, -1) + 1 :]
            piece = b"".join(line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n" for line in lines)
        sys.stderr.buffer.write(piece)
        sys.stderr.buffer.flush()

    def finish(self) -> None:
        """Pass on a last line that has no end: often the reason why a program failed."""
        if self._line:
            self(b"\n")


def _terminal() -> tuple[int, int]:
    """A pseudo-terminal of our terminal's size: programs draw their progress bars in it."""
    import fcntl
    import termios

    ours, theirs = os.openpty()
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    return ours, theirs


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError as error:
        if error.errno == errno.EIO:  # Linux: how the end of a pseudo-terminal shows
            return b""
        raise
