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
def small_disk(place: Testbed, megabytes: int) -> Iterator[None]:
    """Give the home a disk of its own, of this size."""
    place.remove()
    with mounted(place.home.root, "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs"):
        yield
    place.home.root.rmdir()


def resize(place: Testbed, megabytes: int) -> None:
    """Free space on the small disk, without touching what is on it."""
    done = capture(["mount", "-o", f"remount,size={megabytes}m", place.home.root])
    expect(done.returncode == 0, f"the small disk cannot be made larger: {done.stderr.strip()}")


def disk_refused(place: Testbed) -> Row:
    """Too little room, noticed before anything is touched."""
    row = Attempts("disk full, seen before it begins")
    with row.attempt("a disk of 500 MB", place), small_disk(place, 500):
        ran, report = place.told("setup")
        needed = place.profile.disk_gb["darwin" if sys.platform == "darwin" else "linux"]
        machine = next((check for check in report.checks if check.name == "machine"), None)
        expect(ran.code == 1 and machine, f"ended with {ran.code}: {ran.said}")
        expect(machine and f"{needed:g} GB" in machine.detail, f"does not say how much it needs: {machine}")
        expect(not any(place.home.root.iterdir()), "something was written all the same")
    return row.done("refused with exit 1 and the gigabytes that are needed, nothing written")


def disk_full_checkout(place: Testbed) -> Row:
    """The disk fills up while git writes the checkout."""
    place.remove()
    ran = place.invoke("clone")
    expect(ran.code == 0, f"a checkout that was left alone failed: {ran.said}")
    size = sum(p.lstat().st_blocks * 512 for p in place.home.root.rglob("*") if _of_checkout(place, p))
    row = Attempts("disk full, in the checkout")
    for share in (0.3, 0.6, 0.9):
        megabytes = max(1, int(size * share / 1e6))
        with row.attempt(f"{megabytes} MB for {size / 1e6:.0f} MB", place), small_disk(place, megabytes):
            ran = place.invoke("clone")
            _full(ran)
            resize(place, 4 * megabytes + 200)
            ran = place.invoke("clone")
            expect(ran.code == 0, f"with room again it ended with {ran.code}: {ran.said}")
    return row.done("invoke clone ends with exit 1 and says so; with room again the same command ends good")


def _of_checkout(place: Testbed, path: Path) -> bool:
    inside = path.relative_to(place.home.root).parts
    return inside[0] not in (STATE, "venv") and not path.is_dir()


def disk_full_environment(place: Testbed) -> Row:
    """The disk fills up while an environment is built: a first one, and one that replaces another."""
    row = Attempts("disk full, in the environment")
    place.remove()
    ran = place.python(REBUILD)
    expect(ran.code == 0, f"the small environment cannot be built: {ran.said}")
    manifest = place.active().manifest()
    assert manifest
    size = manifest.inventory.bytes / 1e6
    for share in (0.2, 0.5, 0.9):
        with row.attempt(f"fresh, room for {share:.0%}", place), small_disk(place, int(size * share)):
            _full(place.python(REBUILD))
            expect(not os.path.lexists(place.home.venv), "something half-built is active")
            place.assert_no_leftovers()
            resize(place, int(size * 3))
            ran = place.python(REBUILD)
            expect(ran.code == 0, f"with room again it ended with {ran.code}: {ran.said}")
            place.active_is_whole()
        with row.attempt(f"rebuild, room for {share:.0%}", place), small_disk(place, int(size * 3)):
            ran = place.python(REBUILD)
            expect(ran.code == 0, f"the first build ended with {ran.code}: {ran.said}")
            before = generations.active(place.home)
            used = shutil.disk_usage(place.home.root).used / 1e6
            resize(place, int(used + size * share))
            place.new_lock()
            _full(place.python(REBUILD))
            expect(generations.active(place.home) == before, "another environment is active")
            place.active_is_whole()
            place.assert_no_leftovers()
            resize(place, int(size * 4))
            ran = place.python(REBUILD)
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


def read_only(place: Testbed) -> Row:
    """A home that cannot be written."""
    row = Attempts("read-only home")
    place.install()
    with row.attempt("an installed home, nothing to do", place):
        with not_writable(place.home.root):
            _refused(place.invoke("setup"))
            ran = place.invoke("status")
            expect(ran.code == 0, f"status ended with {ran.code}: {ran.said}")
        place.active_passes_smoke()
        place.assert_recovers()
    with row.attempt("an installed home, a new lock", place):
        place.install()
        place.new_lock()
        with not_writable(place.home.root):
            _refused(place.invoke("setup"))
        place.active_passes_smoke()
        place.assert_recovers()
    with row.attempt("an empty home", place):
        place.remove()
        place.home.root.mkdir()
        with not_writable(place.home.root):
            _refused(place.invoke("setup"))
        place.assert_recovers()
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
