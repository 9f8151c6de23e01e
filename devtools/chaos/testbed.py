"""Where faults are tried: a copy of the project with one installation, and what is checked after each."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import psutil
import yaml

from kohya_mps.core.installation import Installation
from kohya_mps.core.process import find_processes
from kohya_mps.core.report import Check, Status, say
from kohya_mps.core.settings import ROOT, Settings
from kohya_mps.install import generations, inventory
from kohya_mps.install.generations import Generation

#: What the copied settings say: a network that is silent for this long has failed, in seconds.
STALL_SECONDS = 3.0

#: The lock for faults that need gigabytes of room or a cache of their own: pure Python, from the real lock.
SMALL = ("transformers", "sympy", "einops")
SMALL_PROFILE = "small"

REBUILD = """
from kohya_mps.core import cli, settings
from kohya_mps.install import environment
cli.run_task(lambda: environment.rebuild(settings.load()))
"""

SMOKE = """
from kohya_mps.core import cli, installation, settings
from kohya_mps.install import generations, smoke_check
chosen = settings.load()
cli.run_task(lambda: smoke_check.run(chosen, generations.active(installation.Installation(chosen.home))))
"""


class Row(msgspec.Struct, frozen=True):
    """One fault: how often it was tried, how often it was survived, and what was checked each time.

    ``failures`` says what went wrong in each try that was not survived; ``skipped`` says why there
    was no try. The JSON has older names for two of them.
    """

    fault: str
    tries: int
    survived: int
    checked: str = msgspec.field(name="looked_at")
    failures: tuple[str, ...] = msgspec.field(name="fell", default=())
    skipped: str = ""

    def check(self) -> Check:
        """The fault as a row of the report."""
        if self.skipped:
            return Check(self.fault, Status.SKIP, self.skipped)
        lines = [f"tries {self.tries}, survived {self.survived}: {self.checked}", *self.failures]
        return Check.of(self.fault, self.survived == self.tries > 0, "\n".join(lines))


class Ran(msgspec.Struct, frozen=True):
    """How one of our commands ended: its exit code, its output, and how long it took in seconds."""

    code: int
    out: str
    err: str
    seconds: float

    def assert_code(self, code: int, what: str = "it") -> None:
        """Raise :class:`NotSurvived` unless it ended with this exit code."""
        expect(self.code == code, f"{what} ended with {self.code}: {self.last_lines}")

    @property
    def last_lines(self) -> str:
        """The end of its output, for the report of a try that was not survived."""
        return " | ".join(line.strip() for line in (self.err + self.out).strip().splitlines()[-6:])


class _JsonReport(msgspec.Struct, frozen=True):
    """The parts of a report as JSON that the faults need."""

    ok: bool
    checks: tuple[Check, ...]
    seconds: dict[str, float] = {}

    def check(self, name: str) -> Check | None:
        """A check by its name; None where the report does not have it."""
        return next((check for check in self.checks if check.name == name), None)

    def status(self, name: str) -> Status | None:
        """The status of a check; None where the report does not have it."""
        found = self.check(name)
        return found.status if found else None


class NotSurvived(Exception):
    """A try was not survived; the message says how."""


class CannotTry(Exception):
    """This machine does not allow the fault; the message says why."""


def expect(good: object, otherwise: str) -> None:
    """Raise :class:`NotSurvived` unless ``good``."""
    if not good:
        raise NotSurvived(otherwise)


class Testbed:
    """A copy of the project with one installation, in a scratch directory that is removed afterwards.

    ``real`` says whether the checkout is kohya_ss, or a stand-in without a trainer.
    """

    def __init__(self, root: Path, settings: Settings, profile: str, *, real: bool) -> None:
        self.root, self.project = root, root / "project"
        self.home = Installation(root / "home")
        self.real = real
        self.temporary = root / "tmp"
        self.temporary.mkdir()
        self._copy_project()
        self.profile = settings.profile
        lock = settings.profile.lock_file
        self.use_lock(lock.stem, lock.read_text(encoding="utf-8"))
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

    def _copy_project(self) -> None:
        for name in ("kohya_mps", "config", "constraints"):
            shutil.copytree(ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "tasks.py", self.project)
        path = self.project / "config" / "settings.yaml"
        text, count = re.subn(
            r"^network_stall_seconds: .*$",
            f"network_stall_seconds: {STALL_SECONDS}",
            path.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
        assert count == 1
        path.write_text(text, encoding="utf-8")

    @property
    def quick_setup(self) -> tuple[str, ...]:
        """A set-up without the training step, which takes most of its time."""
        return ("setup", "--no-train-step")

    @property
    def setup_command(self) -> tuple[str, ...]:
        """What a user types behind ``invoke``; a stand-in for kohya_ss has no trainer to run."""
        return ("setup",) if self.real else self.quick_setup

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start ``invoke``; its children outlive it when it is killed, as they would a user's."""
        return self._start([str(Path(sys.prefix) / "bin" / "invoke"), *arguments], variables)

    def start_python(self, code: str, **variables: str) -> subprocess.Popen[str]:
        """Start a call of the copied package that ``invoke`` has no task for."""
        return self._start([sys.executable, "-c", code], variables)

    def invoke(self, *arguments: str, **variables: str) -> Ran:
        """Run ``invoke`` to its end."""
        return _finish(self.start(*arguments, **variables))

    def python(self, code: str, **variables: str) -> Ran:
        """Run a call of the copied package to its end."""
        return _finish(self.start_python(code, **variables))

    def _start(self, command: list[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.project,
            env={**self.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def use_lock(self, name: str, text: str) -> None:
        """Write a lock into the copy; faults change this one from now on."""
        self.lock = self.project / "constraints" / f"{name}.txt"
        self._pristine, self._editions = text, 0
        self.lock.write_text(text, encoding="utf-8")

    def use_small_lock(self, text: str) -> None:
        """Add a profile with a small lock, which needs almost no disk."""
        rules = msgspec.structs.replace(self.profile, lock=SMALL_PROFILE, disk_gb={"darwin": 0, "linux": 0})
        profile = self.project / "config" / "profiles" / f"{SMALL_PROFILE}.yaml"
        profile.write_bytes(yaml.safe_dump(msgspec.to_builtins(rules)).encode())
        self.use_lock(SMALL_PROFILE, text)

    def new_lock(self) -> None:
        """Change the lock's bytes and none of its packages, so that the next run has to rebuild."""
        self._editions += 1
        self.lock.write_text(f"{self._pristine}# edition {self._editions}\n", encoding="utf-8")

    def report(self, *arguments: str, **variables: str) -> tuple[Ran, _JsonReport]:
        """Run ``invoke … --json`` and read its report."""
        ran = self.invoke(*arguments, "--json", **variables)
        try:
            return ran, msgspec.json.decode(ran.out, type=_JsonReport)
        except msgspec.DecodeError as error:
            raise NotSurvived(
                f"{' '.join(arguments)} printed no report ({error}): {ran.last_lines}"
            ) from error

    def assert_recovers(self) -> None:
        """Check that one rerun ends good and leaves nothing behind."""
        ran, report = self.report(*self.quick_setup)
        expect(ran.code == 0 and report.ok, f"the rerun ended with {ran.code}: {ran.last_lines}")
        self.assert_healthy()

    def assert_healthy(self) -> None:
        """Check that status finds nothing wrong and that no unfinished work is left."""
        ran, report = self.report("status")
        wrong = [f"{c.name}: {c.detail}" for c in report.checks if c.status is Status.FAIL]
        expect(ran.code == 0 and not wrong, f"status ended with {ran.code}: {wrong or ran.last_lines}")
        self.assert_no_leftovers()

    def assert_no_leftovers(self) -> None:
        """Check that no half-built generation, temporary file or process of an ended run is left."""
        half = [g.name for g in generations.present(self.home) if g.manifest() is None]
        expect(not half, f"half-built generations are left: {half}")
        left = [str(path.relative_to(self.root)) for path in self._temporary_files()]
        expect(not left, f"temporary files are left: {left}")
        running = processes_of(self.home)
        expect(not running, f"processes are left: {running}")

    def _temporary_files(self) -> Iterator[Path]:
        yield from (path for path in self.temporary.iterdir() if not _torchs(path))
        yield from self.home.root.glob(".*.new")
        yield from self.home.state.glob("moving-*")
        for directory in (self.home.state, *self.home.generations.glob("*")):
            yield from directory.glob(".*")
            yield from directory.glob("smoke")
        for repository in (self.home.root / ".git", self.home.sd_scripts / ".git"):
            yield from repository.glob("*.lock")
            yield from repository.glob("refs/**/*.lock")

    def active_is_whole(self) -> None:
        """Check that the active environment is complete and unchanged since it was built."""
        active = self.active()
        manifest = active.manifest()
        assert manifest  # it would not be active without
        drift = inventory.differences(manifest.inventory, inventory.take(active.venv))
        expect(not drift, f"the active environment changed: {[d.name for d in drift[:5]]}")

    def active(self) -> Generation:
        """The generation that the link to the environment leads to."""
        found = generations.active(self.home)
        if found is None:
            raise NotSurvived(f"{self.home.venv} leads to no complete generation")
        return found

    def active_passes_smoke(self) -> None:
        """Check that the active environment is whole and that the smoke check passes in it."""
        self.active_is_whole()
        self.python(SMOKE).assert_code(0, "the smoke check of the active environment")

    def install(self) -> None:
        """Make sure that there is a good installation."""
        if generations.active(self.home) is None:
            say("  installing what the faults damage")
            self.invoke(*self.setup_command).assert_code(0, "the set-up that the faults need")

    def remove(self) -> None:
        """Remove the installation and its default configuration."""
        end_processes(self.home)
        for path in (self.home.root, self.root / "huggingface", self.temporary):
            if path.exists():
                shutil.rmtree(path)
        self.temporary.mkdir()


def _torchs(path: Path) -> bool:
    """Whether torch left this in the system's temporary directory when a training was killed.

    torch is not made to put it elsewhere: its sockets are there too, and a path inside a home may
    be too long for a socket.
    """
    its = {"_remote_module_non_scriptable.py", "__pycache__"}
    return path.is_dir() and {entry.name for entry in path.iterdir()} <= its


def _finish(process: subprocess.Popen[str]) -> Ran:
    began = time.monotonic()
    out, err = process.communicate()
    return Ran(process.returncode, out, err, time.monotonic() - began)


def processes_of(home: Installation) -> list[psutil.Process]:
    """The processes that work on a home: all of ours have its variable."""
    return find_processes(lambda process: process.environ().get("KOHYA_HOME") == str(home.root))


def end_processes(home: Installation) -> None:
    """Kill what works on a home that is about to be removed."""
    left = processes_of(home)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


class Attempts:
    """Counts the tries of one fault, and notes those that were not survived."""

    def __init__(self, fault: str, testbed: Testbed) -> None:
        self.fault, self._testbed = fault, testbed
        self.tries, self.failures = 0, list[str]()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One try; when it is not survived, the next one begins with a new installation."""
        self.tries += 1
        say(f"{self.fault}, try {self.tries}: {what}")
        try:
            yield
        except CannotTry:
            raise
        except Exception as error:
            # Whatever it was: an hour of other tries must not be lost with this one.
            reason = str(error) if isinstance(error, NotSurvived) else f"{type(error).__name__}: {error}"
            say(f"  DID NOT SURVIVE: {reason}")
            self.failures.append(f"{what}: {reason}")
            self._testbed.remove()

    def done(self, checked: str) -> Row:
        """The fault's row, when all its tries are over."""
        say(f"{self.fault}: {self.tries - len(self.failures)} of {self.tries} survived")
        return Row(self.fault, self.tries, self.tries - len(self.failures), checked, tuple(self.failures))
