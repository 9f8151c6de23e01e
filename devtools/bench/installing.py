"""What installing costs: environments, the Mac's wheels, a set-up with nothing to do, the list of tasks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kohya_mps.core.installation import Installation
from kohya_mps.core.process import uv
from kohya_mps.core.settings import Settings
from kohya_mps.install import environment, lockfile
from kohya_mps.install.generations import installed

from .comparison import Comparison, medians, own_environ, run_command, tool


def venv(settings: Settings, scratch: Path, times: int) -> list[Comparison]:
    """Build an environment with the packages in uv's cache."""
    lock = str(settings.profile.lock_file)
    python = environment.find_python(settings.profile).path

    def ours() -> float:
        home = scratch / "home"
        seconds = run_command([tool("nox"), "-s", "venv"], env=own_environ(KOHYA_HOME=str(home))).seconds
        shutil.rmtree(home)
        return seconds

    def bare() -> float:
        path = scratch / "bare"
        sync = [uv(), "pip", "sync", "--python", str(path / "bin/python"), "--require-hashes", lock]
        seconds = run_command([uv(), "venv", "--python", python, str(path)]).seconds
        seconds += run_command(sync).seconds
        shutil.rmtree(path)
        return seconds

    measured = medians(times, ours, bare)
    return [Comparison("nox -s venv, warm cache", "uv venv and uv pip sync", measured, "s", 1.3)]


def payload(settings: Settings, scratch: Path, times: int) -> list[Comparison]:
    """Install the wheels that a Mac gets, on any machine."""
    lock, target, version = _mac_lock(settings, scratch), scratch / "payload", settings.profile.python
    wheels_only = ["--require-hashes", "--only-binary", ":all:", "--python-version", version]
    tags = [f"macosx_{major}_0_{kind}" for major in range(11, 15) for kind in ("arm64", "universal2")]
    tags += ["macosx_10_9_universal2", "macosx_10_13_universal2"]

    def timed(command: Sequence[str]) -> float:
        seconds = run_command([*command, "--target", str(target), "-r", str(lock)]).seconds
        shutil.rmtree(target)
        return seconds

    def ours() -> float:
        return timed([uv(), "pip", "install", "--python-platform", "aarch64-apple-darwin", *wheels_only])

    def pip() -> float:
        platforms = [part for tag in tags for part in ("--platform", tag)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        return timed([*command, *wheels_only, *platforms])

    measured = medians(min(times, 2), ours, pip)
    return [Comparison("macOS payload with uv", "pip install", measured, "s", 0.05)]


def _mac_lock(settings: Settings, scratch: Path) -> Path:
    """The Mac's part of the lock: pip evaluates markers for the machine that it runs on."""
    pins = lockfile.read(settings.profile.lock_file).pins
    on_a_mac = [pin for pin in pins if pin.applies(lockfile.MAC_ARM64)]
    lines = [" ".join([f"{p.name}=={p.version}", *(f"--hash={h}" for h in p.hashes)]) for p in on_a_mac]
    path = scratch / "mac.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def nothing_to_do(settings: Settings, _scratch: Path, times: int) -> list[Comparison]:
    """Run a set-up on a good installation, and the status of it."""
    generation = installed(Installation(settings.home))
    lock, python = str(settings.profile.lock_file), str(generation.python)

    def setup() -> float:
        return run_command([tool("invoke"), "setup", "--no-verify"], env=own_environ()).seconds

    def bare() -> float:
        seconds = run_command(["git", "-C", str(settings.home), "status"]).seconds
        dry = [uv(), "pip", "sync", "--dry-run", "--python", python, "--require-hashes", lock]
        return seconds + run_command(dry).seconds

    def status() -> float:
        return run_command([tool("invoke"), "status"], env=own_environ()).seconds

    of_setup, of_bare, of_status = medians(times, setup, bare, status)
    against = "git status and uv pip sync --dry-run"
    return [
        Comparison("invoke setup --no-verify, nothing to do", against, (of_setup, of_bare), "s", 3),
        Comparison("invoke status", against, (of_status, of_bare), "s", 3),
    ]


def list_of_tasks(_settings: Settings, scratch: Path, times: int) -> list[Comparison]:
    """Print the list of tasks."""
    source = "from invoke.tasks import task\n\n\n@task\ndef nothing(c):\n    pass\n"
    (scratch / "tasks.py").write_text(source, encoding="utf-8")

    def ours() -> float:
        return run_command([tool("invoke"), "--list"], env=own_environ()).seconds

    def bare() -> float:
        return run_command([tool("invoke"), "--list"], env=own_environ(), cwd=scratch).seconds

    # An eighth of a second each: with few runs the medians differ by more than the margin.
    measured = medians(max(times, 40), ours, bare)
    return [Comparison("invoke --list", "invoke --list of an empty tasks.py", measured, "s", 1.1)]


def second_generation(settings: Settings, scratch: Path, _times: int) -> list[Comparison]:
    """Build a second environment, and count the disk space that it adds."""
    lock = lockfile.read(settings.profile.lock_file)
    python = environment.find_python(settings.profile).path
    trees = scratch / "first", scratch / "second"
    for tree in trees:
        environment.install(tree, python, lock)
    first, both = disk_usage(trees[0]), disk_usage(*trees)
    measured = ((both - first) / 1e6, first / 1e6)
    return [Comparison("disk of a second generation", "the first", measured, "MB", 0.05)]


def disk_usage(*trees: Path) -> int:
    """Bytes on disk; a file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for tree in trees:
        for directory, folders, files in os.walk(tree):
            for name in (*folders, *files):
                stat = os.lstat(os.path.join(directory, name))  # noqa: PTH118 -- 25,000 times
                seen[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(seen.values())
