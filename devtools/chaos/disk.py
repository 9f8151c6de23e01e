"""A disk that is full, or that cannot be written."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from kohya_mps.core.installation import STATE
from kohya_mps.core.process import capture
from kohya_mps.install import generations

from .testbed import REBUILD, SMALL, Attempts, CannotTry, Ran, Row, Testbed, expect


@contextlib.contextmanager
def mounted(at: Path, *options: str) -> Iterator[None]:
    """Mount a file system for as long as the block runs.

    Raises:
        CannotTry: this user may not mount, or this is not Linux.
    """
    if os.geteuid() or not sys.platform.startswith("linux"):
        raise CannotTry("mounting a file system needs root on Linux")
    at.mkdir(parents=True, exist_ok=True)
    done = capture(["mount", *options, at])
    if done.returncode:
        raise CannotTry(f"mounting is not allowed on this machine: {done.stderr.strip()}")
    try:
        yield
    finally:
        capture(["umount", "--lazy", at])


@contextlib.contextmanager
def small_disk(testbed: Testbed, megabytes: int) -> Iterator[None]:
    """Put the home on a disk of its own, of this size."""
    testbed.remove()
    with mounted(testbed.home.root, "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs"):
        yield
    testbed.home.root.rmdir()


def resize(testbed: Testbed, megabytes: int) -> None:
    """Make the small disk larger and keep what is on it."""
    done = capture(["mount", "-o", f"remount,size={megabytes}m", testbed.home.root])
    expect(done.returncode == 0, f"the small disk cannot be made larger: {done.stderr.strip()}")


def disk_refused(testbed: Testbed) -> Row:
    """Too little space, noticed before anything is touched."""
    attempts = Attempts("disk full, seen before it begins", testbed)
    with attempts.attempt("a disk of 500 MB"), small_disk(testbed, 500):
        ran, report = testbed.report("setup")
        needed = testbed.profile.disk_gb["darwin" if sys.platform == "darwin" else "linux"]
        machine = report.check("machine")
        expect(ran.code == 1 and machine, f"ended with {ran.code}: {ran.last_lines}")
        expect(machine and f"{needed:g} GB" in machine.detail, f"does not say how much it needs: {machine}")
        expect(not any(testbed.home.root.iterdir()), "something was written all the same")
    return attempts.done("refused with exit 1 and the gigabytes that are needed, nothing written")


def disk_full_checkout(testbed: Testbed) -> Row:
    """The disk fills up while git writes the checkout."""
    testbed.remove()
    testbed.invoke("clone").assert_code(0, "an undisturbed checkout")
    size = sum(p.lstat().st_blocks * 512 for p in testbed.home.root.rglob("*") if _of_checkout(testbed, p))
    attempts = Attempts("disk full, in the checkout", testbed)
    for share in (0.3, 0.6, 0.9):
        megabytes = max(1, int(size * share / 1e6))
        with attempts.attempt(f"{megabytes} MB for {size / 1e6:.0f} MB"), small_disk(testbed, megabytes):
            _assert_says_full(testbed.invoke("clone"))
            resize(testbed, 4 * megabytes + 200)
            testbed.invoke("clone").assert_code(0, "the rerun with space")
    return attempts.done(
        "invoke clone ends with exit 1 and says so; with space again the same command ends good"
    )


def _of_checkout(testbed: Testbed, path: Path) -> bool:
    inside = path.relative_to(testbed.home.root).parts
    return inside[0] not in (STATE, "venv") and not path.is_dir()


def disk_full_environment(testbed: Testbed) -> Row:
    """The disk fills up while an environment is built: a first one, and one that replaces another."""
    attempts = Attempts("disk full, in the environment", testbed)
    testbed.remove()
    testbed.python(REBUILD).assert_code(0, "an undisturbed build")
    manifest = testbed.active().manifest()
    assert manifest
    size = manifest.inventory.bytes / 1e6
    for share in (0.2, 0.5, 0.9):
        with attempts.attempt(f"fresh, space for {share:.0%}"), small_disk(testbed, int(size * share)):
            _assert_says_full(testbed.python(REBUILD))
            expect(not os.path.lexists(testbed.home.venv), "something half-built is active")
            testbed.assert_no_leftovers()
            resize(testbed, int(size * 3))
            _build_with_space(testbed)
        with attempts.attempt(f"rebuild, space for {share:.0%}"), small_disk(testbed, int(size * 3)):
            testbed.python(REBUILD).assert_code(0, "the first build")
            before = generations.active(testbed.home)
            used = shutil.disk_usage(testbed.home.root).used / 1e6
            resize(testbed, int(used + size * share))
            testbed.new_lock()
            _assert_says_full(testbed.python(REBUILD))
            expect(generations.active(testbed.home) == before, "another environment is active")
            testbed.active_is_whole()
            testbed.assert_no_leftovers()
            resize(testbed, int(size * 4))
            _build_with_space(testbed)
            expect(generations.active(testbed.home) != before, "the new lock was not built")
    return attempts.done(
        f"`nox -s venv`'s step with a stand-in lock ({', '.join(SMALL)}; {size:.0f} MB): exit 1 and says so, the "
        "environment before it active and unchanged or none at all; with space again the same command ends good"
    )


def _build_with_space(testbed: Testbed) -> None:
    testbed.python(REBUILD).assert_code(0, "the rerun with space")
    testbed.active_is_whole()


def _assert_says_full(ran: Ran) -> None:
    ran.assert_code(1)
    text = (ran.out + ran.err).lower()
    expect("traceback" not in text, f"a traceback: {ran.last_lines}")
    expect(
        "disk is full" in text or "no space left" in text,
        f"does not say that the disk is full: {ran.last_lines}",
    )


def read_only(testbed: Testbed) -> Row:
    """A home that cannot be written."""
    attempts = Attempts("read-only home", testbed)
    testbed.install()
    with attempts.attempt("an installed home, nothing to do"):
        with not_writable(testbed.home.root):
            _assert_refused(testbed.invoke("setup"))
            testbed.invoke("status").assert_code(0, "status")
        testbed.active_passes_smoke()
        testbed.assert_recovers()
    with attempts.attempt("an installed home, a new lock"):
        testbed.install()
        testbed.new_lock()
        with not_writable(testbed.home.root):
            _assert_refused(testbed.invoke("setup"))
        testbed.active_passes_smoke()
        testbed.assert_recovers()
    with attempts.attempt("an empty home"):
        testbed.remove()
        testbed.home.root.mkdir()
        with not_writable(testbed.home.root):
            _assert_refused(testbed.invoke("setup"))
        testbed.assert_recovers()
    return attempts.done(
        "refused in one sentence, nothing changed, status still works; writable again, it ends good"
    )


@contextlib.contextmanager
def not_writable(path: Path) -> Iterator[None]:
    """Make a directory read-only: for root with a mount, for any other user with its mode."""
    if os.geteuid() == 0:
        with mounted(path, "--bind", str(path)):
            done = capture(["mount", "-o", "remount,ro,bind", path])
            if done.returncode:
                raise CannotTry(f"mounting is not allowed on this machine: {done.stderr.strip()}")
            yield
        return
    modes = {each: each.stat().st_mode for each in (path, path / STATE) if each.is_dir()}
    for each in modes:
        each.chmod(0o555)
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.chmod(mode)


def _assert_refused(ran: Ran) -> None:
    expect(ran.code in (1, 2), f"ended with {ran.code}: {ran.last_lines}")
    expect("Traceback" not in ran.err, f"a traceback: {ran.last_lines}")
    expect(
        "writable" in ran.err + ran.out or "ermission" in ran.err + ran.out,
        f"does not say why: {ran.last_lines}",
    )
