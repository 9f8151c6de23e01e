"""``nox -s chaos``: break set-ups in every way that can be arranged, and see whether one rerun mends them.

It works on a copy of the project, in which locks and settings may be changed, beside uv's
cache, so that environments are links as a user's are. A try survives when the damage cost
nothing that was there before and one ``invoke setup`` afterwards ends good.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from . import constraints, generations, inventory
from .checkout import SUBMODULE
from .home import STATE, Home
from .isolated import PLACE
from .process import capture, scrubbed, uv
from .report import Check, Report, Status, say
from .settings import ROOT, Settings

#: What the copied settings say: a network that is silent for this long has failed, in seconds.
STALL_SECONDS = 3.0
#: A package index may be silent for this long in the tries that need one, in seconds, twice.
INDEX_SECONDS = 2

#: The lock for faults that need gigabytes of room or a cache of their own: pure Python, from the real lock.
SMALL = ("transformers", "sympy", "einops")

_RENEW = """
from kohya_mps import environment, front, settings
front.run(lambda: environment.renew(settings.load()))
"""

_SMOKE = """
from kohya_mps import front, generations, home, settings, smoke
chosen = settings.load()
front.run(lambda: smoke.run(chosen, generations.active(home.Home(chosen.home))))
"""


class Row(msgspec.Struct, frozen=True):
    """One fault: how often it was tried, how often that was survived, what was looked at.

    ``fell`` says what went wrong in each try that was not survived, ``skipped`` why there was none.
    """

    fault: str
    tries: int
    survived: int
    looked_at: str
    fell: tuple[str, ...] = ()
    skipped: str = ""

    def check(self) -> Check:
        """The fault as a row of the report."""
        if self.skipped:
            return Check(self.fault, Status.SKIP, self.skipped)
        lines = [f"{self.tries} tries, {self.survived} survived: {self.looked_at}", *self.fell]
        return Check.of(self.fault, self.survived == self.tries > 0, "\n".join(lines))


class Ran(msgspec.Struct, frozen=True):
    """How a command of ours ended: its exit code, what it printed, and how long it took in seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        """The end of what it told, for the report of a try that was not survived."""
        return " | ".join(line.strip() for line in (self.err + self.out).strip().splitlines()[-6:])


class _Told(msgspec.Struct, frozen=True):
    """What a report as JSON says, as far as it is looked at here."""

    ok: bool
    checks: tuple[Check, ...]
    seconds: dict[str, float] = {}

    def status(self, name: str) -> Status | None:
        return next((check.status for check in self.checks if check.name == name), None)


class Moment(msgspec.Struct, frozen=True):
    """A moment of a run: seconds after it announced a step; step 0 is its start."""

    step: int
    seconds: float


class Fell(Exception):
    """A try was not survived, and how."""


class CannotTry(Exception):
    """This machine does not allow the fault, and why."""


def expect(good: object, what: str) -> None:
    """Raise :class:`Fell` unless ``good``."""
    if not good:
        raise Fell(what)


