"""What starting the web page costs."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.process import RUN_MARK, end_leftovers, stream
from kohya_mps.core.settings import ROOT, Settings
from kohya_mps.gui.address import LOOPBACK, Address
from kohya_mps.install import accelerate_launch
from kohya_mps.install.generations import installed

from .comparison import Comparison, medians, own_environ, tool


def until_it_answers(settings: Settings, _scratch: Path, times: int) -> list[Comparison]:
    """Start the page, and wait until it answers."""
    home = Installation(settings.home)
    generation = installed(home)
    if not generation.has_gui():
        raise UsageError(f"{home.root} has no web page", "`invoke setup --gui` installs it")
    address = Address(LOOPBACK, _free_port())
    output: list[bytes] = []

    def ours() -> float:
        # It asks the page itself; a second request would have the page answer twice.
        output.clear()
        command = [tool("invoke"), "--search-root", str(ROOT), "gui", "--port", str(address.port)]
        announced = f"  {address.url}\n".encode()
        environ = own_environ(KOHYA_HOME=str(home.root))
        return seconds_until(lambda: announced in b"".join(output), command, environ, home.root, output)

    def bare() -> float:
        command = [str(generation.python), "kohya_gui.py", "--listen", address.host]
        command += ["--server_port", str(address.port), "--headless", "--noverify"]
        environ = accelerate_launch.environ(generation) | {"GRADIO_ANALYTICS_ENABLED": "False"}
        return seconds_until(address.answers, command, environ, home.root, output)

    against = "python kohya_gui.py of the same environment"
    return [Comparison("invoke gui until it answers", against, medians(min(times, 3), ours, bare), "s", 1.1)]


def seconds_until(
    ready: Callable[[], bool],
    command: Sequence[str],
    environ: Mapping[str, str],
    cwd: Path,
    output: list[bytes],
) -> float:
    """Start a program, and end it and everything that it started once it is ready.

    Args:
        ready: asked every twentieth of a second.
        command: the program.
        environ: its whole environment.
        cwd: its working directory.
        output: what it prints is appended here.

    Raises:
        StepFailed: it ended before it was ready.
    """
    mark, ended, found = uuid.uuid4().hex, threading.Event(), list[float]()
    started = time.monotonic()

    def watch() -> None:
        while not ready():
            if ended.wait(0.05):
                return
        found.append(time.monotonic() - started)
        end_leftovers(mark)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    done = stream(command, cwd=cwd, env={**environ, RUN_MARK: mark}, on_output=output.append)
    ended.set()
    watcher.join()
    if not found:
        raise StepFailed(f"{' '.join(command[:3])} … ended with {done.returncode}: {done.last_line}")
    return found[0]


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])
