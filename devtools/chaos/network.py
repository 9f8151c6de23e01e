"""Servers that stop answering, at once or half-way."""

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

#: A package index may be silent for this long in the tries that need one, in seconds, twice.
INDEX_SECONDS = 2

#: How long a checkout may take that meets such silence, on a busy machine, in seconds.
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
    """Say nothing, and keep the line open."""


def half_a_page(connection: socket.socket) -> None:
    """Begin to answer a request over HTTP, and stop in the middle."""
    connection.recv(65536)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100000\r\n\r\n"
    connection.sendall(head + b"<!DOCTYPE html><html><body>")


class Relay:
    """Passes on what a server sends until ``limit`` bytes, then says nothing more."""

    def __init__(self, port: int) -> None:
        self.port, self.limit, self.passed = port, sys.maxsize, 0

    def __call__(self, connection: socket.socket) -> None:
        """Serve one connection."""
        with socket.create_connection(("127.0.0.1", self.port)) as server:

            def ask() -> None:
                while asked := connection.recv(65536):
                    server.sendall(asked)

            threading.Thread(target=_quietly, args=(lambda _: ask(), connection), daemon=True).start()
            while (room := self.limit - self.passed) > 0 and (piece := server.recv(min(room, 4096))):
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


def network_git(place: Testbed) -> Row:
    """A git server that stops answering: at once, and at several points of a download."""
    row = Attempts("network stalls, git")
    with row.attempt("says nothing at all", place), serving(silence) as port:
        _stalled_checkout(place, f"http://127.0.0.1:{port}/x.git")
    place.install()
    source = place.root / "served.git"
    copied = capture(["git", "clone", "--quiet", "--bare", place.home.root, source])
    kept = capture(["git", "-C", source, "branch", "--force", "served", place.environ["KOHYA_COMMIT"]])
    expect(copied.returncode == 0 == kept.returncode, f"nothing to serve: {copied.stderr}{kept.stderr}")
    with git_server(source) as upstream:
        relay = Relay(upstream)
        with serving(relay) as port:
            url = f"git://127.0.0.1:{port}/{source.name}"
            place.remove()
            ran = place.invoke("clone", KOHYA_REPO_URL=url)
            expect(relay.passed, f"the relay was not asked: {ran.said}")
            whole = relay.passed
            for share in (0.02, 0.5, 0.95):
                with row.attempt(f"says nothing after {share:.0%} of {whole / 1e3:.0f} kB", place):
                    relay.limit, relay.passed = int(whole * share), 0
                    _stalled_checkout(place, url)
    shutil.rmtree(source)
    return row.done(
        f"silence allowed for {STALL_SECONDS:g} s: exit 1, the checkout step over within {GIVEN_UP_SECONDS:g} s, the "
        "address named, environment, configuration and smoke "
        "check done; the rerun with the network ends good"
    )


def _stalled_checkout(place: Testbed, url: str) -> None:
    place.remove()
    ran, report = place.told("setup", "--no-train-step", KOHYA_REPO_URL=url)
    row = next((check for check in report.checks if check.name == "checkout"), None)
    expect(ran.code == 1 and row and row.status is Status.FAIL, f"ended with {ran.code}: {ran.said}")
    expect(row and url in row.detail, f"does not name the address: {row}")
    took = report.seconds.get("checkout", 0.0)
    expect(took < GIVEN_UP_SECONDS, f"the checkout took {took:.0f} s to fail")
    for name in ("environment", "configuration", "smoke check"):
        expect(report.status(name) is Status.PASS, f"{name} was not done: {report.status(name)}")
    place.assert_recovers()


def only_index(port: int) -> dict[str, str]:
    """The variables with which uv asks the server at ``port`` and nothing else, and gives up soon."""
    return {
        "UV_DEFAULT_INDEX": f"http://127.0.0.1:{port}/simple/",
        "UV_HTTP_TIMEOUT": str(INDEX_SECONDS),
        "UV_HTTP_RETRIES": "1",
        "NO_PROXY": "127.0.0.1",
        # Other sources that the machine has might answer.
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
    }


def network_index(place: Testbed) -> Row:
    """A package index that stops answering, with nothing in uv's cache."""
    row = Attempts("network stalls, package index")
    for what, answer in (("says nothing at all", silence), ("stops in the middle of a page", half_a_page)):
        with row.attempt(what, place), serving(answer) as port:
            place.remove()
            empty = place.root / "empty-cache"
            variables = only_index(port)
            ran, report = place.told("setup", "--no-train-step", UV_CACHE_DIR=str(empty), **variables)
            expect(ran.code == 1, f"ended with {ran.code}: {ran.said}")
            failed = report.status("environment") is Status.FAIL and report.status("checkout") is Status.PASS
            expect(failed, f"not the environment alone failed: {ran.said}")
            took = report.seconds.get("environment", 0.0)
            expect(took < INDEX_SECONDS * 20, f"the environment took {took:.0f} s to fail")
            expect(not os.path.lexists(place.home.venv), "something half-built is active")
            place.assert_no_leftovers()
            place.assert_recovers()
            shutil.rmtree(empty, ignore_errors=True)
    return row.done(
        "an empty cache: exit 1 in time, the checkout done, nothing half-built; the rerun with the network ends good"
    )