class Place:
    """A copy of the project with one installation, in a scratch directory that is removed afterwards.

    ``real`` says whether the checkout is kohya_ss, or a stand-in without a trainer.
    """

    def __init__(self, root: Path, settings: Settings, profile: str, *, real: bool) -> None:
        self.root, self.project = root, root / "project"
        self.home = Home(root / "home")
        self.real = real
        self.temporary = root / "tmp"
        self.temporary.mkdir()
        for name in ("kohya_mps", "config", "constraints"):
            shutil.copytree(ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "tasks.py", self.project)
        self.profile = settings.profile
        lock = settings.profile.lock_file
        self.use_lock(lock.stem, lock.read_text(encoding="utf-8"))
        chosen = self.project / "config" / "settings.yaml"
        text, count = re.subn(
            r"^network_stall_seconds: .*$",
            f"network_stall_seconds: {STALL_SECONDS}",
            chosen.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
        assert count == 1
        chosen.write_text(text, encoding="utf-8")
        self.environ = {
            **os.environ,
            "KOHYA_HOME": str(self.home.root),
            "KOHYA_REPO_URL": settings.url,
            "KOHYA_COMMIT": settings.commit,
            "KOHYA_PROFILE": profile,
            "HF_HOME": str(root / "huggingface"),
            "TMPDIR": str(self.temporary),
        }
        if not real:  # git refuses a submodule on this machine's own disk otherwise
            allow = ("GIT_CONFIG_COUNT", "1"), ("GIT_CONFIG_KEY_0", "protocol.file.allow")
            self.environ |= dict(allow) | {"GIT_CONFIG_VALUE_0": "always"}

    @property
    def whole(self) -> tuple[str, ...]:
        """The command that a user types; a stand-in for kohya_ss has no trainer to run."""
        return ("setup",) if self.real else ("setup", "--no-train-step")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start ``invoke``; its children outlive it when it is killed, as they would a user's."""
        return subprocess.Popen(
            [str(Path(sys.prefix) / "bin" / "invoke"), *arguments],
            cwd=self.project,
            env={**self.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def invoke(self, *arguments: str, **variables: str) -> Ran:
        """Run ``invoke`` to its end."""
        began = time.monotonic()
        process = self.start(*arguments, **variables)
        out, err = process.communicate()
        return Ran(process.returncode, out, err, time.monotonic() - began)

    def python(self, code: str, **variables: str) -> Ran:
        """Run a call of the copied package that ``invoke`` has no task for."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.project,
            env={**self.environ, **variables},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    def use_lock(self, name: str, text: str) -> None:
        """Write a lock into the copy and take it for the one that faults change."""
        self.lock = self.project / "constraints" / f"{name}.txt"
        self._pristine, self._editions = text, 0
        self.lock.write_text(text, encoding="utf-8")

    def new_lock(self) -> None:
        """Another edition of the lock: other bytes, the same packages, so a true rebuild."""
        self._editions += 1
        self.lock.write_text(f"{self._pristine}# edition {self._editions}\n", encoding="utf-8")

    def told(self, *arguments: str, **variables: str) -> tuple[Ran, _Told]:
        """Run ``invoke … --json`` and read its report."""
        ran = self.invoke(*arguments, "--json", **variables)
        try:
            return ran, msgspec.json.decode(ran.out, type=_Told)
        except msgspec.DecodeError as error:
            raise Fell(f"{' '.join(arguments)} printed no report ({error}): {ran.said}") from error

    def mended(self) -> None:
        """One rerun ends good, and leaves nothing behind."""
        ran, report = self.told("setup", "--no-train-step")
        expect(ran.code == 0 and report.ok, f"the rerun ended with {ran.code}: {ran.said}")
        self.good()

    def good(self) -> None:
        """Status finds nothing wrong, and nothing that was begun is left lying about."""
        ran, report = self.told("status")
        wrong = [f"{c.name}: {c.detail}" for c in report.checks if c.status is Status.FAIL]
        expect(ran.code == 0 and not wrong, f"status ended with {ran.code}: {wrong or ran.said}")
        self.tidy()

    def tidy(self) -> None:
        """No half-built generation, no temporary file, no process of an ended run."""
        half = [g.name for g in generations.present(self.home) if g.manifest() is None]
        expect(not half, f"half-built generations are left: {half}")
        left = [str(path.relative_to(self.root)) for path in self._temporary_files()]
        expect(not left, f"temporary files are left: {left}")
        running = processes_of(self.home)
        expect(not running, f"processes are left: {running}")

    def _temporary_files(self) -> Iterator[Path]:
        yield from self.temporary.iterdir()
        yield from self.home.root.glob(".*.new")
        yield from self.home.root.glob(".git.repaired")
        yield from self.home.state.glob("moving-*")
        for place in (self.home.state, *self.home.generations.glob("*")):
            yield from place.glob(".*")
            yield from place.glob("smoke")
        for repository in (self.home.root / ".git", self.home.sd_scripts / ".git"):
            yield from repository.glob("*.lock")
            yield from repository.glob("refs/**/*.lock")

    def active_is_whole(self) -> None:
        """The link to the environment leads to one that was built to its end and is as it was built."""
        active = generations.active(self.home)
        expect(active, f"{self.home.venv} leads to no complete generation")
        manifest = active.manifest() if active else None
        if active and manifest:
            drift = inventory.differences(manifest.inventory, inventory.take(active.venv))
            expect(not drift, f"the active environment changed: {[d.name for d in drift[:5]]}")

    def active_passes_smoke(self) -> None:
        """The active environment is whole, and the smoke check passes in it."""
        self.active_is_whole()
        ran = self.python(_SMOKE)
        expect(ran.code == 0, f"the smoke check of the active environment failed: {ran.said}")

    def install(self) -> None:
        """Have a good installation, from nothing where there is none."""
        if generations.active(self.home) is None:
            say("  installing what the faults are tried on")
            ran = self.invoke(*self.whole)
            expect(ran.code == 0, f"no installation to try this on: {ran.said}")

    def remove(self) -> None:
        """Forget the installation and its default configuration."""
        end_processes(self.home)
        for path in (self.home.root, self.root / "huggingface"):
            if path.exists():
                shutil.rmtree(path)


def processes_of(home: Home) -> list[str]:
    """The processes that work on a home: all of ours carry its variable."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get("KOHYA_HOME") == str(home.root):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
    return found


def end_processes(home: Home) -> None:
    """Kill what works on a home that is about to be removed."""
    for line in processes_of(home):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)


# Kills -------------------------------------------------------------------------------------


_STEP = re.compile(r"\[\d+/\d+\] ")


class Timeline(msgspec.Struct, frozen=True):
    """When a run that was left alone announced its steps, and its end; seconds after its start."""

    steps: tuple[float, ...]
    end: float

    def moments(self, count: int) -> list[Moment]:
        """Moments to kill at: half spread evenly over the time, half evenly over the steps.

        Most of the time goes to importing torch; most of what can break happens in the rest.
        """
        shaken = random.Random(count)  # noqa: S311 -- the same kills for the same count
        bounds = [0.0, *self.steps, self.end]
        by_time, by_step = (count + 1) // 2, count // 2
        found = []
        for n in range(by_time):
            at = self.end * (n + shaken.random()) / by_time
            step = bisect.bisect_right(bounds, at) - 1
            found.append(Moment(step, at - bounds[step]))
        for n in range(by_step):
            where = (len(bounds) - 1) * (n + shaken.random()) / by_step
            step = int(where)
            found.append(Moment(step, (where - step) * (bounds[step + 1] - bounds[step])))
        return sorted(found, key=lambda moment: (moment.step, moment.seconds))


def reference(place: Place) -> Timeline:
    """Measure a run from its start to its end."""
    began = time.monotonic()
    process = place.start(*place.whole)
    assert process.stderr and process.stdout
    steps, lines = [], []
    for line in process.stderr:
        lines.append(line)
        if _STEP.match(line):
            steps.append(time.monotonic() - began)
    out = process.stdout.read()
    code = process.wait()
    expect(code == 0, f"a run that was left alone failed: {Ran(code, out, ''.join(lines), 0).said}")
    return Timeline(tuple(steps), time.monotonic() - began)


def kill(place: Place, moment: Moment) -> bool:
    """Run and kill at a moment: the ``invoke`` process alone, as a system short of memory does.

    Returns:
        Whether it was still running.
    """
    process = place.start(*place.whole)
    assert process.stderr and process.stdout
    due = threading.Event()

    def follow(lines: Iterable[str]) -> None:
        seen = 0
        for line in lines:
            seen += bool(_STEP.match(line))
            if seen >= moment.step:
                due.set()
        due.set()

    readers = [
        threading.Thread(target=follow, args=(process.stderr,)),
        threading.Thread(target=process.stdout.read),
    ]
    for reader in readers:
        reader.start()
    if moment.step:
        due.wait()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment.seconds)
    alive = process.poll() is None
    process.kill()
    process.wait()
    for reader in readers:
        reader.join()
    return alive


def kills_fresh(place: Place, count: int) -> Row:
    """Kill the first set-up of a home."""
    place.remove()
    line = reference(place)
    row = _Tries("kill, fresh install")
    ended_first = 0
    for moment in line.moments(count):
        with row.attempt(f"killed {moment.seconds:.2f} s into step {moment.step}", place):
            place.remove()
            ended_first += not kill(place, moment)
            if os.path.lexists(place.home.venv):
                place.active_is_whole()
            place.mended()
    return row.done(
        f"{_what_ran(place)} of {line.end:.0f} s, half of the kills evenly over its time, half evenly over its "
        f"steps{_ended(ended_first)}; then no environment or a whole one, one rerun without the training step, "
        "status, processes and files left behind"
    )


def kills_rebuild(place: Place, count: int) -> Row:
    """Kill the set-up that replaces an environment."""
    place.install()
    place.new_lock()
    line = reference(place)
    row = _Tries("kill, rebuild")
    ended_first = 0
    for moment in line.moments(count):
        with row.attempt(f"killed {moment.seconds:.2f} s into step {moment.step}", place):
            place.install()
            place.new_lock()
            ended_first += not kill(place, moment)
            place.active_passes_smoke()
            place.mended()
    with row.attempt("a whole set-up after all kills", place):
        place.new_lock()
        ran = place.invoke(*place.whole)
        expect(ran.code == 0, f"ended with {ran.code}: {ran.said}")
        left = list(place.home.verification.glob("models/*.unfinished"))
        expect(not left, f"unfinished models are left: {left}")
        place.good()
    return row.done(
        f"{_what_ran(place)} of {line.end:.0f} s, spread as above{_ended(ended_first)}; then the smoke check in "
        "the environment before it (every time), one rerun, status, processes and files left behind; at the end "
        "one whole set-up"
    )


def _what_ran(place: Place) -> str:
    return "invoke setup" if place.real else "invoke setup --no-train-step (no real kohya_ss)"


def _ended(count: int) -> str:
    return f" ({count} ended before they were killed)" if count else ""


class _Tries:
    """Counts the tries of one fault, and what was not survived."""

    def __init__(self, fault: str) -> None:
        self.fault, self.tries, self.fell = fault, 0, list[str]()

    @contextlib.contextmanager
    def attempt(self, what: str, place: Place) -> Iterator[None]:
        """One try; when it is not survived, the next one begins with a new installation."""
        self.tries += 1
        say(f"{self.fault}, try {self.tries}: {what}")
        try:
            yield
        except Fell as reason:
            say(f"  DID NOT SURVIVE: {reason}")
            self.fell.append(f"{what}: {reason}")
            place.remove()

    def done(self, looked_at: str) -> Row:
        return Row(self.fault, self.tries, self.tries - len(self.fell), looked_at, tuple(self.fell))


# Disk --------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(at: Path, *options: str) -> Iterator[None]:
    """Mount something for a while.

    Raises:
        CannotTry: that takes a right that this user does not have, or another system.
    """
    if os.geteuid() or not sys.platform.startswith("linux"):
        raise CannotTry("mounting a file system needs root on Linux")
    at.mkdir(parents=True, exist_ok=True)
    done = capture(["mount", *options, at])
    if done.returncode:
        raise CannotTry(f"this machine lets nobody mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        capture(["umount", "--lazy", at])


@contextlib.contextmanager
def small_disk(place: Place, megabytes: int) -> Iterator[None]:
    """Give the home a disk of its own, of this size."""
    place.remove()
    with mounted(place.home.root, "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs"):
        yield
    place.home.root.rmdir()


def resize(place: Place, megabytes: int) -> None:
    """Free space on the small disk, without touching what is on it."""
    done = capture(["mount", "-o", f"remount,size={megabytes}m", place.home.root])
    expect(done.returncode == 0, f"the small disk cannot be made larger: {done.stderr.strip()}")


def disk_refused(place: Place) -> Row:
    """Too little room, noticed before anything is touched."""
    row = _Tries("disk full, seen before it begins")
    with row.attempt("a disk of 500 MB", place), small_disk(place, 500):
        ran, report = place.told("setup")
        needed = place.profile.disk_gb["darwin" if sys.platform == "darwin" else "linux"]
        machine = next((check for check in report.checks if check.name == "machine"), None)
        expect(ran.code == 1 and machine, f"ended with {ran.code}: {ran.said}")
        expect(machine and f"{needed:g} GB" in machine.detail, f"does not say how much it needs: {machine}")
        expect(not os.listdir(place.home.root), "something was written all the same")
    return row.done("refused with exit 1 and the gigabytes that are needed, nothing written")


def disk_full_checkout(place: Place) -> Row:
    """The disk fills up while git writes the checkout."""
    place.install()
    size = sum(p.lstat().st_blocks * 512 for p in place.home.root.rglob("*") if _of_checkout(place, p))
    row = _Tries("disk full, in the checkout")
    for share in (0.3, 0.6, 0.9):
        megabytes = max(1, int(size * share / 1e6))
        with row.attempt(f"{megabytes} MB for {size / 1e6:.0f} MB", place), small_disk(place, megabytes):
            ran = place.invoke("clone")
            _full(ran)
            resize(place, 4 * megabytes + 200)
            ran = place.invoke("clone")
            expect(ran.code == 0, f"with room again it ended with {ran.code}: {ran.said}")
    return row.done("invoke clone ends with exit 1 and says so; with room again the same command ends good")


def _of_checkout(place: Place, path: Path) -> bool:
    inside = path.relative_to(place.home.root).parts
    return inside[0] not in (STATE, "venv") and not path.is_dir()


def disk_full_environment(place: Place) -> Row:
    """The disk fills up while an environment is built: a first one, and one that replaces another."""
    row = _Tries("disk full, in the environment")
    place.remove()
    ran = place.python(_RENEW)
    expect(ran.code == 0, f"the small environment cannot be built: {ran.said}")
    active = generations.active(place.home)
    manifest = active.manifest() if active else None
    assert manifest
    size = manifest.inventory.bytes / 1e6
    for share in (0.2, 0.5, 0.9):
        with row.attempt(f"fresh, room for {share:.0%}", place), small_disk(place, int(size * share)):
            _full(place.python(_RENEW))
            expect(not os.path.lexists(place.home.venv), "something half-built is active")
            place.tidy()
            resize(place, int(size * 3))
            ran = place.python(_RENEW)
            expect(ran.code == 0, f"with room again it ended with {ran.code}: {ran.said}")
            place.active_is_whole()
        with row.attempt(f"rebuild, room for {share:.0%}", place), small_disk(place, int(size * 3)):
            ran = place.python(_RENEW)
            expect(ran.code == 0, f"the first build ended with {ran.code}: {ran.said}")
            before = generations.active(place.home)
            used = shutil.disk_usage(place.home.root).used / 1e6
            resize(place, int(used + size * share))
            place.new_lock()
            _full(place.python(_RENEW))
            expect(generations.active(place.home) == before, "another environment is active")
            place.active_is_whole()
            place.tidy()
            resize(place, int(size * 4))
            ran = place.python(_RENEW)
            expect(ran.code == 0, f"with room again it ended with {ran.code}: {ran.said}")
            expect(generations.active(place.home) != before, "the new lock was not built")
            place.active_is_whole()
    return row.done(
        f"`nox -s venv`'s step with a stand-in lock ({', '.join(SMALL)}; {size:.0f} MB): exit 1 and says so, the "
        "environment before it active and unchanged or none at all; with room again the same command ends good"
    )


def _full(ran: Ran) -> None:
    expect(ran.code == 1, f"ended with {ran.code}: {ran.said}")
    text = (ran.out + ran.err).lower()
    expect("traceback" not in text, f"a traceback: {ran.said}")
    expect(
        "disk is full" in text or "no space left" in text, f"does not say that the disk is full: {ran.said}"
    )


# Network -----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[int]:
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
            server.shutdown(socket.SHUT_RDWR)
            for connection in connections:
                connection.close()


def _quietly(answer: Callable[[socket.socket], None], connection: socket.socket) -> None:
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
        env=scrubbed(
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
            os.killpg(server.pid, signal.SIGTERM)


def network_git(place: Place) -> Row:
    """A git server that stops answering: at once, and at several points of a download."""
    row = _Tries("network stalls, git")
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
        f"exit 1 within {STALL_SECONDS:g} s of silence, the address named, environment, configuration and smoke "
        "check done; the rerun with the network ends good"
    )


def _stalled_checkout(place: Place, url: str) -> None:
    place.remove()
    ran, report = place.told("setup", "--no-train-step", KOHYA_REPO_URL=url)
    row = next((check for check in report.checks if check.name == "checkout"), None)
    expect(ran.code == 1 and row and row.status is Status.FAIL, f"ended with {ran.code}: {ran.said}")
    expect(row and url in row.detail, f"does not name the address: {row}")
    took = report.seconds.get("checkout", 0.0)
    expect(took < STALL_SECONDS * 2 + 10, f"the checkout took {took:.0f} s to fail")
    for name in ("environment", "configuration", "smoke check"):
        expect(report.status(name) is Status.PASS, f"{name} was not done: {report.status(name)}")
    place.mended()


def network_index(place: Place) -> Row:
    """A package index that stops answering, with nothing in uv's cache."""
    row = _Tries("network stalls, package index")
    for what, answer in (("says nothing at all", silence), ("stops in the middle of a page", half_a_page)):
        with row.attempt(what, place), serving(answer) as port:
            place.remove()
            variables = {
                "UV_CACHE_DIR": str(place.root / "empty-cache"),
                "UV_DEFAULT_INDEX": f"http://127.0.0.1:{port}/simple/",
                "UV_HTTP_TIMEOUT": str(INDEX_SECONDS),
                "UV_HTTP_RETRIES": "1",
                "NO_PROXY": "127.0.0.1",
                # Other sources that the machine has would be asked, and might answer.
                "PIP_CONFIG_FILE": os.devnull,
                "PIP_FIND_LINKS": "",
                "PIP_EXTRA_INDEX_URL": "",
            }
            ran, report = place.told("setup", "--no-train-step", **variables)
            expect(ran.code == 1, f"ended with {ran.code}: {ran.said}")
            failed = report.status("environment") is Status.FAIL and report.status("checkout") is Status.PASS
            expect(failed, f"not the environment alone failed: {ran.said}")
            took = report.seconds.get("environment", 0.0)
            expect(took < INDEX_SECONDS * 20, f"the environment took {took:.0f} s to fail")
            expect(not os.path.lexists(place.home.venv), "something half-built is active")
            place.tidy()
            place.mended()
            shutil.rmtree(place.root / "empty-cache", ignore_errors=True)
    return row.done(
        "an empty cache: exit 1 in time, the checkout done, nothing half-built; the rerun with the network ends good"
    )


# Damage ------------------------------------------------------------------------------------


def checkout_damaged(place: Place) -> Row:
    """Objects of the checkout that cannot be read, with a file that the user changed."""
    row = _Tries("corrupted object in the checkout")
    place.install()
    for tree in (place.home.root, place.home.sd_scripts):
        for what, damage in (
            ("pack cut in half", cut_pack),
            ("commit zeroed", lambda path: zero_object(path, "HEAD")),
            ("commit missing", lambda path: remove_object(path, "HEAD")),
            ("tree zeroed", lambda path: zero_object(path, "HEAD^{tree}")),
            ("HEAD emptied", lambda path: (path / ".git" / "HEAD").write_bytes(b"")),
        ):
            with row.attempt(f"{tree.name}: {what}", place):
                place.install()
                _survives_damage(place, tree, damage)
    return row.done(
        "kohya_ss and sd-scripts, each with a file that the user changed: it is never written over, and named "
        "until --stash puts it away; then the set-up ends good and the stash holds the change"
    )


def _survives_damage(place: Place, tree: Path, damage: Callable[[Path], object]) -> None:
    listed = capture(["git", "-C", tree, "ls-files", "*.py"]).stdout.split()
    mine, beside = tree / listed[0], tree / "my-model.safetensors"
    changed = mine.read_bytes() + b"# mine\n"
    mine.write_bytes(changed)
    beside.write_bytes(b"mine")
    damage(tree)
    ran, report = place.told("setup", "--no-train-step")
    expect(mine.read_bytes() == changed, f"{listed[0]} was written over: {ran.said}")
    row = next((check for check in report.checks if check.name == "checkout"), None)
    named = row is not None and row.status is Status.FAIL and listed[0] in row.detail
    expect(ran.code == 1 and named, f"the changed file was not named ({ran.code}): {ran.said}")
    ran = place.invoke("setup", "--no-train-step", "--stash")
    expect(ran.code == 0, f"with --stash it ended with {ran.code}: {ran.said}")
    stashed = capture(["git", "-C", tree, "stash", "show", "--patch"]).stdout
    expect("+# mine" in stashed, "the stash does not hold the change")
    expect(beside.read_bytes() == b"mine", "the user's own file is gone")
    place.mended()
    beside.unlink()
    for aside in tree.glob(".git.damaged*"):
        shutil.rmtree(aside)


def cut_pack(tree: Path) -> None:
    """Cut the largest pack of a repository in half; the objects of one without packs, each of them."""
    packs = sorted((tree / ".git" / "objects" / "pack").glob("*.pack"), key=lambda path: path.stat().st_size)
    for path in packs[-1:] or [p for p in (tree / ".git" / "objects").glob("??/*") if p.is_file()]:
        path.chmod(0o644)
        os.truncate(path, path.stat().st_size // 2)


def loose_object(tree: Path, name: str) -> Path:
    """The file of an object; packs are unpacked so that it has one."""
    objects = tree / ".git" / "objects"
    number = capture(["git", "-C", tree, "rev-parse", name]).stdout.strip()
    for pack in (objects / "pack").glob("*.pack"):
        aside = tree / ".git" / pack.name
        pack.rename(aside)
        for other in (objects / "pack").glob(f"{pack.stem}.*"):
            other.unlink()
        with aside.open("rb") as file:
            subprocess.run(["git", "-C", tree, "unpack-objects", "-q"], stdin=file, check=True)
        aside.unlink()
    return objects / number[:2] / number[2:]


def zero_object(tree: Path, name: str) -> None:
    """What a power cut leaves of a file that was never flushed: its name, and no bytes."""
    path = loose_object(tree, name)
    path.chmod(0o644)
    os.truncate(path, 0)


def remove_object(tree: Path, name: str) -> None:
    """Delete an object."""
    loose_object(tree, name).unlink()


def file_deleted(place: Place) -> Row:
    """Files that are gone from the active environment."""
    row = _Tries("deleted file in the environment")
    for name in ("torch/nn/functional.py", "accelerate/accelerator.py", "einops-*.dist-info/METADATA"):
        with row.attempt(name, place):
            place.install()
            active = generations.active(place.home)
            assert active
            next(inventory.site_packages(active.venv).glob(name)).unlink()
            ran, report = place.told("status")
            expect(ran.code == 1 and not report.ok, "status does not see it")
            place.mended()
            place.active_is_whole()
    return row.done("status sees it; one set-up ends good")


def file_edited(place: Place) -> Row:
    """Files of the active environment that were edited in place, and with them uv's cache behind the link."""
    row = _Tries("edited file in the environment")
    variables = {"UV_CACHE_DIR": str(place.root / "own-cache")}
    edits: dict[str, Callable[[Path], object]] = {
        "a line appended": lambda path: path.write_bytes(path.read_bytes() + b"raise SystemExit\n"),
        "a byte changed": lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]),
        "emptied": lambda path: path.write_bytes(b""),
    }
    for what, edit in edits.items():
        with row.attempt(what, place):
            ran = place.python(_RENEW, **variables)
            expect(ran.code == 0, f"no environment to try this on: {ran.said}")
            before = generations.active(place.home)
            assert before
            edited = inventory.site_packages(before.venv) / "einops" / "__init__.py"
            linked = edited.stat().st_nlink > 1
            edit(edited)
            ran = place.python(_RENEW, **variables)
            expect(ran.code == 0, f"the rerun ended with {ran.code}: {ran.said}")
            place.active_is_whole()
            active = generations.active(place.home)
            assert active
            bad = inventory.damaged(active.venv, SMALL)
            expect(not bad, f"the new environment has the edit, out of uv's cache (linked: {linked}): {bad}")
            started = capture([active.python, "-c", "import einops"])
            expect(started.returncode == 0, f"the edited package does not import: {started.stderr.strip()}")
            place.tidy()
    place.remove()
    shutil.rmtree(place.root / "own-cache", ignore_errors=True)
    return row.done(
        f"`nox -s venv`'s step with a stand-in lock ({', '.join(SMALL)}) and a uv cache of its own: every file of "
        "the new environment has the digest of its wheel"
    )


def lock_wrong(place: Place) -> Row:
    """A lock with a digest that no wheel has."""
    row = _Tries("wrong hash in the lock")
    for package in ("einops", "accelerate"):
        with row.attempt(package, place):
            place.install()
            before = generations.active(place.home)
            good = place.lock.read_text(encoding="utf-8")
            place.lock.write_text(wrong_digest(good, package), encoding="utf-8")
            try:
                ran, _ = place.told("setup", "--no-train-step")
            finally:
                place.lock.write_text(good, encoding="utf-8")
            expect(ran.code == 1, f"ended with {ran.code}: {ran.said}")
            expect(
                place.lock.name in ran.out and package in ran.err,
                f"names neither lock nor package: {ran.said}",
            )
            expect(generations.active(place.home) == before, "another environment is active")
            place.active_passes_smoke()
            place.tidy()
            place.mended()
    return row.done(
        "exit 1, lock and package named, the environment before it active and through the smoke check; with the "
        "lock restored the set-up ends good"
    )


def wrong_digest(lock: str, package: str) -> str:
    """A lock's text with one package's digests made wrong."""
    head, pin, rest = lock.partition(f"\n{package}==")
    assert pin, package
    lines = rest.splitlines(keepends=True)
    last = next((n for n, line in enumerate(lines) if "\\" not in line), len(lines))
    for n in range(last + 1):
        lines[n] = re.sub(
            r"sha256:([0-9a-f]{64})",
            lambda found: "sha256:" + hashlib.sha256(found[1].encode()).hexdigest(),
            lines[n],
        )
    return head + pin + "".join(lines)


def read_only(place: Place) -> Row:
    """A home that cannot be written."""
    row = _Tries("read-only home")
    place.install()
    with row.attempt("an installed home, nothing to do", place):
        with not_writable(place.home.root):
            _refused(place.invoke("setup"))
            ran = place.invoke("status")
            expect(ran.code == 0, f"status ended with {ran.code}: {ran.said}")
        place.active_passes_smoke()
        place.mended()
    with row.attempt("an installed home, a new lock", place):
        place.new_lock()
        with not_writable(place.home.root):
            _refused(place.invoke("setup"))
        place.active_passes_smoke()
        place.mended()
    with row.attempt("an empty home", place):
        place.remove()
        place.home.root.mkdir()
        with not_writable(place.home.root):
            _refused(place.invoke("setup"))
        place.mended()
    return row.done(
        "refused in one sentence, nothing changed, status still works; writable again, it ends good"
    )


@contextlib.contextmanager
def not_writable(path: Path) -> Iterator[None]:
    """Take away the right to write: from root with a mount, from anybody else with the mode."""
    if os.geteuid() == 0:
        with mounted(path, "--bind", str(path)):
            done = capture(["mount", "-o", "remount,ro,bind", path])
            if done.returncode:
                raise CannotTry(f"this machine lets nobody mount: {done.stderr.strip()}")
            yield
        return
    modes = {place: place.stat().st_mode for place in (path, path / STATE) if place.is_dir()}
    for place in modes:
        place.chmod(0o555)
    try:
        yield
    finally:
        for place, mode in modes.items():
            place.chmod(mode)


def _refused(ran: Ran) -> None:
    expect(ran.code in (1, 2), f"ended with {ran.code}: {ran.said}")
    expect("Traceback" not in ran.err, f"a traceback: {ran.said}")
    expect(
        "writable" in ran.err + ran.out or "ermission" in ran.err + ran.out, f"does not say why: {ran.said}"
    )


def clock_back(place: Place) -> Row:
    """A clock that was a day ahead and was set back: everything that was written lies in the future."""
    row = _Tries("clock set back")
    with row.attempt("a day", place):
        place.install()
        _into_the_future(place.home.state)
        before = generations.active(place.home)
        place.mended()
        expect(generations.active(place.home) == before, "it was built again")
        place.new_lock()
        place.mended()
        after = generations.active(place.home)
        expect(after != before, "the new lock was not built")
        for wanted, what in ((before, "rollback"), (after, "rollback of the rollback")):
            ran = place.invoke("rollback")
            expect(ran.code == 0, f"{what} ended with {ran.code}: {ran.said}")
            expect(generations.active(place.home) == wanted, f"{what} went elsewhere")
            place.good()
    return row.done(
        "nothing is rebuilt; a rebuild becomes active, rollback goes back and forth between the two"
    )


def _into_the_future(directory: Path) -> None:
    """Move times a day ahead, but not of files that uv's cache links to: they are others', too."""
    for path in (directory, *directory.rglob("*")):
        stat = path.lstat()
        if path.is_dir() or stat.st_nlink == 1:
            day = 24 * 3600 * 10**9
            times = (stat.st_atime_ns + day, stat.st_mtime_ns + day)
            os.utime(path, ns=times, follow_symlinks=False)


def pairs(place: Place, count: int) -> Row:
    """Two runs that are started together on one home."""
    row = _Tries("two runs together")
    both = 0
    for n in range(count):
        with row.attempt(f"pair {n + 1}", place):
            if n == 0:
                place.remove()
            else:
                place.install()
                active = generations.active(place.home)
                assert active
                active.accelerate_config.unlink()  # so that there is something to do
            two = [place.start("setup", "--no-train-step") for _ in range(2)]
            said = [process.communicate()[1] for process in two]
            codes = [process.returncode for process in two]
            both += codes == [0, 0]
            expect(sorted(codes) in ([0, 0], [0, 3]), f"they ended with {codes}: {said}")
            if 3 in codes:
                busy = codes.index(3)
                expect(f"process {two[1 - busy].pid}" in said[busy], f"the other is not named: {said[busy]}")
            place.good()
    return row.done(
        f"exit codes 0 and 3, the other's process id named ({both} times 0 and 0, one after the other); then status"
    )


# The session -------------------------------------------------------------------------------


class Fault(msgspec.Struct, frozen=True):
    """What can be asked for with ``--only``; ``small`` ones use the stand-in lock."""

    run: Callable[[Place, argparse.Namespace], Row]
    small: bool = False


FAULTS = {
    "kill-fresh": Fault(lambda place, given: kills_fresh(place, given.kills - given.kills // 2)),
    "kill-rebuild": Fault(lambda place, given: kills_rebuild(place, given.kills // 2)),
    "disk-refused": Fault(lambda place, _: disk_refused(place)),
    "disk-checkout": Fault(lambda place, _: disk_full_checkout(place)),
    "disk-environment": Fault(lambda place, _: disk_full_environment(place), small=True),
    "network-git": Fault(lambda place, _: network_git(place)),
    "network-index": Fault(lambda place, _: network_index(place)),
    "checkout": Fault(lambda place, _: checkout_damaged(place)),
    "deleted": Fault(lambda place, _: file_deleted(place)),
    "edited": Fault(lambda place, _: file_edited(place), small=True),
    "lock": Fault(lambda place, _: lock_wrong(place)),
    "read-only": Fault(lambda place, _: read_only(place)),
    "clock": Fault(lambda place, _: clock_back(place)),
    "pairs": Fault(lambda place, given: pairs(place, given.pairs)),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of ``nox -s chaos``."""
    parser = argparse.ArgumentParser(prog="nox -s chaos --", description="Break set-ups, and mend them.")
    parser.add_argument("--kills", type=int, default=60, help="half on a fresh install, half on a rebuild")
    parser.add_argument("--pairs", type=int, default=20, help="how often two runs are started together")
    parser.add_argument("--only", choices=tuple(FAULTS), action="append", help="this fault; repeatable")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(arguments)


def run(settings: Settings, given: argparse.Namespace) -> Report:
    """Try every fault that was asked for.

    The checkout is the real kohya_ss when ``KOHYA_REPO_URL`` and ``KOHYA_COMMIT`` name it,
    else a stand-in that is made here and has no trainer.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=_beside_uvs_cache()) as directory:
        real = bool(os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT"))
        if not real:
            settings = _stand_in(Path(directory), settings)
        places = {
            small: _place(Path(directory) / ("small" if small else "real"), settings, small=small, real=real)
            for small in (False, True)
        }
        for name in given.only or FAULTS:
            place = places[FAULTS[name].small]
            try:
                rows.append(_try(name, place, given))
            finally:
                end_processes(place.home)
    survived = sum(row.survived for row in rows)
    tries = sum(row.tries for row in rows)
    summary = ("", f"{survived} of {tries} tries survived.")
    return Report("Chaos", tuple(row.check() for row in rows), {"rows": rows}, summary)


def _try(name: str, place: Place, given: argparse.Namespace) -> Row:
    try:
        return FAULTS[name].run(place, given)
    except CannotTry as reason:
        return Row(name, 0, 0, "", skipped=str(reason))
    except Fell as reason:
        # Not one try of the fault, but what comes before them all.
        place.remove()
        return Row(name, 1, 0, "", (str(reason),))


def _beside_uvs_cache() -> Path:
    """On the disk of uv's cache: links do not cross file systems."""
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    cache = Path(capture([uv(), "cache", "dir"]).stdout.strip())
    same = cache.is_dir() and cache.stat().st_dev == PLACE.parent.stat().st_dev
    return PLACE.parent if same or not cache.is_dir() else cache.parent


def _place(root: Path, settings: Settings, *, small: bool, real: bool) -> Place:
    root.mkdir()
    if not small:
        return Place(root, settings, settings.profile_name, real=real)
    place = Place(root, settings, "small", real=real)
    profile = place.project / "config" / "profiles" / f"{settings.profile_name}.yaml"
    text = re.sub(r"^lock: .*$", "lock: small", profile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    profile.with_stem("small").write_text(re.sub(r"^(  \w+): \d+$", r"\1: 0", text, flags=re.MULTILINE))
    pins = {pin.name: pin for pin in constraints.read(settings.profile.lock_file).pins}
    lines = [
        f"{name}=={pins[name].version} {' '.join(f'--hash={digest}' for digest in pins[name].hashes)}\n"
        for name in SMALL
    ]
    place.use_lock("small", "".join(lines))
    return place


def _stand_in(root: Path, settings: Settings) -> Settings:
    """Two small repositories in the places of kohya_ss and sd-scripts."""
    kohya_ss, sd_scripts = root / "kohya_ss", root / "sd-scripts"
    for path, name in ((sd_scripts, "train_network.py"), (kohya_ss, "kohya_gui.py")):
        path.mkdir()
        _git(path, "init", "--quiet")
        (path / name).write_text("raise SystemExit('a stand-in')\n", encoding="utf-8")
        for n in range(200):
            (path / f"file{n}.py").write_text(f"# {os.urandom(2000).hex()}\n", encoding="utf-8")
        _git(path, "add", "--all")
        _git(path, "commit", "--quiet", "--message", "a stand-in")
    module = f'[submodule "{SUBMODULE}"]\n\tpath = {SUBMODULE}\n\turl = {sd_scripts}\n'
    (kohya_ss / ".gitmodules").write_text(module, encoding="utf-8")
    gitlink = _git(sd_scripts, "rev-parse", "HEAD")
    _git(kohya_ss, "add", ".gitmodules")
    _git(kohya_ss, "update-index", "--add", "--cacheinfo", f"160000,{gitlink},{SUBMODULE}")
    _git(kohya_ss, "commit", "--quiet", "--message", "with its submodule")
    return msgspec.structs.replace(settings, url=str(kohya_ss), commit=_git(kohya_ss, "rev-parse", "HEAD"))


def _git(path: Path, *arguments: str) -> str:
    somebody = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "chaos"), ("EMAIL", "chaos@example.invalid"))
    }
    done = capture(["git", "-C", path, *arguments], env=scrubbed(extra=somebody))
    expect(done.returncode == 0, f"git {arguments[0]} failed in {path}: {done.stderr.strip()}")
    return done.stdout.strip()
