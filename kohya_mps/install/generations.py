"""Generations: built environments side by side, one of them active.

A generation is a directory with the environment (``venv/``), what was built into it
(``manifest.json``, written last: without it the build was interrupted), its accelerate
configuration and, after set-up, its receipt. ``KOHYA_HOME/venv`` links to the active one.
Switching is one rename, and the configuration and the receipt switch with it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import link_atomic, write_atomic
from kohya_mps.core.installation import MANIFEST, Installation, check_location
from kohya_mps.core.process import running_from
from kohya_mps.core.report import say

from .inventory import Inventory


class Manifest(msgspec.Struct, frozen=True):
    """The inputs and the result of a build.

    ``lock``: the SHA-256 of the constraints file. ``seconds``: how long the build took.
    ``gui``: whether the lock is the one with kohya's web page.
    """

    profile: str
    lock: str
    python: str
    interpreter: str
    inventory: Inventory
    seconds: float
    gui: bool = False


class Generation(msgspec.Struct, frozen=True):
    """A directory with one environment, completely built or not."""

    path: Path

    @property
    def name(self) -> str:
        """The profile and a digest of the build's inputs; a repaired one has a number at the end."""
        return self.path.name

    @property
    def venv(self) -> Path:
        """The environment itself."""
        return self.path / "venv"

    @property
    def python(self) -> Path:
        """The trainer's interpreter."""
        return self.venv / "bin" / "python"

    @property
    def accelerate_config(self) -> Path:
        """The accelerate configuration, beside the environment."""
        return self.path / "accelerate.yaml"

    @property
    def receipt(self) -> Path:
        """The record of what was installed and verified."""
        return self.path / "receipt.json"

    @property
    def manifest_file(self) -> Path:
        """The record of the build. It is written last: without it the build did not finish."""
        return self.path / MANIFEST

    @property
    def activation_file(self) -> Path:
        """Holds the number of its activation."""
        return self.path / "turn"

    def manifest(self) -> Manifest | None:
        """The record of the build; None when the build did not finish."""
        try:
            return msgspec.json.decode(self.manifest_file.read_bytes(), type=Manifest)
        except (OSError, msgspec.DecodeError):
            return None

    def has_gui(self) -> bool:
        """Whether kohya's web page is installed, too."""
        manifest = self.manifest()
        return manifest is not None and manifest.gui

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest: the build is finished."""
        write_atomic(self.manifest_file, msgspec.json.encode(manifest))

    def activation_number(self) -> int:
        """A number that increases with each activation in the home; 0 for one that never was active."""
        try:
            return int(self.activation_file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0


def present(home: Installation) -> list[Generation]:
    """All generations of a home, the one that was activated last first, interrupted builds last."""
    if not home.generations.is_dir():
        return []
    found = [Generation(path) for path in sorted(home.generations.iterdir()) if path.is_dir()]
    return sorted(
        found, key=lambda generation: (generation.manifest() is None, -generation.activation_number())
    )


def linked(home: Installation) -> Generation | None:
    """The generation that ``venv`` links to, whatever state it is in."""
    path = home.active_generation
    return Generation(path) if path else None


def active(home: Installation) -> Generation | None:
    """The generation that ``venv`` links to, if it is complete."""
    generation = linked(home)
    return generation if generation and generation.manifest() else None


def latest(home: Installation) -> Generation | None:
    """The complete generation that was activated last."""
    return next((g for g in _complete(home) if g.activation_number()), None)


def previous(home: Installation) -> Generation | None:
    """The generation that was active before the active one."""
    now = active(home)
    return next((g for g in _complete(home) if g.activation_number() and g != now), None)


def foreign_venv(home: Installation) -> bool:
    """Whether ``venv`` is something that this project did not put there."""
    return os.path.lexists(home.venv) and linked(home) is None


def set_aside_foreign_venv(home: Installation, *, replace: bool) -> None:
    """Move an environment that somebody else made aside, if ``replace`` says so.

    Raises:
        UsageError: there is one, and ``replace`` is false.
    """
    if not foreign_venv(home):
        return
    if not replace:
        raise UsageError(
            f"{home.venv} is an environment that this project did not build",
            "`invoke setup --replace-venv` moves it aside (nothing is deleted)",
        )
    aside = home.root / f"venv.before-kohya-mps-{int(time.time())}"
    home.venv.rename(aside)
    say(f"      moved {home.venv} to {aside}")


def activate(home: Installation, generation: Generation) -> None:
    """Make a complete generation the active one.

    Raises:
        StepFailed: it is not complete.
    """
    if generation.manifest() is None:
        raise StepFailed(f"{generation.name} was not built to its end", "`invoke setup` builds it again")
    if active(home) != generation or not generation.activation_number():
        latest_number = max(g.activation_number() for g in present(home))
        write_atomic(generation.activation_file, str(latest_number + 1).encode())
        link_atomic(home.venv, generation.venv)


def prune(home: Installation, keep: int) -> list[str]:
    """Remove interrupted builds, and all but the ``keep`` generations that were active last.

    The active one always stays, and one that a training still runs from. Another generation
    of the active one's profile and lock goes: it was replaced because it had been changed.

    Returns:
        The names of the removed generations.
    """
    now = linked(home)
    origin = _origin(now) if now else None
    others = [g for g in _complete(home) if g != now and g.activation_number() and _origin(g) != origin]
    kept = [*([now] if now else []), *others[: max(keep - 1, 0)]]
    gone = []
    for generation in present(home):
        if generation in kept:
            continue
        if users := running_from(generation.path):
            say(f"  {generation.name} stays: process {users[0]} runs from it")
            continue
        discard(generation)
        gone.append(generation)
    return [generation.name for generation in gone]


def discard(generation: Generation) -> None:
    """Remove a generation; its manifest goes first, so that a half-removed one never looks complete."""
    generation.manifest_file.unlink(missing_ok=True)
    shutil.rmtree(generation.path)


def _complete(home: Installation) -> Iterator[Generation]:
    return (g for g in present(home) if g.manifest() is not None)


def _origin(generation: Generation) -> tuple[str, str] | None:
    manifest = generation.manifest()
    return (manifest.profile, manifest.lock) if manifest else None


def installed(home: Installation, profile: str = "") -> Generation:
    """The active generation.

    Args:
        home: where it is installed.
        profile: the profile that it must be of, where that profile's rules or lock are applied to it.

    Raises:
        UsageError: nothing is installed in this home, it is of another profile, or others
            can write to it.
    """
    check_location(home)
    generation = active(home)
    manifest = generation.manifest() if generation else None
    if generation is None or manifest is None:
        raise UsageError(f"there is no environment in {home.root}", "`invoke setup` builds it")
    if profile and manifest.profile != profile:
        raise UsageError(
            f"the active environment is of the profile {manifest.profile}, not {profile}",
            f"leave out KOHYA_PROFILE to use it, or install the other: `invoke setup --profile {profile}`",
        )
    return generation
