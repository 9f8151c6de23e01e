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


def checkout_damaged(place: Testbed) -> Row:
    """Objects of the checkout that cannot be read, with a file that the user changed."""
    row = Attempts("corrupted object in the checkout")
    place.install()
    for tree in (place.home.root, place.home.sd_scripts):
        for what, damage in DAMAGES.items():
            with row.attempt(f"{tree.name}: {what}", place):
                place.install()
                _survives_damage(place, tree, damage)
    return row.done(
        "kohya_ss and sd-scripts, each with a file that the user changed: it is never written over, and named "
        "until --stash puts it away; then the set-up ends good and the stash holds the change"
    )


def _survives_damage(place: Testbed, tree: Path, damage: Callable[[Path], object]) -> None:
    listed = capture(["git", "-C", tree, "ls-files", "*.py"]).stdout.split()
    mine, beside = tree / listed[0], tree / "my-model.safetensors"
    changed = mine.read_bytes() + b"\n# mine\n"
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
    place.assert_recovers()
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


DAMAGES: dict[str, Callable[[Path], object]] = {
    "pack cut in half": cut_pack,
    "commit zeroed": lambda tree: zero_object(tree, "HEAD"),
    "commit missing": lambda tree: remove_object(tree, "HEAD"),
    "tree zeroed": lambda tree: zero_object(tree, "HEAD^{tree}"),
    "HEAD emptied": lambda tree: (tree / ".git" / "HEAD").write_bytes(b""),
    "config zeroed": lambda tree: (tree / ".git" / "config").write_bytes(bytes(300)),
    "index missing": lambda tree: (tree / ".git" / "index").unlink(),
}


def file_deleted(place: Testbed) -> Row:
    """Files that are gone from the active environment."""
    row = Attempts("deleted file in the environment")
    for name in ("torch/nn/functional.py", "accelerate/accelerator.py", "einops-*.dist-info/METADATA"):
        with row.attempt(name, place):
            place.install()
            active = place.active()
            next(inventory.site_packages(active.venv).glob(name)).unlink()
            ran, report = place.told("status")
            expect(ran.code == 1 and not report.ok, "status does not see it")
            place.assert_recovers()
            place.active_is_whole()
    return row.done("status sees it; one set-up ends good")


def file_edited(place: Testbed) -> Row:
    """Files of the active environment that were edited in place, and with them uv's cache behind the link."""
    row = Attempts("edited file in the environment")
    variables = {"UV_CACHE_DIR": str(place.root / "own-cache")}
    edits: dict[str, Callable[[Path], object]] = {
        "a line appended": lambda path: path.write_bytes(path.read_bytes() + b"raise SystemExit\n"),
        "a byte changed": lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]),
        "emptied": lambda path: path.write_bytes(b""),
    }
    for what, edit in edits.items():
        with row.attempt(what, place):
            ran = place.python(REBUILD, **variables)
            expect(ran.code == 0, f"no environment to try this on: {ran.said}")
            before = place.active()
            edited = inventory.site_packages(before.venv) / "einops" / "__init__.py"
            linked = edited.stat().st_nlink > 1
            edit(edited)
            ran = place.python(REBUILD, **variables)
            expect(ran.code == 0, f"the rerun ended with {ran.code}: {ran.said}")
            place.active_is_whole()
            active = place.active()
            bad = inventory.damaged(active.venv, SMALL)
            expect(not bad, f"the new environment has the edit, out of uv's cache (linked: {linked}): {bad}")
            started = capture([active.python, "-c", "import einops"])
            expect(started.returncode == 0, f"the edited package does not import: {started.stderr.strip()}")
            place.assert_no_leftovers()
    place.remove()
    shutil.rmtree(place.root / "own-cache", ignore_errors=True)
    return row.done(
        f"`nox -s venv`'s step with a stand-in lock ({', '.join(SMALL)}) and a uv cache of its own: every file of "
        "the new environment has the digest of its wheel"
    )


def lock_wrong(place: Testbed) -> Row:
    """A lock with a digest that no wheel has."""
    row = Attempts("wrong hash in the lock")
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
            place.assert_no_leftovers()
            place.assert_recovers()
    return row.done(
        "exit 1, lock and package named, the environment before it active and through the smoke check; with the "
        "lock restored the set-up ends good"
    )


def wrong_digest(lock: str, package: str) -> str:
    """A lock's text with one package's digests made wrong."""
    pin = re.search(rf"^{package}==.*(?:(?<=\\)\n.*)*", lock, flags=re.MULTILINE)
    assert pin, package
    wrong = re.sub(
        r"(?<=sha256:)[0-9a-f]{64}", lambda found: hashlib.sha256(found[0].encode()).hexdigest(), pin[0]
    )
    return lock[: pin.start()] + wrong + lock[pin.end() :]


def clock_back(place: Testbed) -> Row:
    """A clock that was a day ahead and was set back: everything that was written lies in the future."""
    row = Attempts("clock set back")
    with row.attempt("a day", place):
        place.install()
        _into_the_future(place.home.state)
        before = generations.active(place.home)
        place.assert_recovers()
        expect(generations.active(place.home) == before, "it was built again")
        place.new_lock()
        place.assert_recovers()
        after = generations.active(place.home)
        expect(after != before, "the new lock was not built")
        for wanted, what in ((before, "rollback"), (after, "rollback of the rollback")):
            ran = place.invoke("rollback")
            expect(ran.code == 0, f"{what} ended with {ran.code}: {ran.said}")
            expect(generations.active(place.home) == wanted, f"{what} went elsewhere")
            place.assert_healthy()
    return row.done(
        "nothing is rebuilt; a rebuild becomes active, rollback goes back and forth between the two"
    )


def _into_the_future(directory: Path) -> None:
    """Move the times of what this project writes a day ahead.

    Not those inside the environments: a clock that is set back does not change them, and the
    manifest has them as they are; uv's cache links to most of those files besides.
    """
    day = 24 * 3600 * 10**9
    for path in (directory, *directory.rglob("*")):
        if "venv" not in path.relative_to(directory).parts:
            stat = path.lstat()
            times = (stat.st_atime_ns + day, stat.st_mtime_ns + day)
            os.utime(path, ns=times, follow_symlinks=False)
