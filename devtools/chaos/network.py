"""Servers that stop answering, at once or in the middle."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kohya_mps.core.process import capture, clean_environ
from kohya_mps.core.report import Status

from .testbed import STALL_SECONDS, Attempts, CannotTry, Row, Testbed, expect

#: How long uv waits for a silent package index, in seconds; it tries twice.
INDEX_SECONDS = 2

#: How long a checkout may take with a silent server, on a busy machine, in seconds.
GIVEN_UP_SECONDS = STALL_SECONDS * 2 + 10

#: What a server does with one connection.
Answer = Callable[[socket.socket], None]


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[int]:
    """A server on this machine that gives every connection to ``answer`` and never closes one itself.

    Yields:
        Its port.
    """
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the server was closed
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    threading.Thread(target=_quietly, args=(answer, connection), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            with contextlib.suppress(OSError):  # macOS does not shut down what only listens
                server.shutdown(socket.SHUT_RDWR)
            for connection in connections:
                connection.close()


def _quietly(answer: Answer, connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side hung up
        answer(connection)


def silence(_connection: socket.socket) -> None:
    """Send nothing, and keep the connection open."""


def half_a_page(connection: socket.socket) -> None:
    """Begin to answer an HTTP request, and stop in the middle."""
    connection.recv(65536)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100000\r\n\r\n"
    connection.sendall(head + b"<!DOCTYPE html><html><body>")


class Relay:
    """Forwards what a server sends up to ``limit`` bytes, and then nothing more."""

    def __init__(self, port: int) -> None:
        self.port, self.limit, self.passed = port, sys.maxsize, 0

    def __call__(self, connection: socket.socket) -> None:
        """Serve one connection."""
        with socket.create_connection(("127.0.0.1", self.port)) as server:

            def forward_requests() -> None:
                while request := connection.recv(65536):
                    server.sendall(request)

            threading.Thread(
                target=_quietly, args=(lambda _: forward_requests(), connection), daemon=True
            ).start()
            while (left := self.limit - self.passed) > 0 and (piece := server.recv(min(left, 4096))):
                connection.sendall(piece)
                self.passed += len(piece)
            if self.passed < self.limit:
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def git_server(repository: Path) -> Iterator[int]:
    """Git's own server for a repository, on this machine alone.

    Yields:
        Its port.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["git", "daemon", "--reuseaddr", "--listen=127.0.0.1", f"--port={port}", "--export-all"]
    with subprocess.Popen(
        [*command, f"--base-path={repository.parent}", str(repository.parent)],
        stderr=subprocess.DEVNULL,
        env=clean_environ(
            extra={"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        ),
        start_new_session=True,
    ) as server:
        try:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and server.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            else:
                raise CannotTry("git has no daemon here")
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)


def network_git(testbed: Testbed) -> Row:
    """Have the git server stop answering: at once, and at several points of a download."""
    attempts = Attempts("network stalls, git", testbed)
    with attempts.attempt("says nothing at all"), serving(silence) as port:
        _stalled_checkout(testbed, f"http://127.0.0.1:{port}/x.git")
    testbed.install()
    source = testbed.root / "served.git"
    copied = capture(["git", "clone", "--quiet", "--bare", testbed.home.root, source])
    kept = capture(["git", "-C", source, "branch", "--force", "served", testbed.environ["KOHYA_COMMIT"]])
    expect(copied.returncode == 0 == kept.returncode, f"nothing to serve: {copied.stderr}{kept.stderr}")
    with git_server(source) as upstream:
        relay = Relay(upstream)
        with serving(relay) as port:
            url = f"git://127.0.0.1:{port}/{source.name}"
            testbed.remove()
            ran = testbed.invoke("clone", KOHYA_REPO_URL=url)
            expect(relay.passed, f"the relay saw no request: {ran.last_lines}")
            whole = relay.passed
            for share in (0.02, 0.5, 0.95):
                with attempts.attempt(f"says nothing after {share:.0%} of {whole / 1e3:.0f} kB"):
                    relay.limit, relay.passed = int(whole * share), 0
                    _stalled_checkout(testbed, url)
    shutil.rmtree(source)
    return attempts.done(
        f"silence allowed for {STALL_SECONDS:g} s: exit 1, the checkout step over within {GIVEN_UP_SECONDS:g} s, the "
        "address named, environment, configuration and smoke "
        "check done; the rerun with the network ends good"
    )


def _stalled_checkout(testbed: Testbed, url: str) -> None:
    testbed.remove()
    ran, report = testbed.report(*testbed.quick_setup, KOHYA_REPO_URL=url)
    row = report.check("checkout")
    expect(ran.code == 1 and row and row.status is Status.FAIL, f"ended with {ran.code}: {ran.last_lines}")
    expect(row and url in row.detail, f"does not name the address: {row}")
    took = report.seconds.get("checkout", 0.0)
    expect(took < GIVEN_UP_SECONDS, f"the checkout took {took:.0f} s to fail")
    for name in ("environment", "configuration", "smoke check"):
        expect(report.status(name) is Status.PASS, f"{name} was not done: {report.status(name)}")
    testbed.assert_recovers()


def only_index(port: int) -> dict[str, str]:
    """The variables with which uv uses only the index at ``port``, and gives up soon."""
    return {
        "UV_DEFAULT_INDEX": f"http://127.0.0.1:{port}/simple/",
        "UV_HTTP_TIMEOUT": str(INDEX_SECONDS),
        "UV_HTTP_RETRIES": "1",
        "NO_PROXY": "127.0.0.1",
        # Other sources that the machine has might answer.
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "UV_FIND_LINKS": "",
        "UV_OFFLINE": "0",
        "PIP_EXTRA_INDEX_URL": "",
    }


def network_index(testbed: Testbed) -> Row:
    """Have the package index stop answering while uv's cache is empty."""
    attempts = Attempts("network stalls, package index", testbed)
    for what, answer in (("says nothing at all", silence), ("stops in the middle of a page", half_a_page)):
        with attempts.attempt(what), serving(answer) as port:
            testbed.remove()
            empty = testbed.root / "empty-cache"
            variables = only_index(port)
            ran, report = testbed.report(*testbed.quick_setup, UV_CACHE_DIR=str(empty), **variables)
            ran.assert_code(1)
            failed = report.status("environment") is Status.FAIL and report.status("checkout") is Status.PASS
            expect(failed, f"not the environment alone failed: {ran.last_lines}")
            took = report.seconds.get("environment", 0.0)
            expect(took < INDEX_SECONDS * 20, f"the environment took {took:.0f} s to fail")
            expect(not os.path.lexists(testbed.home.venv), "something half-built is active")
            testbed.assert_no_leftovers()
            testbed.assert_recovers()
            shutil.rmtree(empty, ignore_errors=True)
    return attempts.done(
        "an empty cache: exit 1 in time, the checkout done, nothing half-built; the rerun with the network ends good"
    )
