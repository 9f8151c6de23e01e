"""The environment: Python 3.11 and exactly the packages of a lock, checked by their hashes."""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
import time
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation, check_location
from kohya_mps.core.machine import expected_architecture, free_disk_gb, on_mac
from kohya_mps.core.process import capture, clean_environ, stream, uv
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import ROOT, Profile, Settings

from . import generations, inventory, lockfile, package_index
from .generations import Generation, Manifest


class Interpreter(msgspec.Struct, frozen=True):
    """A Python that environments are made with: its path, version and architecture."""

    path: str
    version: str
    machine: str


class Plan(msgspec.Struct, frozen=True):
    """What a build has to do.

    ``gui``: whether kohya's web page is installed too. ``usable``: a complete generation of
    the lock, as it was built. ``changed``: a generation of the lock that is no longer as it
    was built; ``differences`` says in what.
    """

    lock: lockfile.Lock
    gui: bool
    usable: Generation | None
    changed: Generation | None
    differences: tuple[inventory.Difference, ...]


def plan(settings: Settings, *, gui: bool | None = None) -> Plan:
    """Look for a generation of the profile's lock, and whether it is as it was built.

    Args:
        settings: the home and the profile.
        gui: with kohya's web page, or without it. None: as in the active generation, or the
            last one that was active.
    """
    if gui is None:
        latest = generations.latest(Installation(settings.home))
        gui = latest is not None and latest.has_gui()
    lock = lockfile.read(settings.profile.lock_for(gui=gui))
    changed: Generation | None = None
    differences: tuple[inventory.Difference, ...] = ()
    for generation in generations.present(Installation(settings.home)):
        manifest = generation.manifest()
        if manifest is None or manifest.lock != lock.digest or manifest.profile != settings.profile_name:
            continue
        found = inventory.differences(manifest.inventory, inventory.take(generation.venv))
        if not found and generation.python.exists():
            return Plan(lock, gui, generation, None, ())
        if changed is None:
            changed, differences = generation, tuple(found)
    return Plan(lock, gui, None, changed, differences)


def rebuild(settings: Settings) -> Report:
    """``nox -s venv``: build the environment and make it the active one.

    There is no checkout and no verification. The configuration is copied from the generation
    that was active before.
    """
    home = Installation(settings.home)
    check_location(home)
    with exclusive_lock(home):
        planned = plan(settings)
        generations.set_aside_foreign_venv(home, replace=False)
        generation, before = build(settings, planned), generations.active(home)
        if before and before.accelerate_config.exists() and not generation.accelerate_config.exists():
            write_atomic(generation.accelerate_config, before.accelerate_config.read_bytes())
        generations.activate(home, generation)
        gone = generations.prune(home, settings.generations_kept)
    how = "in place" if generation == planned.usable else "built"
    built = Check("environment", Status.PASS, f"{generation.name} {how}, active as {home.venv}")
    pruned = Check(
        "older generations", Status.PASS, f"removed {', '.join(gone)}" if gone else "none to remove"
    )
    return Report(f"Environment of {home.root}", (built, pruned), {"generation": generation.name})


def build(settings: Settings, planned: Plan | None = None) -> Generation:
    """Return a complete generation of the profile's lock; build it beside the active one if there is none.

    The result is not made active; :func:`kohya_mps.install.generations.activate` does that.

    Raises:
        UsageError: no fitting Python, too little disk, an unreadable lock.
        StepFailed: uv could not install the lock.
    """
    home, planned = Installation(settings.home), planned or plan(settings)
    if planned.usable:
        return planned.usable
    if planned.changed:
        names = [difference.name for difference in planned.differences]
        say(f"  {planned.changed.name} is not as it was built ({', '.join(names[:5])}): building it again")
        if edited := inventory.damaged(planned.changed.venv, names):
            # uv links files from its cache: what was edited here was edited there, too.
            capture([uv(), "cache", "clean", *edited])
    else:
        check_disk(home, settings.profile)
    interpreter = find_python(settings.profile)
    started = time.monotonic()
    generation = _fresh(home, settings, planned, interpreter)
    try:
        found = install(generation.venv, interpreter.path, planned.lock)
        manifest = Manifest(
            profile=settings.profile_name,
            lock=planned.lock.digest,
            python=interpreter.version,
            interpreter=interpreter.path,
            inventory=found,
            seconds=time.monotonic() - started,
            gui=planned.gui,
        )
        generation.complete(manifest)
    except BaseException:
        shutil.rmtree(generation.path, ignore_errors=True)
        raise
    return generation


def install(venv: Path, python: str, lock: lockfile.Lock) -> inventory.Inventory:
    """Make a new environment, install the lock into it with uv, and check the result.

    No version is resolved and no package is built from source. Files are linked or cloned
    from uv's cache, so that a second environment needs almost no disk.

    Raises:
        StepFailed: uv failed, or the environment does not match the lock.
    """
    make = capture(
        [uv(), "venv", "--quiet", "--no-project", "--prompt", "kohya_ss", "--python", python, venv], cwd=ROOT
    )
    if make.returncode:
        raise StepFailed(f"uv cannot make an environment in {venv}: {make.stderr.strip()}")
    sync(venv, lock)
    found = inventory.take(venv)
    if found.incomplete:
        names = ", ".join(found.incomplete)
        say(f"  files of {names} are damaged in uv's cache: fetching them again")
        capture([uv(), "cache", "clean", *found.incomplete])
        sync(venv, lock, reinstall=found.incomplete)
        found = inventory.take(venv)
    installed = {name: distribution.version for name, distribution in found.distributions.items()}
    wrong = compare(lock.versions(lockfile.here(on_mac())), installed)
    wrong += [f"{name} is incomplete" for name in found.incomplete]
    if wrong:
        raise StepFailed(f"the environment does not match the lock: {'; '.join(wrong[:5])}")
    return found


