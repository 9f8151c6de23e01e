"""Files that are damaged, deleted or edited, and times that lie in the future."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from kohya_mps.core.process import capture
from kohya_mps.core.report import Status
from kohya_mps.install import generations, inventory

from .testbed import REBUILD, SMALL, Attempts, Row, Testbed, expect


def checkout_damaged(testbed: Testbed) -> Row:
    """Make objects of the checkout unreadable while a file of it has a change of the user's."""
    attempts = Attempts("corrupted object in the checkout", testbed)
    testbed.install()
    for tree in (testbed.home.root, testbed.home.sd_scripts):
        for what, damage in DAMAGES.items():
            with attempts.attempt(f"{tree.name}: {what}"):
                testbed.install()
                _assert_survives(testbed, tree, damage)
    return attempts.done(
        "kohya_ss and sd-scripts, each with a file that the user changed: it is never overwritten, and named "
        "until --stash puts it away; then the set-up ends good and the stash holds the change"
    )


def _assert_survives(testbed: Testbed, tree: Path, damage: Callable[[Path], object]) -> None:
    listed = capture(["git", "-C", tree, "ls-files", "*.py"]).stdout.split()
    mine, untracked = tree / listed[0], tree / "my-model.safetensors"
    changed = mine.read_bytes() + b"\n# mine\n"
    mine.write_bytes(changed)
    untracked.write_bytes(b"mine")
    damage(tree)
    ran, report = testbed.report(*testbed.quick_setup)
    expect(mine.read_bytes() == changed, f"{listed[0]} was overwritten: {ran.last_lines}")
    row = report.check("checkout")
    named = row is not None and row.status is Status.FAIL and listed[0] in row.detail
    expect(ran.code == 1 and named, f"the changed file was not named ({ran.code}): {ran.last_lines}")
    testbed.invoke(*testbed.quick_setup, "--stash").assert_code(0, "with --stash it")
    stashed = capture(["git", "-C", tree, "stash", "show", "--patch"]).stdout
    expect("+# mine" in stashed, "the stash does not hold the change")
    expect(untracked.read_bytes() == b"mine", "the user's own file is gone")
    testbed.assert_recovers()
    untracked.unlink()
    for aside in tree.glob(".git.damaged*"):
        shutil.rmtree(aside)


def cut_pack(tree: Path) -> None:
    """Cut the largest pack of a repository in half, or each object where there is no pack."""
    packs = sorted((tree / ".git" / "objects" / "pack").glob("*.pack"), key=lambda path: path.stat().st_size)
    for path in packs[-1:] or [p for p in (tree / ".git" / "objects").glob("??/*") if p.is_file()]:
        path.chmod(0o644)
        os.truncate(path, path.stat().st_size // 2)


def loose_object(tree: Path, name: str) -> Path:
    """The file of an object; packs are unpacked first, so that it has one."""
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
    """Empty an object, as a power cut leaves a file that was never flushed."""
    path = loose_object(tree, name)
    path.chmod(0o644)
    os.truncate(path, 0)


def remove_object(tree: Path, name: str) -> None:
    """Delete an object."""
    loose_object(tree, name).unlink()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "pack cut in half": cut_pack,
    "commit zeroed": lambda tree: zero_object(tree, "HEAD"),
    "commit missing": lambda tree: remove_object(tree, "HEAD"),
    "tree zeroed": lambda tree: zero_object(tree, "HEAD^{tree}"),
    "HEAD emptied": lambda tree: (tree / ".git" / "HEAD").write_bytes(b""),
    "config zeroed": lambda tree: (tree / ".git" / "config").write_bytes(bytes(300)),
    "index missing": lambda tree: (tree / ".git" / "index").unlink(),
}


def file_deleted(testbed: Testbed) -> Row:
    """Delete files of the active environment."""
    attempts = Attempts("deleted file in the environment", testbed)
    for name in ("torch/nn/functional.py", "accelerate/accelerator.py", "einops-*.dist-info/METADATA"):
        with attempts.attempt(name):
            testbed.install()
            active = testbed.active()
            next(inventory.site_packages(active.venv).glob(name)).unlink()
            ran, report = testbed.report("status")
            expect(ran.code == 1 and not report.ok, "status does not see it")
            testbed.assert_recovers()
            testbed.active_is_whole()
    return attempts.done("status sees it; one set-up ends good")


