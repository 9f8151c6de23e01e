from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from kohya_mps.core import process
from kohya_mps.core.errors import StepFailed
from kohya_mps.core.process import (
    ProcessResult,
    TailBuffer,
    capture,
    clean_environ,
    end_leftovers,
    end_tree,
    stream,
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


# A child that starts a grandchild, writes the grandchild's id to a file, and waits.
FAMILY = """
    import pathlib, subprocess, sys, time
    below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path({file!r}).write_text(str(below.pid))
    print("started", flush=True)
    time.sleep({sleep})
"""


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not process.is_alive(pid):
            return True
        time.sleep(0.02)
    return False


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written")


LEAKS = [
    "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT",
    "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "CONDA_EXE", "_CE_CONDA", "MAMBA_ROOT_PREFIX", "PIPENV_ACTIVE",
    "POETRY_ACTIVE", "PYENV_VERSION", "__PYVENV_LAUNCHER__", "PIP_TARGET", "PIP_USER", "PIP_PREFIX",
    "PIP_REQUIRE_VIRTUALENV", "UV_PYTHON", "UV_PROJECT_ENVIRONMENT", "UV_SYSTEM_PYTHON", "UV_TARGET",
    "UV_PREFIX", "UV_BREAK_SYSTEM_PACKAGES", "UV_CONSTRAINT", "UV_OVERRIDE", "UV_EXCLUDE",
    "UV_EXCLUDE_NEWER", "UV_NO_BINARY", "UV_NO_BINARY_PACKAGE", "UV_NO_VERIFY_HASHES",
    "UV_REQUIRE_HASHES", "UV_COMPILE_BYTECODE", "UV_TORCH_BACKEND", "UV_PROJECT", "UV_WORKING_DIR",
    "UV_WORKING_DIRECTORY", "UV_VENV_SEED", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR",
    "GIT_NAMESPACE", "GIT_DEFAULT_HASH", "LD_PRELOAD", "DYLD_INSERT_LIBRARIES", "ACCELERATE_USE_CPU",
    "ACCELERATE_MIXED_PRECISION", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
]  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_what_would_leak_another_python_or_repository_is_dropped(name: str) -> None:
    assert name not in clean_environ({name: "x", "PATH": "/bin"})


@pytest.mark.parametrize(
    "name",
    ["HOME", "HTTPS_PROXY", "no_proxy", "ALL_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
     "UV_CACHE_DIR", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_FIND_LINKS", "UV_OFFLINE", "UV_CONFIG_FILE", "UV_LINK_MODE",
     "HF_HOME", "XDG_CACHE_HOME", "TMPDIR", "GIT_SSL_CAINFO", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_COUNT",
     "GIT_CONFIG_KEY_0", "GIT_SSH_COMMAND", "SSH_AUTH_SOCK", "LANG", "OMP_NUM_THREADS", "PYTORCH_MPS_HIGH_WATERMARK_RATIO"],
)  # fmt: skip
def test_network_certificates_caches_and_sources_are_kept(name: str) -> None:
    assert clean_environ({name: "x", "PATH": "/bin"})[name] == "x"


def test_the_active_environment_is_not_on_the_path_and_the_users_site_is_off() -> None:
    path = os.pathsep.join(
        ["/home/me/venv/bin", "/conda/envs/x/bin", "/conda/envs/x/condabin", "/usr/bin", "/home/me/venv2/bin"]
    )
    made = clean_environ({"VIRTUAL_ENV": "/home/me/venv", "CONDA_PREFIX": "/conda/envs/x/", "PATH": path})
    assert made["PATH"] == os.pathsep.join(["/usr/bin", "/home/me/venv2/bin"])
    assert made["PYTHONNOUSERSITE"] == "1"


def test_a_directory_can_be_put_first_and_variables_added() -> None:
    made = clean_environ({"PATH": "/bin"}, path_first=Path("/x/bin"), extra={"PYTHONUNBUFFERED": "1"})
    assert made["PATH"] == f"/x/bin{os.pathsep}/bin"
    assert made["PYTHONUNBUFFERED"] == "1"


def test_children_have_a_clean_environment_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/leak")
    ask = python("import os; print(os.environ.get('PYTHONPATH', 'clean'))")
    assert capture(ask).stdout == "clean\n"
    assert capture(ask, env={"PYTHONPATH": "/meant"}).stdout == "/meant\n"
    pieces: list[bytes] = []
    assert stream(ask, on_output=pieces.append).tail == "clean\n"
    assert b"".join(pieces) == b"clean\n"


@pytest.mark.parametrize("env", [None, {"COLUMNS": "40"}])
def test_captured_output_is_not_wrapped_for_a_terminal(
    env: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    ask = python("import os; print(os.environ.get('COLUMNS'))")
    assert capture(ask, env=env).stdout == "None\n"


def test_capture_returns_both_outputs_and_the_status() -> None:
    done = capture(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"))
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


def test_output_that_is_not_utf8_does_not_stop_a_step() -> None:
    show = python("import sys; sys.stdout.buffer.write(b'a\\xffb')")
    assert capture(show).stdout == "a\ufffdb"
    assert stream(show, on_output=lambda _: None).tail == "a\ufffdb"


def test_a_program_that_is_not_there_is_a_failed_step() -> None:
    with pytest.raises(StepFailed, match="no-such-program: not found"):
        capture(["no-such-program"])
    with pytest.raises(StepFailed, match="no-such-program: not found"):
        stream(["no-such-program"])


def test_children_cannot_wait_for_input() -> None:
    assert capture(python("print(repr(input()))")).returncode == 1
    assert "EOFError" in stream(python("input()"), on_output=lambda _: None).last_line


def test_the_exit_code_and_the_end_of_the_output_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    finished = stream(
        python("import sys\nfor n in range(50000): print(n)\nprint('\\x1b[31mwhy it failed\\x1b[0m')\nsys.exit(5)"),
        log=log, on_output=lambda _: None, keep_bytes=1000,
    )  # fmt: skip
    assert finished.returncode == 5
    assert finished.last_line == "why it failed"
    assert len(finished.tail) < 1000 + 65536
    assert "\n100\n" not in finished.tail
    assert log.read_text().startswith("0\n1\n2\n")
    assert log.read_text().endswith("why it failed\x1b[0m\n")


def test_the_tail_keeps_as_much_as_it_must_and_drops_whole_pieces() -> None:
    tail = TailBuffer(keep_bytes=4)
    assert tail.text() == ""
    tail.append(b"a long first piece")
    assert tail.text() == "a long first piece"
    for piece in (b"bc", b"d"):
        tail.append(piece)
    assert tail.text() == "a long first piecebcd"
    tail.append(b"e")
    assert tail.text() == "bcde"
    tail.append(b"\xff")
    assert tail.text() == "bcde\ufffd"


def test_a_log_is_written_while_the_child_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    seen: list[str] = []
    talk = python("print('first', flush=True); input_ = __import__('time').sleep(0.5); print('second')")
    stream(talk, log=log, on_output=lambda _: seen.append(log.read_text()))
    assert seen[-1] in ("first\n", "first\nsecond\n")
    assert log.read_text() == "first\nsecond\n"


def test_a_process_ended_by_a_signal_is_reported_as_such() -> None:
    finished = stream(python("import os; os.kill(os.getpid(), 9)"), on_output=lambda _: None)
    assert finished.returncode == -signal.SIGKILL
    assert finished.last_line == "(it printed nothing)"


def test_the_last_line_is_the_last_that_says_something() -> None:
    tail = "Resolving\r\x1b[2K100%|####|\r\n\x1b[1merror\x1b[0m: no space\n\n  \n"
    assert ProcessResult(1, tail, 0.0, 0).last_line == "error: no space"


def test_peak_memory_is_that_of_the_child_in_bytes() -> None:
    work = "x = bytearray(600_000_000); x[::4096] = b'1' * len(x[::4096])"
    assert 600e6 < stream(python(work), on_output=lambda _: None).peak_bytes < 1000e6


def test_peak_memory_counts_what_the_child_started() -> None:
    work = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = b\"1\" * 300_000_000'], check=True)"
    assert stream(python(work), on_output=lambda _: None).peak_bytes > 300e6


def test_a_silent_child_is_ended_with_all_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    started = time.monotonic()
    finished = stream(
        python(FAMILY.format(file=str(file), sleep=600)), stall_seconds=1.0, on_output=lambda _: None
    )
    assert finished.stalled
    assert finished.returncode == -signal.SIGTERM
    assert time.monotonic() - started < 20
    assert gone(wait_for(file))


def test_a_child_that_keeps_talking_is_not_ended() -> None:
    # A shell, because it starts at once on a busy machine, too: it talks for longer than the limit.
    talk = ["sh", "-c", "for n in 1 2 3 4 5 6 7 8 9; do echo $n; sleep 0.25; done"]
    finished = stream(talk, stall_seconds=2.0, on_output=lambda _: None)
    assert not finished.stalled
    assert finished.returncode == 0


def test_what_a_child_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    started = time.monotonic()
    finished = stream(python(FAMILY.format(file=str(file), sleep=0)), on_output=lambda _: None)
    assert finished.returncode == 0
    assert finished.tail == "started\n"
    assert time.monotonic() - started < 20
    end_tree([wait_for(file)])


def test_an_interruption_ends_the_whole_tree(tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def interrupt() -> None:
        wait_for(file)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        stream(python(FAMILY.format(file=str(file), sleep=600)), on_output=lambda _: None)
    thread.join()
    assert gone(wait_for(file))


def test_a_failure_of_the_reader_ends_the_child(tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def fail(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        stream(python(FAMILY.format(file=str(file), sleep=600)), on_output=fail)
    assert gone(wait_for(file))


def test_a_process_that_ignores_the_request_to_end_is_killed() -> None:
    deaf = subprocess.Popen(
        python("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(600)"),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert deaf.stdout is not None
    assert deaf.stdout.readline() == b"1\n"
    end_tree([deaf.pid], grace_seconds=0.2)
    assert deaf.wait(10) == -signal.SIGKILL
    deaf.stdout.close()


def test_ending_what_is_gone_already_is_no_error() -> None:
    short = subprocess.Popen(python("pass"))
    short.wait()
    end_tree([short.pid])


def test_a_process_that_ended_is_not_alive_before_it_was_waited_for_either() -> None:
    child = subprocess.Popen(python("input()"), stdin=subprocess.PIPE)
    assert process.is_alive(child.pid)
    child.communicate(b"\n")
    assert not process.is_alive(child.pid)
    zombie = subprocess.Popen(python("pass"))
    assert gone(zombie.pid)
    assert not process.is_alive(zombie.pid)
    zombie.wait()


def test_leftovers_are_found_by_their_mark_alone() -> None:
    sleep = python("import time; time.sleep(600)")
    ours = subprocess.Popen(sleep, env={**os.environ, process.RUN_MARK: "killed-run"})
    theirs = subprocess.Popen(sleep, env={**os.environ, process.RUN_MARK: "another-run"})
    try:
        assert end_leftovers("killed-run") == 1
        assert ours.wait(10) == -signal.SIGTERM
        assert theirs.poll() is None
    finally:
        theirs.kill()
        theirs.wait()


class _Standard:
    """Standard error that remembers bytes, of a terminal or not."""

    def __init__(self, tty: bool) -> None:
        self.buffer = io.BytesIO()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def fileno(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"one\ntwo\n"], b"one\ntwo\n"),
        ([b"10%\r", b"50%\r", b"100%", b"\ndone\n"], b"100%\ndone\n"),
        ([b"10%\r50%\r100%\r\n"], b"100%\n"),
        ([b"half a li", b"ne\n"], b"half a line\n"),
        ([b"line\r", b"\nnext\r\n"], b"line\nnext\n"),
        ([b"no end of line"], b"no end of line\n"),
        ([b"1\r2\r3"], b"3\n"),
        ([], b""),
    ],
)
def test_redrawn_progress_is_one_line_where_nobody_watches(
    pieces: list[bytes], expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = _Standard(tty=False)
    monkeypatch.setattr(sys, "stderr", error)
    code = f"import sys, time\nfor p in {pieces!r}: sys.stdout.buffer.write(p); sys.stdout.flush(); time.sleep(0.05)"
    assert stream(python(code)).tail.encode() == b"".join(pieces)
    assert error.buffer.getvalue() == expected


def _in_a_terminal(code: str) -> str:
    """Run Python code whose three standard files are a pseudo-terminal of 77 columns."""
    ours, theirs = pty.openpty()
    import termios

    termios.tcsetwinsize(theirs, (33, 77))
    child = subprocess.Popen(
        python(code), stdin=theirs, stdout=theirs, stderr=theirs, cwd=Path(__file__).parents[2]
    )
    os.close(theirs)
    seen = b""
    while select.select([ours], [], [], 20)[0]:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert child.wait(20) == 0, seen
    return seen.decode()


_ASK = """
import os, sys
print(sys.stdout.isatty(), sys.stdin.isatty(), *(os.get_terminal_size() if sys.stdout.isatty() else ()))
"""


def test_a_child_draws_its_progress_in_a_terminal_of_our_size_when_we_have_one() -> None:
    code = f"import sys; from kohya_mps.core.process import stream; stream([sys.executable, '-c', {_ASK!r}])"
    assert _in_a_terminal(code).split() == ["True", "False", "77", "33"]


def test_a_child_whose_output_is_logged_has_no_terminal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import pathlib, sys; from kohya_mps.core.process import stream; "
        f"stream([sys.executable, '-c', {_ASK!r}], log=pathlib.Path({str(log)!r}))"
    )
    assert "False False" in _in_a_terminal(code)
    assert log.read_text() == "False False\n"


def test_without_a_terminal_a_child_has_none() -> None:
    assert stream([sys.executable, "-c", _ASK]).tail == "False False\n"


def test_uv_is_the_one_of_the_projects_own_tools() -> None:
    assert capture([process.uv(), "--version"]).stdout.startswith("uv ")


def test_a_missing_uv_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_uv_bin() -> str:
        raise FileNotFoundError("/nowhere/uv")

    monkeypatch.setattr("uv.find_uv_bin", find_uv_bin)
    with pytest.raises(StepFailed, match="/nowhere/uv") as caught:
        process.uv()
    assert "README" in caught.value.fix