def sync(venv: Path, lock: lockfile.Lock, reinstall: tuple[str, ...] = ()) -> None:
    """Install exactly the lock's packages with ``uv pip sync``, and check their digests.

    First from uv's cache alone, without a network; then from the index; and only if that
    fails from the extra indexes that pip is configured with, too.

    Raises:
        StepFailed: with the reason: a hash, the disk, or uv's last line.
    """
    command = [uv(), "pip", "sync", "--python", str(venv / "bin" / "python"), "--require-hashes"]
    command += [
        "--only-binary",
        ":all:",
        *(f"--reinstall-package={name}" for name in reinstall),
        *(["--no-index"] if package_index.no_index() else []),
        str(lock.path),
    ]
    # Not in the checkout: its pyproject.toml would configure uv.
    environ = clean_environ(extra=package_index.for_uv())
    if capture([*command, "--offline"], cwd=ROOT, env=environ).returncode == 0:
        return
    done = stream(command, cwd=ROOT, env=environ)
    if done.returncode and (extra := package_index.extra_for_uv()):
        done = stream(command, cwd=ROOT, env=environ | extra)
    if done.returncode == 0:
        return
    if "Hash mismatch" in done.tail:
        raise StepFailed(
            f"a package does not have the hash that {lock.path.name} says (uv's message is above)",
            f"`git diff {lock.path.name}` shows whether the lock was changed; "
            "if it was not, the index or mirror serves another file",
        )
    if "No space left" in done.tail:
        raise StepFailed(
            f"the disk is full: {done.last_line}", "free some space, then run the same command again"
        )
    raise StepFailed(
        f"uv could not install {lock.path.name}: {done.last_line}",
        "check the network and the disk; the same command goes on from what is downloaded",
    )


def compare(locked: dict[str, str], found: dict[str, str]) -> list[str]:
    """The differences between the versions of a lock and of an environment, one line each."""
    lines = [
        f"{name} {version} is {found.get(name, 'missing')}"
        for name, version in sorted(locked.items())
        if found.get(name) != version
    ]
    return lines + [
        f"{name} {found[name]} is not in the lock" for name in sorted(found.keys() - locked.keys())
    ]


def find_python(profile: Profile) -> Interpreter:
    """Find a Python of the profile's version that is native to this machine.

    The one that runs this is taken where it fits. If there is none, uv downloads one.

    Raises:
        UsageError: there is none and none can be downloaded, or it does not run.
    """
    own = Interpreter(
        # Not resolved: Homebrew's links stay when the version that they point to goes.
        getattr(sys, "_base_executable", sys.executable),
        platform.python_version(),
        platform.machine(),
    )
    if own.version.startswith(f"{profile.python}.") and own.machine == expected_architecture():
        return own
    request = f"cpython-{profile.python}-macos-aarch64-none" if on_mac() else profile.python
    found = capture([uv(), "python", "find", "--system", "--no-project", request], cwd=ROOT)
    if found.returncode:
        say(f"  there is no Python {profile.python}: uv downloads one")
        stream([uv(), "python", "install", "--no-bin", request], cwd=ROOT)
        found = capture([uv(), "python", "find", "--system", "--no-project", request], cwd=ROOT)
    if found.returncode:
        how = "`brew install python@3.11`" if on_mac() else "your system's package manager"
        raise UsageError(
            f"Python {profile.python} was not found, and uv could not download one "
            f"(kohya_ss and the lock need {profile.python}; this is {platform.python_version()})",
            f"install it with {how}, or get online and run the same command again",
        )
    path = found.stdout.strip()
    code = "import platform; print(platform.python_version(), platform.machine())"
    printed = capture([path, "-I", "-c", code])
    if printed.returncode:
        raise UsageError(
            f"{path} does not run: {printed.stderr.strip()}", f"install Python {profile.python} again"
        )
    version, machine = printed.stdout.split()
    return Interpreter(path, version, machine)


def check_disk(home: Installation, profile: Profile) -> None:
    """Refuse a first installation that the disk has no room for.

    Raises:
        UsageError: less free disk than the profile says a first installation needs.
    """
    needed = profile.disk_gb["darwin" if on_mac() else "linux"]
    free = free_disk_gb(home.root)
    if free < needed:
        raise UsageError(
            f"the disk of {home.root} has {free:.1f} GB free; the environment and its downloads need {needed:g} GB",
            "free some space, or choose another disk with KOHYA_HOME",
        )


def _fresh(home: Installation, settings: Settings, planned: Plan, interpreter: Interpreter) -> Generation:
    """Make an empty directory, named after the build's inputs; an interrupted build in it is removed."""
    inputs = "\0".join(
        (
            planned.lock.digest,
            settings.profile_name,
            interpreter.path,
            interpreter.version,
            platform.machine(),
        )
    )
    page = "-gui" if planned.gui else ""
    name = f"{settings.profile_name}{page}-{hashlib.sha256(inputs.encode()).hexdigest()[:12]}"
    number = 1
    while True:
        generation = Generation(home.generations / (name if number == 1 else f"{name}-{number}"))
        interrupted = generation.path.exists() and generation.manifest() is None
        if interrupted and generation != generations.linked(home):
            generations.discard(generation)
        if not generation.path.exists():
            generation.path.mkdir(parents=True)
            return generation
        number += 1
