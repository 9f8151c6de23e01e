"""The one module that starts processes: in a clean environment, and never left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from .errors import StepFailed
from .text import strip_ansi

if TYPE_CHECKING:
    import psutil

# The variable that marks every process of one run, so that leftovers of a killed run can be found.
RUN_MARK = "KOHYA_MPS_RUN"

# How often a silent child is checked, in seconds.
_POLL_SECONDS = 0.25

# Variables that change which code a child imports, where pip and uv install, or which repository
# git works on. Variables for the network, certificates, caches and package sources are kept.
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

    ``tail`` is the end of its output, ``seconds`` its wall time, ``stalled`` whether it was
    ended because it was silent. ``peak_bytes`` is the largest resident memory of the process
    or of any that it started and waited for; it is never less than the memory that this
    process had when it started the other.
    """

    returncode: int
    tail: str
    seconds: float
    peak_bytes: int
    stalled: bool = False

    @property
    def last_line(self) -> str:
        """The last line of its output; most programs say there why they failed."""
        plain = strip_ansi(self.tail).replace("\r", "\n")
        lines = [line.strip() for line in plain.splitlines() if line.strip()]
        return lines[-1] if lines else "(it printed nothing)"


def clean_environ(
    environ: Mapping[str, str] | None = None,
    *,
    path_first: Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment variables for a child, without those that would leak another Python into it.

    Args:
        environ: the variables to clean; those of this process when left out.
        path_first: a directory to put first on ``PATH``, such as the ``bin`` of the environment.
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
    """Run a short command and return its output; the caller judges the exit status.

    Args:
        argv: program and arguments.
        cwd: its working directory.
        env: its whole environment; :func:`clean_environ` when left out.

    Raises:
        StepFailed: there is no such program.
    """
    environ = clean_environ() if env is None else dict(env)
    environ.pop("COLUMNS", None)  # uv would wrap its sentences, and they are read here
    with _not_found_is_a_failed_step(argv):
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
    """Run a command and show what it prints, as it prints it, on standard error.

    Takes what :func:`capture` takes, a file for the output (``log``), a time after which a
    silent child is ended (``stall_seconds``), a function that gets the output instead of
    standard error (``on_output``), and how much of it the result has (``keep_bytes``).

    The child has ended when this returns or raises. If it was ended from here, everything
    that it started has ended, too; what it left running itself is not waited for.
    """
    started = time.monotonic()
    tail = TailBuffer(keep_bytes)
    with contextlib.ExitStack() as stack:
        show = on_output or stack.enter_context(contextlib.closing(_OutputForwarder())).write
        receivers = [show, tail.append]
        if log:
            receivers.append(_writer(stack.enter_context(log.open("wb"))))
        in_terminal = on_output is None and log is None and sys.stderr.isatty()
        child, output = _spawn(argv, cwd, env, in_terminal)
        stack.callback(os.close, output)
        ended = _pump(child, output, receivers, stall_seconds)
    return ProcessResult(
        ended.returncode, tail.text(), time.monotonic() - started, ended.peak_bytes, ended.stalled
    )


def start(
    argv: Sequence[str | os.PathLike[str]], *, cwd: Path, env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a command that may outlive this process; its output is appended to ``log``.

    It gets a session of its own, so that neither Ctrl-C nor the end of the terminal reaches it.
    """
    with log.open("ab") as output, _not_found_is_a_failed_step(argv):
        return subprocess.Popen(
            [os.fspath(part) for part in argv],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class TailBuffer:
    """Keeps the end of an output: at least ``keep_bytes`` of it, in the pieces that came."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._pieces: deque[bytes] = deque()
        self._size = 0

    def append(self, piece: bytes) -> None:
        """Add a piece, and drop the oldest ones that are no longer needed."""
        self._pieces.append(piece)
        self._size += len(piece)
        while self._size - len(self._pieces[0]) >= self._keep_bytes and len(self._pieces) > 1:
            self._size -= len(self._pieces.popleft())

    def text(self) -> str:
        """The end of the output; bytes that are not UTF-8 are replaced."""
        return b"".join(self._pieces).decode(errors="replace")


class _Ended(msgspec.Struct, frozen=True):
    returncode: int
    peak_bytes: int
    stalled: bool


def _spawn(
    argv: Sequence[str | os.PathLike[str]],
    cwd: Path | None,
    env: Mapping[str, str] | None,
    in_terminal: bool,
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a child, and return it with the descriptor that its output can be read from."""
    ours, theirs = _terminal() if in_terminal else os.pipe()
    try:
        with _not_found_is_a_failed_step(argv):
            child = subprocess.Popen(
                [os.fspath(part) for part in argv],
                cwd=cwd,
                env=clean_environ() if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
            )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return child, ours


def _pump(
    child: subprocess.Popen[bytes],
    output: int,
    receivers: Sequence[Callable[[bytes], None]],
    stall_seconds: float | None,
) -> _Ended:
    """Pass each piece of a child's output to the receivers, until the child has ended."""
    last_output = time.monotonic()
    stalled = False
    ended = 0
    try:
        while not ended:
            if select.select([output], [], [], _POLL_SECONDS)[0]:
                piece = _read(output)
                # At the end of the output the child may have closed it and still run.
                if not piece:
                    ended, status, usage = os.wait4(child.pid, 0)
                    break
                last_output = time.monotonic()
                for receive in receivers:
                    receive(piece)
                continue
            # What the child left running may hold the pipe open for ever.
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            if not ended and stall_seconds and not stalled and time.monotonic() - last_output > stall_seconds:
                stalled = True
                end_tree([child.pid])
        child.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        end_tree([child.pid])
        child.wait()
        raise
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _Ended(child.returncode, peak_bytes, stalled)


def _writer(file: BinaryIO) -> Callable[[bytes], None]:
    """A receiver that writes each piece to a file at once, where others may follow it."""

    def write(piece: bytes) -> None:
        file.write(piece)
        file.flush()

    return write


@contextlib.contextmanager
def _not_found_is_a_failed_step(argv: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StepFailed(f"{error.filename or argv[0]}: not found") from error


def uv() -> str:
    """The uv that was installed with this project's tools."""
    from uv import find_uv_bin

    try:
        return os.fspath(find_uv_bin())
    except FileNotFoundError as error:
        raise StepFailed(
            f"uv is missing from the project's tools: {error}",
            "install the project's tools again: README, Install",
        ) from error


def end_tree(pids: Iterable[int], grace_seconds: float = 5.0) -> None:
    """End processes and all their descendants: terminate them, and kill what is left after the grace."""
    import psutil

    tree: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            tree += [*root.children(recursive=True), root]

    def alive() -> list[psutil.Process]:
        # psutil's own wait would reap a child of ours, whose exit status is still to be read.
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
    except psutil.AccessDenied:  # it runs, and belongs to another user
        return True


def end_leftovers(mark: str) -> int:
    """End the processes of a killed run, which have its mark in their environment.

    Returns:
        The number of processes.
    """
    left = find_processes(lambda process: process.environ().get(RUN_MARK) == mark)
    end_tree(process.pid for process in left)
    return len(left)


def running_from(*directories: Path) -> list[int]:
    """The ids of the processes whose program or script is in one of these directories."""
    prefixes = tuple(f"{directory}{os.sep}" for directory in directories)
    found = find_processes(lambda process: any(part.startswith(prefixes) for part in process.cmdline()[:2]))
    return sorted(process.pid for process in found)


def find_processes(matches: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """The processes that match, except this one and those that may not be inspected."""
    import psutil

    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and matches(process):
                found.append(process)
    return found


class _OutputForwarder:
    """Forwards a child's output to standard error.

    In a terminal it is forwarded as it is. In a file or a CI log each redraw of a progress bar
    would become text; there, only what remains of each line at its end is forwarded.
    """

    def __init__(self) -> None:
        self._in_terminal = sys.stderr.isatty()
        self._line = b""

    def write(self, piece: bytes) -> None:
        """Forward a piece of output."""
        if not self._in_terminal:
            *lines, self._line = (self._line + piece).replace(b"\r\n", b"\n").split(b"\n")
            self._line = self._line[self._line.rfind(b"\r", 0, -1) + 1 :]
            piece = b"".join(line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n" for line in lines)
        sys.stderr.buffer.write(piece)
        sys.stderr.buffer.flush()

    def close(self) -> None:
        """Forward a last line without an end: often it says why a program failed."""
        if self._line:
            self.write(b"\n")


def _terminal() -> tuple[int, int]:
    """A pseudo-terminal as large as our terminal, so that programs draw progress bars that fit."""
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
        if error.errno == errno.EIO:  # the end of a pseudo-terminal on Linux
            return b""
        raise