def file_edited(testbed: Testbed) -> Row:
    """Edit files of the active environment in place, and with them uv's cache behind the link."""
    attempts = Attempts("edited file in the environment", testbed)
    variables = {"UV_CACHE_DIR": str(testbed.root / "own-cache")}
    edits: dict[str, Callable[[Path], object]] = {
        "a line appended": lambda path: path.write_bytes(path.read_bytes() + b"raise SystemExit\n"),
        "a byte changed": lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]),
        "emptied": lambda path: path.write_bytes(b""),
    }
    for what, edit in edits.items():
        with attempts.attempt(what):
            testbed.python(REBUILD, **variables).assert_code(0, "the build before the edit")
            before = testbed.active()
            edited = inventory.site_packages(before.venv) / "einops" / "__init__.py"
            linked = edited.stat().st_nlink > 1
            edit(edited)
            testbed.python(REBUILD, **variables).assert_code(0, "the rerun")
            testbed.active_is_whole()
            active = testbed.active()
            bad = inventory.damaged(active.venv, SMALL)
            expect(not bad, f"the edit came back from uv's cache (linked: {linked}): {bad}")
            started = capture([active.python, "-c", "import einops"])
            expect(started.returncode == 0, f"the edited package does not import: {started.stderr.strip()}")
            testbed.assert_no_leftovers()
    testbed.remove()
    shutil.rmtree(testbed.root / "own-cache", ignore_errors=True)
    return attempts.done(
        f"`nox -s venv`'s step with a stand-in lock ({', '.join(SMALL)}) and a uv cache of its own: every file of "
        "the new environment has the digest of its wheel"
    )


def lock_wrong(testbed: Testbed) -> Row:
    """Write a digest into the lock that no wheel has."""
    attempts = Attempts("wrong hash in the lock", testbed)
    for package in ("einops", "accelerate"):
        with attempts.attempt(package):
            testbed.install()
            before = generations.active(testbed.home)
            good = testbed.lock.read_text(encoding="utf-8")
            testbed.lock.write_text(wrong_digest(good, package), encoding="utf-8")
            try:
                ran, _ = testbed.report(*testbed.quick_setup)
            finally:
                testbed.lock.write_text(good, encoding="utf-8")
            ran.assert_code(1)
            named = testbed.lock.name in ran.out and package in ran.err
            expect(named, f"does not name lock and package: {ran.last_lines}")
            expect(generations.active(testbed.home) == before, "another environment is active")
            testbed.active_passes_smoke()
            testbed.assert_no_leftovers()
            testbed.assert_recovers()
    return attempts.done(
        "exit 1, lock and package named, the environment before it active and through the smoke check; with the "
        "lock restored the set-up ends good"
    )


def wrong_digest(lock: str, package: str) -> str:
    """The text of a lock in which one package's digests are wrong."""
    pin = re.search(rf"^{package}==.*(?:(?<=\\)\n.*)*", lock, flags=re.MULTILINE)
    assert pin, package
    wrong = re.sub(
        r"(?<=sha256:)[0-9a-f]{64}", lambda found: hashlib.sha256(found[0].encode()).hexdigest(), pin[0]
    )
    return lock[: pin.start()] + wrong + lock[pin.end() :]


def clock_back(testbed: Testbed) -> Row:
    """Set back a clock that was a day ahead: everything that was written is in the future."""
    attempts = Attempts("clock set back", testbed)
    with attempts.attempt("a day"):
        testbed.install()
        _move_a_day_ahead(testbed.home.state)
        before = generations.active(testbed.home)
        testbed.assert_recovers()
        expect(generations.active(testbed.home) == before, "it was built again")
        testbed.new_lock()
        testbed.assert_recovers()
        after = generations.active(testbed.home)
        expect(after != before, "the new lock was not built")
        for expected, what in ((before, "rollback"), (after, "rollback of the rollback")):
            testbed.invoke("rollback").assert_code(0, what)
            expect(generations.active(testbed.home) == expected, f"{what} went elsewhere")
            testbed.assert_healthy()
    return attempts.done(
        "nothing is rebuilt; a rebuild becomes active, rollback goes back and forth between the two"
    )


def _move_a_day_ahead(directory: Path) -> None:
    """Move the times of what this project writes a day ahead.

    Times inside the environments stay: a clock that is set back does not change them, and the
    manifest records them; uv's cache also links to most of those files.
    """
    day = 24 * 3600 * 10**9
    for path in (directory, *directory.rglob("*")):
        if "venv" not in path.relative_to(directory).parts:
            stat = path.lstat()
            times = (stat.st_atime_ns + day, stat.st_mtime_ns + day)
            os.utime(path, ns=times, follow_symlinks=False)
